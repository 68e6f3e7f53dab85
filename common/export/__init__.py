"""Trained models in the formats of other tools: PEFT, a merged checkpoint, CTranslate2, vLLM."""
