"""Corpora from a table with audio paths."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from common.data.importers.build import BuildOptions, build_corpus
from common.data.importers.columns import TO_THE_END, UNTOUCHED, Column, check_mapping, choose_columns
from common.data.importers.records import read_table
from common.data.importers.rows import Imported, TableRow, find_audio
from common.data.importers.values import as_text, seconds
from common.errors import DataError


class Rows(NamedTuple):
    """The rows of a table, the faults of rows that cannot be read, and messages about its columns."""

    rows: list[TableRow]
    faults: list[str]
    notes: list[str]


def import_table(
    table: str | Path,
    out: str | Path,
    *,
    audio_root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    header: Sequence[str] = (),
    skip_bad: bool = False,
    **options: Unpack[BuildOptions],
) -> Imported:
    """Make a corpus from a table with audio paths: CSV (comma, semicolon, tab or bar), JSON Lines, or JSON; also
    gzipped.

    Durations are measured; a column `duration` is used only together with a column of offsets (several utterances in
    one file). Without a column of splits, speakers are assigned to train, dev and test (`split_by_speaker`).

    Args:
        table: the file; its paths are relative to `audio_root`, by default the table's folder, or absolute.
        out: the corpus folder to make, which must not exist or must be empty.
        columns: field name -> the table's column, if it is not among `KNOWN_COLUMNS`; an empty name uses no column.
        header: the names of the columns, for a table without a header row.
        skip_bad: leave out rows with a fault; otherwise they are an error, with all of them in one message.
        options: see `BuildOptions`.

    Raises:
        DataError: an unreadable table, a missing column, rows with a fault; the message names file and line.
        UsageError: `out` exists or an unknown field in `columns`.
        StoreError, RetryableError: `out` cannot be written.
    """
    root = Path(audio_root or Path(table).parent)
    parsed = read_rows(Path(table), root, columns or {}, header=header)
    if not parsed.rows and not parsed.faults:
        raise DataError(f"{table} has no rows: nothing to import")
    return build_corpus(
        parsed.rows,
        Path(out),
        source={"format": "table", "source": str(table), "columns": dict(columns or {})},
        skip_bad=skip_bad,
        faults=parsed.faults,
        notes=parsed.notes,
        **options,
    )


def read_rows(
    table: Path,
    audio_root: Path,
    columns: Mapping[str, str],
    *,
    header: Sequence[str] = (),
    split: str = "",
    folder: Path = Path(),
) -> Rows:
    """The rows of a table by field name.

    Args:
        split: split of rows that name none.
        folder: put before the path when an id is made from it.

    Raises:
        DataError: an unreadable table, a missing column.
        UsageError: an unknown field in `columns`.
    """
    check_mapping(columns)
    content = read_table(table, header)
    if not content.records:
        return Rows([], content.faults, [])
    chosen, notes = choose_columns(table, content.columns, [record for _, record in content.records], columns)
    rows: list[TableRow] = []
    faults = list(content.faults)
    untouched = {where: str(record.get(UNTOUCHED) or "").strip() for where, record in content.records}
    for where, record in content.records:
        try:
            values = {"split": split, **_values(where, record, chosen)}
            rows.append(TableRow(where, values, find_audio(audio_root, values["audio_filepath"]), folder))
        except DataError as error:
            faults.append(str(error))
    if same := [row for row in rows if row.values["text"] == untouched.get(row.where)]:
        notes.append(
            f"rows with the text that was written for them, which nobody corrected: {len(same)} of {len(rows)}"
        )
    if content.empty:
        notes.append(f"empty rows that are omitted: {content.empty}")
    return Rows(rows, faults, notes)


def _values(where: str, record: Mapping[str, Any], chosen: Mapping[str, Column]) -> dict[str, str]:
    """A record's filled cells by field name, times in seconds."""
    values: dict[str, str] = {}
    for field, column in chosen.items():
        try:
            text = as_text(record.get(column.name), field)
        except DataError as error:
            raise DataError(f"{where}: column {column.name!r} {error}") from None
        time = seconds(text) if column.scale != 1 else None
        if text and not (field == "end" and text in TO_THE_END):
            values[field] = text if time is None else repr(time * column.scale)
    for field in ("audio_filepath", "text"):
        if field not in values:
            raise DataError(f"{where}: column {chosen[field].name!r} is empty: fill it, or remove the row")
    if re.match(r"[A-Za-z][A-Za-z\d+]+://", path := values["audio_filepath"]):
        raise DataError(f"{where}: {path} is an address, no file: download it, then name the file")
    if re.match(r"[A-Za-z]:[\\/]", path):
        raise DataError(f"{where}: {path} is a path of Windows: write paths that start from --audio-root")
    return values
