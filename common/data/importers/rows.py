"""A row as the importers pass it on: text by our field names, where it stands, and its audio."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.data.corpus import Corpus

# Looked for beside a name without one: LJSpeech and early Common Voice leave them out.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row as text by our field names (an empty `split` has to be there), where it stands, and its audio.

    `folder` comes before the path where an id is made of it.
    """

    where: str
    values: dict[str, str]
    audio: Path
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Imported:
    """A corpus, how many recordings were left out by reason, the rows among them one by one, and what to know of it."""

    corpus: Corpus
    skipped: Mapping[str, int]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_audio(root: Path, name: str) -> Path:
    """Where the audio of a row lies: as it is written, or with slashes for backslashes, in the other Unicode form of
    its accents (macOS writes decomposed names), or with a suffix; as it is written where none is there."""
    for path in (root / variant for variant in _variants(name)):
        if path.exists():
            return path.resolve()
    return (root / name).resolve()


def _variants(name: str) -> Iterator[str]:
    slashed = name.replace("\\", "/")
    forms = [name, slashed]
    if not name.isascii():
        forms += [unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")]
    yield from forms
    if not Path(slashed).suffix or Path(slashed).suffix[1:].isdigit():
        yield from (form + suffix for form in forms[1:] for suffix in SUFFIXES)
