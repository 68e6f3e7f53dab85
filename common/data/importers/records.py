"""Reads a table's file as records: CSV and similar formats, JSON Lines, JSON, also compressed with gzip."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.data.importers.columns import KNOWN_COLUMNS, name_key
from common.errors import DataError, UsageError
from common.json_files import parse_line

SEPARATORS = (",", ";", "\t", "|")  # spreadsheets of many countries separate by semicolons, LJSpeech by |
GZIP = b"\x1f\x8b"
# How files begin that are no text.
OTHER_KINDS = {
    b"PK\x03\x04": "an Excel workbook or another zip archive: save the sheet as CSV (UTF-8), or unpack the archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV (UTF-8)",
    b"PAR1": "Parquet: write it as JSON Lines (pandas: `to_json(path, orient='records', lines=True)`)",
    b"ARROW1": "Arrow: write it as JSON Lines (pandas: `to_json(path, orient='records', lines=True)`)",
    b"SQLite format 3": "an SQLite database: write the table as CSV",
    b"BZh": "compressed with bzip2: unpack it, or use gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it, or use gzip",
    b"%PDF": "a PDF: write the table as CSV",
    b"RIFF": "audio: name the table that lists the audio files",
    b"fLaC": "audio: name the table that lists the audio files",
}
_KEYS = {name.replace("_", "") for field in ("audio_filepath", "text") for name in KNOWN_COLUMNS[field]}


class Table(NamedTuple):
    """Content of a table's file.

    Attributes:
        columns: the names in order, including duplicates.
        records: (file and line, column → cell).
        faults: lines that are not records.
        empty: number of rows with only empty cells, which spreadsheets leave at the end.
    """

    columns: list[str]
    records: list[tuple[str, Mapping[str, Any]]]
    faults: list[str]
    empty: int = 0


def read_table(table: Path, header: Sequence[str] = ()) -> Table:
    """The records of a table; its format is detected from its content.

    Args:
        header: the columns' names, if the file has no header row.

    Raises:
        DataError: the file cannot be read, or is not a table; the message names its format.
        UsageError: a header for JSON.
    """
    text = _read_text(table)
    if text.lstrip()[:1] in ("{", "["):
        if header:
            raise UsageError(f"{table} is JSON, which names its columns itself: leave out --header")
        return _json_table(table, text)
    return _csv_table(table, text, list(header))


def _read_text(table: Path) -> str:
    try:
        raw = table.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(GZIP) else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{table} is a damaged gzip file ({error}): copy it again") from None
    except OSError as error:
        raise DataError(f"cannot read the table {table}: {error.strerror}: check the path and its rights") from error
    for beginning, kind in OTHER_KINDS.items():
        if raw.startswith(beginning):
            raise DataError(f"{table} is {kind}")
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{table}:{line} is not utf-8 text ({error.reason}): save the table as utf-8") from error


def _csv_table(table: Path, text: str, header: list[str]) -> Table:
    first, _, rest = text.partition("\n")
    separator, skipped = "", 0
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's way to say it
        separator, text, skipped = first.strip()[4], rest, 1
    separator = separator or _separator(text, header)
    # Where tabs or bars separate, a quote is mostly a character of the text, as in Common Voice.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator in "\t|" else csv.QUOTE_MINIMAL
    parsed = Table(header, [], [])
    empty = 0
    lines = io.StringIO(text, newline="")  # ends at line feeds and carriage returns alone, unlike `splitlines`
    reader = csv.reader(lines, delimiter=separator, strict=True, quoting=quoting)
    try:
        for row in reader:
            where = f"{table}:{reader.line_num + skipped}"
            cells = [_unquoted(cell) for cell in row] if quoting == csv.QUOTE_NONE else row
            if not any(cell.strip() for cell in cells):
                empty += bool(row)
            elif not parsed.columns:
                parsed.columns.extend(_without_tail(cells, 0))
            elif len(cells := _without_tail(cells, len(parsed.columns))) != len(parsed.columns):
                parsed.faults.append(
                    f"{where}: the row has {len(cells)} cells, the header {len(parsed.columns)}: put a text with "
                    f"{separator!r} into quotes"
                )
            else:
                parsed.records.append((where, dict(zip(parsed.columns, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{table}:{reader.line_num + skipped}: {error}: check quotes and separators") from error
    return parsed._replace(empty=empty)


def _separator(text: str, header: Sequence[str]) -> str:
    lines = [line for line in text[:100_000].split("\n")[:20] if line.strip()]
    first = lines[0] if lines else ""
    if header:
        fits = [mark for mark in reversed(SEPARATORS) if first.count(mark) == len(header) - 1]
        return fits[0] if fits else ","
    bars = first.count("|")
    if bars and all(line.count("|") == bars for line in lines[:-1] or lines):
        return "|"
    return max(SEPARATORS[:3], key=first.count)


def _without_tail(cells: list[str], length: int) -> list[str]:
    """Cells without empty cells at the end, but at least `length` cells."""
    while len(cells) > length and not cells[-1].strip():
        cells = cells[:-1]
    return cells


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _json_table(table: Path, text: str) -> Table:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not _is_json_lines(lines):
        records = _json_records(table, text)
        faults: list[str] = []
    else:
        records, faults = [], []
        for number, line in lines:
            try:
                records.append((f"{table}:{number}", parse_line(line, f"{table}:{number}")))
            except DataError as error:
                faults.append(str(error))
    return Table(list(dict.fromkeys(name for _, record in records for name in record)), records, faults)


def _is_json_lines(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether one of the first lines is a separate object (other lines may be faulty), and not a whole table in one
    object.
    """
    for _, line in lines[:3]:
        try:
            first = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not lines[0][1].startswith("[") and isinstance(first, dict):
            return len(lines) > 1 or not all(isinstance(value, dict | list) for value in first.values())
    return False


