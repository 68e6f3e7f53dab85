"""Demo data without network access: synthetic corpora by espeak-ng, and a reader of CTranslate2 models."""
