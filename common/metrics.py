"""Metrics of a stage: rows of metrics.jsonl, and the same values for Prometheus when it is asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows to a JSON Lines file as they come.

    Args:
        path: the file; none keeps the rows in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.events: Counter[str] = Counter()

    def log(self, row: dict[str, Any], rates: dict[str, float]) -> None:
        """Adds one row; `rates` (throughput) go to the live metrics only, since they differ between equal runs."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def event(self, name: str) -> None:
        """Counts something that should be rare."""
        self.events[name] += 1

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Starts from the rows of an interrupted run."""
        self.rows = list(rows)
        if self.path is not None:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
