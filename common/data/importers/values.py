"""A cell of a table as text, a time in it as seconds."""

import math
import re
from typing import Any

from common.errors import DataError
from common.text import lone_surrogate

_CLOCK = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d(?:[.,]\d+)?)")


def as_text(value: Any, field: str) -> str:
    """A cell as text; empty for null and NaN. For Hugging Face's audio objects, the path.

    Raises:
        DataError: the cell is a list, an object, true or false, or contains half of a surrogate pair; the caller adds
            the position.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict) and field == "audio_filepath":
        value = _path_of(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas turns whole numbers into floats where some are missing
    if isinstance(value, bool | list | dict):
        kind = {bool: "true or false", list: "a list", dict: "an object"}[type(value)]
        raise DataError(f"holds {kind}, not text: put the text itself there")
    text = str(value).strip()
    if half := lone_surrogate(text):
        raise DataError(f"contains \\u{half}, half of a surrogate pair, which is not a character: correct it")
    return text


def _path_of(audio: dict[str, Any]) -> str:
    path = audio.get("path")
    if isinstance(path, str) and path:
        return path
    raise DataError(
        f"contains an object with {', '.join(map(str, audio)) or 'nothing'} and no path: write the audio to files"
    )


def seconds(text: str) -> float | None:
    """A time as seconds: `12.5`, `1:02.5`, `0:01:02,5`; None if the value is not a time or is negative."""
    clock = _CLOCK.fullmatch(text)
    if clock:
        return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3].replace(",", "."))
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
