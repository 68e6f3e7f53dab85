"""Reading and writing JSON files and JSON Lines (one object per line)."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import read_document
from common.text import lone_surrogate

REMEDY = "run the stage that writes it again"
MAX_LINE = 16 * 2**20  # characters of a line of JSON Lines
Row = dict[str, Any]


def read_object(path: Path, remedy: str = REMEDY) -> Row:
    """The JSON object in a file.

    Raises:
        DataError: the file is missing, very large, or not a JSON object; the message names it.
    """
    try:
        data = read_document(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from None
    return parse_object(data, str(path), remedy)


def parse_object(data: bytes, where: str, remedy: str = REMEDY) -> Row:
    """The JSON object in the content of a file.

    Args:
        where: the file, for messages.

    Raises:
        DataError: the content is not a JSON object, or is nested too deeply.
    """
    try:
        value = json.loads(data)
        if isinstance(value, dict):
            return value
        error: Exception = ValueError("it contains no JSON object")
    except (ValueError, RecursionError) as caught:
        error = caught
    raise DataError(f"{where} cannot be read ({error}): {remedy}")


def to_json(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_bytes(to_json(value))


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: the file is missing, or a line is not a JSON object; the message names file and line.
    """
    return [row for _, row in read_jsonl(path, remedy=REMEDY)]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSON Lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path, *, remedy: str) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON Lines file with their line numbers, blank lines skipped.

    Only a line feed ends a line: JSON may contain U+2028 and U+0085, at which `str.splitlines` would split.

    Raises:
        DataError: the file cannot be read (the message ends with `remedy`), or a line is not a JSON object, or contains
            text that UTF-8 cannot represent.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), start=1):
                if len(line) == MAX_LINE:
                    raise DataError(f"{path}:{number}: a line of over {MAX_LINE:,} characters: {remedy}")
                if line.strip():
                    yield number, parse_line(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not utf-8 text ({error.reason}): save it as utf-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: {remedy}") from error


def parse_line(line: str, where: str) -> Row:
    """The object in a line of JSON Lines.

    Args:
        where: file and line, for messages.

    Raises:
        DataError: the line is not JSON or not an object, or contains half of a surrogate pair, which UTF-8 cannot
            represent.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON ({reason}): one JSON object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, not an object: one JSON object a line")
    if "\\ud" in line.lower() and (half := lone_surrogate(json.dumps(record, ensure_ascii=False))):
        raise DataError(
            f"{where}: contains \\u{half}, half of a surrogate pair, which is not a character: correct the text"
        )
    return record