def _json_records(table: Path, text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The records of one JSON value: an array of objects, or the formats of pandas and SpeechBrain."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{table}:{error.lineno}: not JSON ({error.msg}, column {error.colno}): correct it") from error
    except RecursionError:
        raise DataError(f"{table} is nested too deeply for a table: give an array of objects") from None
    items = _items(content)
    if items is None or not all(isinstance(item, dict) for _, item in items):
        raise DataError(f"{table}:1: JSON, but no table: give an array of objects, or one object a line (JSON Lines)")
    return [(f"{table}: {name}", item) for name, item in items]


def _items(content: Any) -> list[tuple[str, Any]] | None:
    """(name, record) of each row; None if the value is not a table."""
    if isinstance(content, list):
        return [(f"item {number}", item) for number, item in enumerate(content, start=1)]
    names, rows = content.get("columns"), content.get("data")
    if isinstance(names, list) and isinstance(rows, list):  # pandas' orient="split"
        names = [str(name) for name in names]
        return [
            (f"item {i}", dict(zip(names, row, strict=False)) if isinstance(row, list) else row)
            for i, row in enumerate(rows, start=1)
        ]
    values = list(content.values())
    if values and all(isinstance(value, dict) for value in values):
        if any(name_key(name)[0] in _KEYS for name in content):  # pandas' orient="columns"
            rows = list(dict.fromkeys(key for value in values for key in value))
            return [(f"row {key}", {name: content[name].get(key) for name in content}) for key in rows]
        return [(repr(key), _with_id(key, value)) for key, value in content.items()]  # SpeechBrain; orient="index"
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:  # {"data": […]}
        return _items(lists[0])
    return None if any(isinstance(value, dict | list) for value in values) else [("item 1", content)]


def _with_id(key: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record with its name as id, unless the name is a row number from pandas."""
    return record if key.isdigit() or "id" in record else {"id": key, **record}
