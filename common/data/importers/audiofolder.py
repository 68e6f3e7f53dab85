"""Hugging Face's audiofolder: audio beside a metadata.csv or metadata.jsonl, in one folder or one for each split."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from common.data.importers.build import BuildOptions, build_corpus
from common.data.importers.folders import is_data, kind_of_folder, visible_files
from common.data.importers.rows import Imported, TableRow
from common.data.importers.splits import SPLIT_NAMES
from common.data.importers.tables import Rows, read_rows
from common.errors import DataError

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json")
AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".webm", ".aac", ".aif", ".aiff")


def import_audiofolder(
    folder: str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    **options: Unpack[BuildOptions],
) -> Imported:
    """Make a corpus of a Hugging Face audiofolder: metadata at the top, or in each of the folders train, validation and
    test (in any case), whose names then are the splits. Arguments and errors as of `import_table`.
    """
    source = Path(folder)
    total = Rows([], [], [])
    for metadata in _metadata(source):
        split = "" if metadata.parent == source else metadata.parent.name
        part = read_rows(metadata, metadata.parent, columns or {}, split=split, folder=Path(split))
        total = Rows(total.rows + part.rows, total.faults + part.faults, total.notes + part.notes)
    if not total.rows and not total.faults:
        raise DataError(
            f"{source} contains no {' or '.join(METADATA[::2])} with rows at its top or in train/, validation/, test/; "
            f"{kind_of_folder(source)}"
        )
    rows = _splits_of_paths(total.rows)
    return build_corpus(
        rows,
        Path(out),
        source={"format": "audiofolder", "source": str(folder), "columns": dict(columns or {})},
        skip_bad=skip_bad,
        faults=total.faults,
        notes=[*dict.fromkeys(total.notes), *_passed_over(source, rows)],
        **options,
    )


def _metadata(source: Path) -> list[Path]:
    """The metadata files to read: in the top folder, and in folders with a split's name."""
    parts = [source, *(path for path in _folders(source) if path.name.lower() in SPLIT_NAMES)]
    return [path for part in parts for path in _metadata_in(part)]


def _folders(source: Path) -> list[Path]:
    return [path for path in sorted(source.glob("*/")) if path.is_dir() and is_data(path, source)]


def _metadata_in(folder: Path) -> list[Path]:
    names = {path.name.lower(): path for path in sorted(folder.glob("*")) if path.is_file()}
    return [names[name] for name in METADATA if name in names]


def _splits_of_paths(rows: list[TableRow]) -> list[TableRow]:
    """Splits of the rows from the folders of their audio, if the metadata is in the top folder and the folders have the
    names of splits.
    """
    tops = [Path(row.values["audio_filepath"].replace("\\", "/")).parts[0].lower() for row in rows]
    if any(row.values["split"] for row in rows) or not set(tops) <= SPLIT_NAMES.keys():
        return rows
    return [replace(row, values=row.values | {"split": top}) for row, top in zip(rows, tops, strict=True)]


def _passed_over(source: Path, rows: Sequence[TableRow]) -> list[str]:
    """Content of the folder that is not in the corpus: folders with other names, audio that no row names."""
    notes = []
    other = [path for path in _folders(source) if path.name.lower() not in SPLIT_NAMES and _metadata_in(path)]
    for folder in other:
        notes.append(f"omitted: folder {folder.name}/, which is no split ({', '.join(SPLIT_NAMES)}): rename it")
    named = {row.audio for row in rows}
    unnamed = [
        path
        for path in visible_files(source, AUDIO)
        if path.resolve() not in named and not any(path.is_relative_to(folder) for folder in other)
    ]
    if unnamed:
        notes.append(f"omitted: {len(unnamed)} audio files that no row names, as {unnamed[0].relative_to(source)}")
    return notes
