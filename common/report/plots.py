"""Figures of a run: training curves, confusion, cluster map, expert load and error rates, for files and for the report.

A figure is drawn once, in ink colours that stand for roles. `plot_*` writes it as PNG and SVG on white paper;
`common.report.page` replaces the roles by CSS variables, so that the same drawing reads on a light and on a dark page.
Categories differ by colour, by marker shape and by a label: no reading depends on colour alone.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.json_files import Row, read_object, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (on white, on a dark page): at least 3:1 against the page, told apart under deuteranopia and protanopia.
PALETTE = (
    ("#0b5fa5", "#6cb0f0"),
    ("#d9650f", "#f58a4b"),
    ("#12877a", "#3ecfa0"),
    ("#6b2a6e", "#c75a86"),
    ("#8a63d2", "#f5dd80"),
    ("#8f2d14", "#c06a2a"),
    ("#30343b", "#e6e8eb"),
    ("#489cb4", "#3f78d6"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, MUTED, GRID, PAPER = "#1c1e21", "#5b616a", "#dcdfe4", "#fefefe"

WIDTH = 4.6  # inches: one column of a paper, and a phone without unreadable type
CURVE_POINTS = 300
LEGEND_ENTRIES = 8
PANELS = 16
LABEL = 26  # characters of a name in a figure


def render_svg(draw: Callable[[], Figure]) -> str:
    """A figure as an SVG document without background, its text as text."""
    with _styled():
        buffer = io.StringIO()
        _savefig(draw(), buffer, "svg", "none")
    return buffer.getvalue()


def plot_clusters(cluster: Path, out: Path) -> list[Path]:
    """Draw the cluster map of a cluster stage's folder into `out`; returns the PNG and SVG files written."""
    rows = read_rows(cluster / "projection.jsonl")
    return _write(out, {f"clusters_by_{name}": partial(draw_map, rows, name) for name in ("cluster", "etiology")})


def plot_gating(gate: Path, out: Path) -> list[Path]:
    """Draw a gate's confusion, calibration and training into `out`; returns the PNG and SVG files written."""
    report = read_object(gate / "report.json")
    confusion = partial(draw_confusion, report["confusion"], report["labels"])
    reliability = partial(draw_reliability, report["reliability"])
    training = partial(draw_training, read_rows(gate / "metrics.jsonl"))
    return _write(out, {"gate_confusion": confusion, "gate_reliability": reliability, "gate_training": training})


def plot_experts(experts: Sequence[Path], out: Path) -> list[Path]:
    """Draw the losses of every expert into `out`; returns the PNG and SVG files written, none without experts."""
    if not experts:
        return []
    return _write(out, {"experts_training": partial(draw_experts, [expert_curves(path) for path in experts])})


def plot_asr(asr: Path, out: Path) -> list[Path]:
    """Draw the joint training's curves, expert load, routing and error rates into `out`; returns the files written."""
    figures = {"asr_training": partial(draw_training, read_rows(asr / "metrics.jsonl"))}
    if len(load := read_object(asr / "report.json").get("load") or ()) > 1:
        figures["asr_expert_load"] = partial(draw_load, load)
    figures["asr_wer_by_etiology"] = partial(draw_rates, read_object(asr / "summary.json")["by_etiology"])
    if shares := routing(read_rows(asr / "predictions.jsonl")):
        figures["asr_routing"] = partial(draw_routing, shares)
    return _write(out, figures)


def expert_curves(expert: Path) -> tuple[str, list[Row]]:
    """The name and the metrics of one expert's folder."""
    name = read_object(expert / "report.json")["cluster"]
    return "shared expert" if name == "shared" else f"expert {name}", read_rows(expert / "metrics.jsonl")


def routing(rows: Iterable[Row]) -> dict[str, list[float]]:
    """The mean weight of each expert by etiology, from predictions; empty when none carries its routing."""
    total: dict[str, Counter[int]] = defaultdict(Counter)
    count: Counter[str] = Counter()
    for row in rows:
        if row.get("experts"):
            name = row.get("etiology") or "unknown"
            count[name] += 1
            for expert, weight in zip(row["experts"], row["weights"], strict=True):
                total[name][int(expert)] += weight
    width = 1 + max((expert for weights in total.values() for expert in weights), default=-1)
    return {name: [total[name][e] / count[name] for e in range(width)] for name in sorted(total)}


