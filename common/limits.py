"""Whisper's own limits, for code that must not import torch."""

MAX_SECONDS = 30.0  # of audio in one utterance
MAX_TOKENS = 448  # decoder positions
