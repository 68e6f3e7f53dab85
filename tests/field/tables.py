"""Small corpora for tests of what people bring: tones, and tables as they are written by hand or by programs."""

from pathlib import Path

import numpy as np

from common.data.importers.rows import Imported
from common.data.importers.tables import import_table
from tests.factories import write_wav


def recordings(folder: Path, count: int = 3, *, seconds: float = 0.3) -> Path:
    """0.wav, 1.wav, … and long.wav of 4 s."""
    for i in range(count):
        write_wav(folder / f"{i}.wav", np.random.default_rng(i).uniform(-0.3, 0.3, round(seconds * 16000)))
    write_wav(folder / "long.wav", np.random.default_rng(99).uniform(-0.3, 0.3, 64000))
    return folder


def imported(folder: Path, content: str | bytes, *, name: str = "t.csv", **options) -> Imported:
    """What the importer makes of a table that lies beside recordings."""
    recordings(folder)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return import_table(folder / name, folder / "out", **options)


def cells(made: Imported, *fields: str) -> list[tuple]:
    """These fields of the utterances, sorted by id."""
    return [tuple(getattr(u, field) for field in fields) for u in made.corpus.utterances]
