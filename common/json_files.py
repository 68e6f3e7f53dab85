"""Reading the small JSON files that stages write."""

import json
from pathlib import Path
from typing import Any

from common.data.corpus import read_jsonl
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
