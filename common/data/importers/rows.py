"""A row in the form shared by the importers: text by field name, its position in the source, and its audio."""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.data.corpus import Corpus

# Tried for a name without suffix: LJSpeech and early Common Voice leave suffixes out.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row as text by field name (including `split`, which may be empty), its position in the source, and its audio.

    `folder` is put before the path when an id is made from it.
    """

    where: str
    values: dict[str, str]
    audio: Path
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Imported:
    """A corpus, the number of recordings omitted by reason, the rows omitted, and messages about the corpus."""

    corpus: Corpus
    skipped: Mapping[str, int]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_audio(root: Path, name: str) -> Path:
    """Path of a row's audio: as written, or with slashes for backslashes, in the other Unicode form of its accents
    (macOS writes decomposed names), or with a suffix; as written if none of these exists.
    """
    try:
        for path in (root / variant for variant in _variants(name)):
            if path.exists():
                return path.resolve()
        return (root / name).resolve()
    except (OSError, ValueError):  # too long, or with a NUL: no file can have this name, as reading it will say
        return root / name


def _variants(name: str) -> Iterator[str]:
    slashed = name.replace("\\", "/")
    forms = [name, slashed]
    if not name.isascii():
        forms += [unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")]
    yield from forms
    if not Path(slashed).suffix or Path(slashed).suffix[1:].isdigit():
        yield from (form + suffix for form in forms[1:] for suffix in SUFFIXES)
