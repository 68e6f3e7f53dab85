"""Whisper's limits, for code that must not import torch."""

MAX_SECONDS = 30.0  # of audio in one utterance
FRAME_SECONDS = 0.01  # of a mel frame: an overhang below it is rounding, and readers cut it off
MAX_TOKENS = 448  # decoder positions


def is_too_long(seconds: float) -> bool:
    """Whether audio is longer than 30 s by at least one frame."""
    return seconds >= MAX_SECONDS + FRAME_SECONDS
