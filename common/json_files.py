"""Reading the small JSON files that stages write, with errors that name file and line."""

import json
from pathlib import Path
from typing import Any

from common.errors import DataError

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
    raise DataError(f"{path} cannot be read ({error}): run the stage that writes it again")


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: a missing file or a line that is no JSON object; the message names file and line.
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                rows.append(dict(json.loads(line)))
    except (OSError, TypeError, ValueError) as error:
        where = f"{path}:{len(rows) + 1}"
        raise DataError(f"{where} cannot be read ({error}): run the stage that writes it again") from None
    return rows
