"""Texts as they are compared: Whisper's normaliser, languages without spaces, hallucination loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

# Written without spaces between words: each character counts as a word, as in Whisper's paper.
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
# A loop is a phrase of at most this many words, this often in a row.
LOOP_WORDS, LOOP_REPEATS = 12, 4
# Or, within one word, at most this many characters, this often in a row.
LOOP_CHARS, LOOP_CHAR_REPEATS = 8, 8


def normalise(text: str, language: str = "en") -> str:
    """A text as it is compared: Whisper's English normaliser, or its basic one for other languages.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.

    Args:
        text: reference or hypothesis.
        language: code of the language, such as "en"; a region after it ("en-GB", "en_us") is ignored.
    """
    return _normalise(text, _base(language))


def unspaced(language: str) -> bool:
    """Whether a language is written without spaces between words."""
    return _base(language) in UNSPACED_LANGUAGES


def _base(language: str) -> str:
    """A language's code without the region after it: "en" of "en-GB" and "en_us"."""
    return language.replace("_", "-").split("-")[0].lower()


@lru_cache(maxsize=1 << 16)  # references come again with every evaluation
def _normalise(text: str, language: str) -> str:
    return _normaliser(language)(text).strip()


@lru_cache(maxsize=8)
def _normaliser(language: str) -> Callable[[str], str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an escape in the package's docstrings, when it is compiled
        warnings.simplefilter("ignore", DeprecationWarning)  # the same in Python 3.11
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    english: Callable[[str], str] = EnglishTextNormalizer()
    basic: Callable[[str], str] = BasicTextNormalizer(split_letters=language in UNSPACED_LANGUAGES)
    return english if language == "en" else basic


def is_hallucination_loop(hypothesis: str, reference: str) -> bool:
    """Whether a hypothesis repeats a phrase back to back far more often than was said, and so inserts words.

    True if some phrase of up to 12 words stands at least 4 times in a row (or, within a word, up to 8 characters
    at least 8 times), at least twice as often as in the reference, and the hypothesis is the longer text.

    Args:
        hypothesis, reference: as `normalise` gives them.
    """
    if len(hypothesis) <= len(reference):
        return False
    said, meant = hypothesis.split(), reference.split()
    if len(said) > len(meant):
        repeats = _most_repeats(said, LOOP_WORDS)
        if repeats >= max(LOOP_REPEATS, 2 * _most_repeats(meant, LOOP_WORDS)):
            return True
    long_words = [word for word in said if len(word) >= 2 * LOOP_CHAR_REPEATS and word not in meant]
    return any(_most_repeats(word, LOOP_CHARS) >= LOOP_CHAR_REPEATS for word in long_words)


def _most_repeats(items: Sequence[str], longest: int) -> int:
    """How often some phrase of up to `longest` items stands in a row, at most."""
    most = min(len(items), 1)
    for period in range(1, min(longest, len(items) // 2) + 1):
        run = best = 0
        for earlier, later in zip(items, items[period:], strict=False):
            run = run + 1 if earlier == later else 0
            best = max(best, run)
        most = max(most, best // period + 1)
    return most
