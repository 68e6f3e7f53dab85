"""gate.html: what `common.evaluation.gate_run` found, in one file that needs no network and runs no script."""

from __future__ import annotations

from functools import partial

from common import __version__
from common.evaluation.gate_run import JOINT, headline
from common.json_files import Row
from common.report import plots
from common.report.page import inline_svg, percent, render_page

LAYERS = {-1: "last", 0: "convolutions"}


def render_gate(found: Row) -> str:
    """The page of `examine_gate`'s result; the same result gives the same page."""
    shown = [row for row in found["calibration"] or () if row["split"] != "dev"]
    return render_page(
        "gate.html",
        found=found,
        version=__version__,
        headline=headline(found),
        reliability=[_reliability(row, number) for number, row in enumerate(shown)],
        confusion=[_confusion(row) for row in shown if (row["gate"], row["split"]) == (JOINT, "test")],
        layer=lambda layer: LAYERS.get(layer, f"block {layer}"),
        experts=lambda count: "none" if count == 0 else str(count),
    )


def _reliability(row: Row, number: int) -> tuple[str, str]:
    error = percent(row["expected_calibration_error"])
    svg = inline_svg(
        partial(plots.draw_reliability, row["reliability"]),
        f"reliability{number}",
        f"Reliability diagram of the gate {row['gate']}, {row['split']}; expected calibration error {error}.",
    )
    return f"{row['gate'].capitalize()}, {row['split']}: error {error}. Area: utterances; dashed: perfect.", svg


def _confusion(row: Row) -> tuple[str, str]:
    svg = inline_svg(
        partial(plots.draw_confusion, row["confusion"], row["labels"]),
        "confusion",
        f"Confusion matrix over {len(row['labels'])} clusters; accuracy {percent(row['accuracy'])}.",
    )
    return "Nearest cluster against first expert, jointly trained gate, test.", svg
