"""Metrics of a stage: rows of metrics.jsonl, and the same values as live metrics for Prometheus."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common import telemetry
from common.pipeline.attempts import Activity
from common.telemetry import Metric, StageTelemetry, Telemetry

# Columns of a row that are shown live; those of an evaluation too where they have a split.
LIVE: dict[str, Metric] = {
    "loss": telemetry.LOSS,
    "lr": telemetry.LEARNING_RATE,
    "grad_norm": telemetry.GRADIENT_NORM,
    "entropy": telemetry.ENTROPY,
    "balance": telemetry.BALANCE,
}


class MetricsLog:
    """Appends rows to a JSON Lines file.

    Args:
        path: the file; None keeps the rows in memory only.
        live: live metrics that also receive the values; by default none.
        activity: current activity of the stage, updated by `progress`.
    """

    def __init__(self, path: Path | None, live: StageTelemetry | None = None, activity: Activity | None = None) -> None:
        self.path = path
        self.activity = activity or Activity()
        self.live = live or Telemetry().stage("")
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        """Adds one row."""
        self.rows.append(row)
        self._show(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def progress(self, done: int, total: int, *, name: str = "training", unit: str = "steps") -> None:
        """Reports the number of finished and of all units; in a workflow's pod also to Argo, which sums over its pods.

        Args:
            name: name of the activity, for `moe-asr status`.
            unit: name of the counted units, in the plural.
        """
        self.activity.begin(name, done, total, unit)
        self.live.progress(done, total)
        if (path := os.environ.get("ARGO_PROGRESS_FILE")) and 0 <= done <= total > 0:
            with contextlib.suppress(OSError):  # a display is no reason to fail
                Path(path).write_text(f"{done}/{total}\n", encoding="utf-8")

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Restores the rows of an interrupted run."""
        self.rows = list(rows)
        if self.path is not None:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _show(self, row: dict[str, Any]) -> None:
        for column, metric in LIVE.items():
            if column in row:
                labels = {"split": str(row["split"])} if "split" in metric.labels else {}
                self.live.set(metric, row[column], **labels)
        if row.get("split") == "dev" and "wer" in row:
            self.live.set(telemetry.WER, row["wer"], split="dev", etiology="all", model="after")
