"""Results as JSON in which each row is one line, so that a change shows what was measured again."""

from __future__ import annotations

import json
from typing import Any

from common.json_files import Row


def one_row_per_line(results: Row) -> str:
    """JSON in which every element of a list or object at the top has a line of its own."""
    parts = []
    for key, value in results.items():
        if isinstance(value, dict):
            inner, (begin, end) = [f"  {json.dumps(name)}: {_compact(row)}" for name, row in value.items()], "{}"
        elif isinstance(value, list):
            inner, (begin, end) = [f"  {_compact(row)}" for row in value], "[]"
        else:
            parts.append(f" {json.dumps(key)}: {_compact(value)}")
            continue
        parts.append(f" {json.dumps(key)}: {begin}\n" + ",\n".join(inner) + f"\n {end}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
