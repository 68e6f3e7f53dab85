"""Speech and weights that a closed machine can have: espeak-ng corpora and the reader of CTranslate2 models."""