def draw_map(rows: Sequence[Row], field: str) -> Figure:
    """A scatter of a projection by `cluster` or `etiology`; noise that was assigned to a cluster is hollow."""
    figure = _figure(4.4)
    ax = figure.subplots()
    size = 3.6 if len(rows) < 1_000 else 2.2  # points
    names = _categories([_name(row, field) for row in rows], by_number=field == "cluster")
    for i, (name, members) in enumerate(names.items()):
        colour, marker = PALETTE[i % len(PALETTE)][0], MARKERS[i % len(MARKERS)]
        chosen = [row for row in rows if _name(row, field) in members]
        for hollow in (True, False):
            xy = [(row["x"], row["y"]) for row in chosen if bool(row.get("noise")) == hollow]
            face = "none" if hollow else colour
            ax.plot(*_columns(xy), ls="", marker=marker, ms=size, mfc=face, mec=colour, mew=0.7, alpha=0.8)
        ax.plot([], [], ls="", marker=marker, ms=5, color=colour, label=_short(name))
        if field == "cluster" and chosen:
            x, y = (sorted(values)[len(values) // 2] for values in _columns([(row["x"], row["y"]) for row in chosen]))
            disc = {"boxstyle": "circle,pad=0.18", "fc": PAPER, "ec": colour, "alpha": 0.9}
            ax.text(x, y, name, ha="center", va="center", fontweight="bold", bbox=disc)
    ax.set(xticks=[], yticks=[], xlabel="projection, first axis", ylabel="second axis")
    ax.grid(False)
    ax.set_aspect("equal", adjustable="datalim")
    longest = max(map(len, names), default=0)
    columns = 4 if longest <= 4 else 3 if longest <= 14 else 2
    figure.legend(loc="outside lower center", ncols=columns, title=field, handletextpad=0.2, columnspacing=1.2)
    return figure


def draw_confusion(counts: Sequence[Sequence[int]], labels: Sequence[object]) -> Figure:
    """A gate's confusion: rows are the clusters, columns the gate's choices, the tint is a row's share."""
    shares = [[n / max(1, sum(row)) for n in row] for row in counts]
    texts = [[f"{n}" if n else "" for n in row] for row in counts]
    figure = _figure(min(WIDTH, 1.6 + 0.42 * len(labels)))
    names = [str(label).removeprefix("cluster ") for label in labels]
    _heat(figure.subplots(), shares, texts, names, names, square=True)
    figure.axes[0].set(xlabel="gate's choice", ylabel="cluster")
    return figure


def draw_reliability(bins: Sequence[Row]) -> Figure:
    """Accuracy over confidence in bins; a calibrated gate lies on the diagonal, marker area follows the count."""
    figure = _figure(3.4)
    ax = figure.subplots()
    filled = [b for b in bins if b["count"]]
    most = max((b["count"] for b in filled), default=1)
    ax.plot([0, 1], [0, 1], color=MUTED, ls="--", lw=1)
    xs, ys = _columns([(b["confidence"], b["accuracy"]) for b in filled])
    ax.plot(xs, ys, color=PALETTE[0][0], lw=1)
    ax.scatter(
        xs, ys, s=[18 + 120 * b["count"] / most for b in filled], color=PALETTE[0][0], alpha=0.75, lw=0, zorder=3
    )
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
    ax.set_aspect("equal", anchor="W")
    return figure


def draw_training(rows: Sequence[Row]) -> Figure:
    """Loss over steps for train and dev, and dev WER below it where it was decoded."""
    wer = [(row["step"], row["wer"]) for row in rows if row.get("split") == "dev" and row.get("wer") is not None]
    figure = _figure(4.4 if wer else 2.8)
    axes = figure.subplots(2 if wer else 1, sharex=True, squeeze=False)[:, 0]
    _losses(axes[0], rows)
    axes[0].set_ylabel("loss")
    axes[0].legend(ncols=2, loc="upper right")
    if wer:
        axes[1].plot(*_columns(wer), color=PALETTE[1][0], marker="s", ms=4, lw=1.2)
        axes[1].set(ylabel="dev WER", ylim=(0, None))
        axes[1].yaxis.set_major_formatter(_percent)
    axes[-1].set_xlabel("step")
    return figure


def draw_experts(curves: Sequence[tuple[str, Sequence[Row]]], limit: float | None = None) -> Figure:
    """One small panel of losses per expert, the first 16; the loss axis ends at `limit` or at the highest loss."""
    shown = curves[:PANELS]
    lines = math.ceil(len(shown) / 2)
    figure = _figure(0.7 + 1.25 * lines)
    panels = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (title, rows) in zip(panels, shown, strict=False):
        _losses(panel, rows)
        panel.set_title(title, loc="left", fontsize=9, color=INK)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    panels[0].set_ylim(0, limit)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.supxlabel("step", fontsize=9)
    return figure


def draw_load(load: Sequence[float]) -> Figure:
    """The share of routing weight that each expert received; dashed: an even share."""
    figure = _figure(0.9 + 0.26 * len(load))
    ax = figure.subplots()
    ax.barh(range(len(load)), load, color=PALETTE[0][0], height=0.62)
    ax.axvline(1 / len(load), color=INK, ls="--", lw=1)
    for i, share in enumerate(load):
        ax.text(1.02, i, f"{share:.1%}", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
    ax.set(yticks=range(len(load)), xlabel="share of routing weight", ylabel="expert")
    ax.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
    ax.xaxis.set_major_formatter(_percent)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    return figure


def draw_routing(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Which etiology uses which expert: mean routing weight, rows sum to one."""
    texts = [[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares.values()]
    figure = _figure(1.0 + 0.36 * len(shares))
    most = max(max(row) for row in shares.values())
    tints = [[share / most for share in row] for row in shares.values()]
    _heat(figure.subplots(), tints, texts, range(len(texts[0])), list(shares))
    figure.axes[0].set_xlabel("expert (mean weight, %)")
    return figure


def draw_rates(by_etiology: Mapping[str, Row]) -> Figure:
    """WER before and after for each etiology, with the interval of the rate after."""
    names = sorted(by_etiology, key=lambda name: -by_etiology[name]["wer_after"])
    figure = _figure(1.1 + 0.34 * len(names))
    ax = figure.subplots()
    for i, name in enumerate(names):
        row = by_etiology[name]
        if row.get("wer_interval_after"):
            ax.plot(row["wer_interval_after"], [i, i], color=PALETTE[0][0], lw=4, alpha=0.35, solid_capstyle="butt")
        ax.plot([row["wer_before"], row["wer_after"]], [i, i], color=MUTED, lw=0.9)
        ax.plot(row["wer_before"], i, ls="", marker="o", ms=6, mfc=PAPER, mec=MUTED, label="_" if i else "before")
        ax.plot(row["wer_after"], i, ls="", marker="o", ms=6, color=PALETTE[0][0], label="_" if i else "after")
    ax.set(
        yticks=range(len(names)),
        yticklabels=list(map(_short, names)),
        xlabel="WER on the test set",
        xlim=(0, None),
    )
    ax.xaxis.set_major_formatter(_percent)
    ax.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@contextmanager
def _styled() -> Iterator[None]:
    """Our style alone, whatever matplotlibrc says, for as long as a figure is drawn and written."""
    import matplotlib

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "moe-asr", "text.parse_math": False, "font.size": 9.5,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.linewidth": 0.7,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "legend.frameon": False, "savefig.dpi": 200,
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a label in a script we lack
        yield


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _savefig(figure: Figure, target: Path | io.StringIO, kind: str, paper: str) -> None:
    stamps: dict[str, None] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(target, format=kind, metadata=stamps, facecolor=paper)


def _write(out: Path, figures: Mapping[str, Callable[[], Figure]]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    with _styled():
        for file in files:
            _savefig(figures[file.stem](), file, file.suffix[1:], "white")
    return files


def _heat(
    ax: Axes,
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    columns: Sequence[object],
    rows: Sequence[object],
    square: bool = False,
) -> None:
    """Tinted cells; the tint stays light enough for the text on it, on either page."""
    from matplotlib.patches import Rectangle

    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            tint = 0.55 * min(1.0, max(0.0, share))
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=PALETTE[0][0], alpha=tint, lw=0))
            if len(row) <= 12:
                ax.text(x, y, texts[y][x], ha="center", va="center", fontsize=8.5)
    every = max(1, math.ceil(len(columns) / 12))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set_xticks(range(0, len(columns), every), [_short(name) for name in columns][::every])
    every = max(1, math.ceil(len(rows) / 24))
    ax.set_yticks(range(0, len(rows), every), [_short(name) for name in rows][::every])
    ax.grid(False)
    if square:
        ax.set_aspect("equal", anchor="W")


def _losses(ax: Axes, rows: Sequence[Row]) -> None:
    train, dev = (
        {row["step"]: row["loss"] for row in rows if row.get("split") == split and row.get("loss") is not None}
        for split in ("train", "dev")
    )
    ax.plot(*_columns(_thin(sorted(train.items()))), color=MUTED, lw=0.9, label="train")
    ax.plot(*_columns(sorted(dev.items())), color=PALETTE[0][0], lw=1.2, marker="o", ms=3.5, label="dev")


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal runs of points, at most `CURVE_POINTS` of them."""
    width = math.ceil(len(points) / CURVE_POINTS)
    runs = [points[i : i + width] for i in range(0, len(points), max(1, width))]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _percent(value: float, _position: float) -> str:
    return f"{round(100 * value, 6):g}%"


def _name(row: Row, field: str) -> str:
    value = row.get(field)
    return "unknown" if value is None or value == "" else str(value)


def _categories(names: Sequence[str], by_number: bool) -> dict[str, set[str]]:
    """Label → the names it stands for. Clusters all keep their own; of other names the rarest share one label."""
    counts = Counter(names)
    if by_number:
        return {name: {name} for name in sorted(counts, key=lambda name: (len(name), name))}
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    if len(ranked) <= LEGEND_ENTRIES:
        return {name: {name} for name in ranked}
    kept, rest = ranked[: LEGEND_ENTRIES - 1], ranked[LEGEND_ENTRIES - 1 :]
    return {name: {name} for name in kept} | {f"{len(rest)} others": set(rest)}


def _short(name: object) -> str:
    """A label that fits; the space before it keeps matplotlib from dropping one that starts with an underscore."""
    text = f" {name}"
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"
