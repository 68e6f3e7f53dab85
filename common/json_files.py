"""Reading JSON files and JSON Lines, one object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError

REMEDY = "run the stage that writes it again"
Row = dict[str, Any]


def read_object(path: Path) -> Row:
    """The JSON object in a file.

    Raises:
        DataError: a missing file or one that is no JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        error: Exception = ValueError("it holds no JSON object")
    except (OSError, ValueError) as found:
        error = found
    raise DataError(f"{path} cannot be read ({error}): {REMEDY}")


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: a missing file or a line that is no JSON object; the message names file and line.
    """
    return [row for _, row in read_jsonl(path, remedy=REMEDY)]


def read_jsonl(path: Path, *, remedy: str = "check the path and its rights") -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, blank lines skipped.

    Raises:
        DataError: the file cannot be read (the message ends in `remedy`), or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_object(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not utf-8 text ({error.reason}): save it as utf-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: {remedy}") from error


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}): one JSON object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: holds a {type(record).__name__}, not an object: one JSON object a line")
    return record
