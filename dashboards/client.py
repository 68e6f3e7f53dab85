"""Asks a Prometheus over HTTP."""

from __future__ import annotations

import json
import math
import urllib.parse
import urllib.request
from typing import Any

Series = tuple[dict[str, str], list[tuple[float, float]]]


def ask(url: str, path: str, **parameters: str | float) -> Any:
    """The `data` of an answer of the API.

    Args:
        url: of the server.
        path: below /api/v1/.

    Raises:
        OSError: it does not answer, or refuses the query.
    """
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as answer:
        return json.load(answer)["data"]


def query_range(url: str, expr: str, start: float, end: float, step: float) -> list[Series]:
    """(labels, points in seconds and values) of every series that has a value that is a number.

    Args:
        start, end, step: seconds; the first two since 1970.
    """
    data = ask(url, "query_range", query=expr, start=start, end=end, step=step)
    found = []
    for one in data["result"]:
        points = [(float(at), float(value)) for at, value in one["values"]]
        if any(math.isfinite(value) for _, value in points):
            found.append((one["metric"], points))
    return found
