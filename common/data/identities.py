"""Names of speakers, etiologies, severities and utterances: one form for each, wherever they are read."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from common.text import mend

# What programs write where there is no value, compared in small letters.
MISSING = frozenset({"nan", "<na>", "#n/a", "n/a", "null"})


def identifier(text: str) -> str:
    """An utterance's id in one form: composed (NFC), no line ends or other odd white space in it."""
    if text.isascii() and text.isprintable() and " " not in text:
        return text
    return " ".join(unicodedata.normalize("NFC", text).split())


def identity(text: str) -> str:
    """The name of a speaker or group in one form, as `identifier`; empty for what stands for a missing value."""
    name = identifier(text)
    return "" if name.lower() in MISSING else name


def identity_key(name: str) -> str:
    """What is equal for two spellings of one name: case, width, kinds of apostrophe, and 7.0 for 7 do not count."""
    plain = unicodedata.normalize("NFKC", mend(name)).casefold()
    whole = re.fullmatch(r"(\d+)\.0+", plain)
    return whole[1] if whole else plain


def join_spellings(names: Iterable[str]) -> dict[str, str]:
    """Each of the names that is another spelling of a commoner one → that one (of equally common ones, the first).

    Args:
        names: one for each utterance, as `identity` gives them.
    """
    counts = Counter(names)
    best: dict[str, str] = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        best.setdefault(identity_key(name), name)
    return {name: best[identity_key(name)] for name in counts if best[identity_key(name)] != name}
