"""Normalisation of the names of speakers, etiologies, severities and utterances."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

from common.text import mend

# What programs write where there is no value, compared in small letters.
MISSING = frozenset({"nan", "<na>", "#n/a", "n/a", "null"})


def identifier(text: str) -> str:
    """An utterance's id in normalised form: composed (NFC), without line ends or other unusual white space."""
    if text.isascii() and text.isprintable() and " " not in text:
        return text
    return " ".join(unicodedata.normalize("NFC", text).split())


def identity(text: str) -> str:
    """The name of a speaker or group in normalised form, as `identifier`; empty for words that stand for a missing
    value.
    """
    name = identifier(text)
    return "" if name.lower() in MISSING else name


@lru_cache(maxsize=100_000)  # every utterance of a corpus asks, and speakers are few
def identity_key(name: str) -> str:
    """A key that is equal for all spellings of one name: it ignores case, width, kinds of apostrophe, and 7.0 for 7."""
    plain = unicodedata.normalize("NFKC", mend(name)).casefold()
    whole = re.fullmatch(r"(\d+)\.0+", plain)
    return whole[1] if whole else plain


def join_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Each name whose spelling is to be replaced → the most frequent spelling in normalised form (`identity`).

    Args:
        counts: name as read → number of utterances that have it.
    """
    form_of = {name: identity(name) for name in counts}
    common: Counter[str] = Counter()
    for name, form in form_of.items():
        common[form] += counts[name]
    best: dict[str, str] = {}
    for form in sorted(common, key=lambda form: (-common[form], form)):
        best.setdefault(identity_key(form), form)
    joined = {name: best[identity_key(form)] for name, form in form_of.items()}
    return {name: form for name, form in joined.items() if name != form}


def joined_in_words(field: str, joined: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Messages about the replacements of `join_spellings` in a field, one sentence for each replaced spelling.

    Args:
        names: all names that occur, each once.
    """
    spellings = Counter(joined.get(name, name) for name in {" ".join(name.split()) for name in names})
    remarks = []
    for name, form in sorted(joined.items()):
        if not form and name.strip():
            remarks.append(f"{field} {name!r} is taken for a missing value")
        elif " ".join(name.split()) != form and spellings[form] > 1:
            alike = unicodedata.normalize("NFC", name) == form  # which look the same
            shown = (ascii(name), ascii(form)) if alike else (repr(name), repr(form))
            remarks.append(f"{field} {shown[0]} is taken for {shown[1]}")
    return remarks
