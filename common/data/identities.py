"""Names of speakers, etiologies, severities and utterances: one form for each, wherever they are read."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

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


def join_spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """Each of the names that is to be written otherwise → its one form (`identity`), in the commonest spelling.

    Args:
        counts: of the names as they were read, how many utterances have each.
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
    """What `join_spellings` did to a field, a sentence for each spelling that is taken for another one or for none.

    Args:
        names: those that occur, each once.
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
