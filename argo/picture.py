"""A picture of a workflow as it ran: `python -m argo.picture workflow.json docs/images/workflow.png`.

Above, the DAG: one box per piece with its time, its pods and whether it came from the cache; below, when each pod ran.
The JSON is what `kubectl get workflow NAME -o json` prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argo.progress import Piece, phase, pieces

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"Succeeded": "#2e7d32", "Failed": "#c62828", "Error": "#c62828", "Running": "#1565c0", "Pending": "#9e9e9e"}
HIT = "#6a1b9a"
OTHER = "#9e9e9e"


def draw(workflow: Mapping[str, Any], out: Path) -> None:
    """Writes the picture of a Workflow object.

    Args:
        out: .png or .svg.

    Raises:
        ValueError: the workflow has no step yet.
    """
    from matplotlib.figure import Figure

    found = [piece for piece in pieces(workflow) if piece.started is not None]
    if not found:
        raise ValueError(f"workflow {workflow['metadata']['name']} has no step that has begun")
    columns = by_column(found)
    tall = max(len(column) for column in columns)
    rows = sum(max(1, len(piece.tries)) for piece in found)
    figure = Figure(figsize=(1.15 * len(columns) + 0.6, 0.95 * tall + 0.24 * rows + 1.6), layout="constrained")
    top, below = figure.subplots(2, 1, height_ratios=[0.95 * tall + 0.3, 0.24 * rows + 0.8])
    start = min(piece.started or 0.0 for piece in found)
    took = max(piece.finished or piece.started or start for piece in found) - start
    figure.suptitle(f"{workflow['metadata']['name']}: {phase(workflow)} in {took:.0f} s", fontsize=11)
    draw_boxes(top, columns)
    draw_times(below, found, start)
    figure.savefig(out, dpi=130)


def by_column(found: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces of one task above each other, tasks in the order of their start."""
    columns: dict[str, list[Piece]] = {}
    for piece in found:
        columns.setdefault(piece.task, []).append(piece)
    return [sorted(column, key=lambda one: one.label) for column in columns.values()]


def draw_boxes(axes: Axes, columns: Sequence[Sequence[Piece]]) -> None:
    """The DAG, from left to right."""
    axes.set_axis_off()
    axes.set_xlim(-0.55, len(columns) - 0.45)
    tall = max(len(column) for column in columns)
    axes.set_ylim(-tall / 2 - 0.1, tall / 2 + 0.1)
    for x, column in enumerate(columns):
        for y, piece in places(column):
            axes.text(
                x,
                y,
                f"{piece.label}\n{describe(piece)}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white",
                bbox={"boxstyle": "round,pad=0.45", "facecolor": colour(piece), "edgecolor": "none"},
            )
            for after, _ in places(columns[x + 1]) if x + 1 < len(columns) else []:
                arrow = {"arrowstyle": "-|>", "color": "#888888", "shrinkA": 0, "shrinkB": 0}
                axes.annotate("", xy=(x + 0.57, after), xytext=(x + 0.43, y), arrowprops=arrow)


def places(column: Sequence[Piece]) -> list[tuple[float, Piece]]:
    """Height of each piece of a column, around 0."""
    return [((len(column) - 1) / 2 - i, piece) for i, piece in enumerate(column)]


def describe(piece: Piece) -> str:
    """`42 s`, `42 s, 2 tries` or `cache hit`."""
    if piece.hit:
        return "cache hit"
    seconds = f"{piece.finished - piece.started:.0f} s" if piece.finished and piece.started else piece.phase
    return seconds if len(piece.tries) < 2 else f"{seconds}, {len(piece.tries)} tries"


def colour(piece: Piece) -> str:
    """By state; cache hits have one of their own."""
    return HIT if piece.hit else COLOURS.get(piece.phase, OTHER)


def draw_times(axes: Axes, found: Sequence[Piece], start: float) -> None:
    """One bar per pod, from its creation to its end; a diamond for a cache hit."""
    names: list[str] = []
    for piece in found:
        if not piece.tries:
            axes.plot((piece.started or start) - start, len(names), marker="D", markersize=5, color=colour(piece))
            names.append(piece.label)
        for number, one in enumerate(piece.tries):
            begun = (one.started or start) - start
            length = (one.finished or one.started or start) - start - begun
            axes.barh(len(names), max(length, 0.5), left=begun, height=0.6, color=COLOURS.get(one.phase, OTHER))
            names.append(piece.label if len(piece.tries) == 1 else f"{piece.label}, try {number + 1}")
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
