"""Detection and removal of loops: phrases that a decoder repeats more often than a speaker would.

The limit of compression is Whisper's (Radford et al. 2022, section 4.5). This limit alone would also cut a list of
numbers.
"""

import re
import zlib
from collections.abc import Sequence

from common.text import LOOP_CHAR_REPEATS, LOOP_CHARS, LOOP_REPEATS, LOOP_WORDS, MAX_CHARACTERS_PER_SECOND

COMPRESSION_RATIO_THRESHOLD = 2.4  # bytes of a text over bytes of its zlib compression: above, it is repetitive
LOOP_LETTERS = 40  # a loop's longest phrase where words are not spaced, in characters

_LONG_WORD = re.compile(rf"(.{{1,{LOOP_CHARS}}}?)\1{{{LOOP_CHAR_REPEATS - 1},}}")


def compression_ratio(text: str) -> float:
    """Bytes of a text over bytes of its zlib compression: high for loops."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def is_loop(text: str, seconds: float, *, spaced: bool = True) -> bool:
    """Whether a text repeats a phrase at least 4 times in a row, and is too repetitive or too fast for speech.

    For example, "no, no, no, no" in two seconds is not a loop, and one sentence repeated six times is.

    Args:
        seconds: duration of the audio.
        spaced: whether its language puts spaces between words.
    """
    keys = [key_of(item) for item in (text.split() if spaced else text)]
    if len(kept_items(keys, spaced=spaced)) == len(keys) and not any(_LONG_WORD.search(key) for key in keys):
        return False
    too_fast = len(text) > MAX_CHARACTERS_PER_SECOND * seconds
    return too_fast or compression_ratio(text) > COMPRESSION_RATIO_THRESHOLD


def kept_items(keys: Sequence[str], *, spaced: bool = True) -> list[int]:
    """The numbers of the items that are kept when each phrase that occurs at least 4 times in a row is reduced to one.

    Args:
        keys: words, or characters where words are not spaced, as `key_of` gives them.
    """
    kept: list[int] = []
    place = 0
    while place < len(keys):
        period, length = _run_at(keys, place, LOOP_WORDS if spaced else LOOP_LETTERS)
        kept.extend(range(place, place + period))
        place += length
    return kept


def _run_at(keys: Sequence[str], place: int, longest: int) -> tuple[int, int]:
    """(items of the phrase, items of all its repetitions) of a loop that begins at `place`; (1, 1) without a loop."""
    for period in range(1, min(longest, (len(keys) - place) // LOOP_REPEATS) + 1):
        end = place + period
        while end < len(keys) and keys[end] == keys[end - period]:
            end += 1
        if end - place >= period * LOOP_REPEATS:
            return period, end - place
    return 1, 1


def shortened(word: str) -> str:
    """A word without the repetitions within it: `ha` of `hahahahahahahaha`."""
    return _LONG_WORD.sub(r"\1", word)


def key_of(word: str) -> str:
    """A word in the form used for comparison: without case and punctuation."""
    return "".join(c for c in word.casefold() if c.isalnum()) or word
