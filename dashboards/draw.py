"""`python -m dashboards.draw URL FOLDER`: the panels' queries against a Prometheus, plotted without Grafana."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.figure import Figure

from dashboards.__main__ import DASHBOARDS
from dashboards.client import Series, query_range
from dashboards.panels import WIDTH, Dashboard, Panel
from dashboards.promql import EVERYTHING, expand

NOTE = "The panels' queries, asked of Prometheus and plotted by matplotlib: not Grafana's own drawing."
SCALE = {
    "bytes": (2**20, "MiB"),
    "Bps": (2**20, "MiB/s"),
    "percentunit": (0.01, "%"),
    "watt": (1, "W"),
    "short": (1, ""),
}
LEGENDS = 6  # lines of a legend at most
PAGE = 19.0  # inches


def ask_panel(url: str, panel: Panel, start: float, end: float, workflow: str) -> list[tuple[str, Series]]:
    """(legend, series) of all of a panel's queries, the largest first."""
    seconds = max(60, round(end - start))
    values = EVERYTHING | {"workflow": workflow, "__range": f"{seconds}s"}
    values["__rate_interval"] = f"{max(20, seconds // 20)}s"
    found = []
    for query in panel.queries:
        for series in query_range(url, expand(query.expr, values), start, end, max(1.0, seconds / 240)):
            found.append((legend(query.legend, series[0]), series))
    return sorted(found, key=lambda one: -max(value for _, value in one[1][1] if math.isfinite(value)))


def legend(template: str, labels: dict[str, str]) -> str:
    """The legend as Grafana would write it."""
    text = template or " ".join(f"{name}={value}" for name, value in sorted(labels.items()) if value)
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    while "{{" in text:  # a label that the series lacks
        before, _, rest = text.partition("{{")
        text = before + rest.partition("}}")[2]
    return " ".join(text.split())[:44]


def draw(url: str, dashboard: Dashboard, start: float, end: float, *, workflow: str = ".*", note: str = "") -> Figure:
    """The whole dashboard as one figure, laid out as in Grafana.

    Args:
        url: of Prometheus.
        start, end: seconds since 1970.
        workflow: for `$workflow`.
        note: further words for the heading.
    """
    lines = _lines(dashboard)
    heights = [1.1 if all(panel.kind == "stat" for panel in line) else 2.4 for line in lines]
    above, between = 1.35, 0.75  # inches
    total = above + sum(heights) + between * len(lines)
    figure = Figure(figsize=(PAGE, total))
    figure.text(0.02, 1 - 0.15 / total, f"{dashboard.title}\n{NOTE}\n{note}".rstrip(), fontsize=12, va="top")
    top = total - above
    for line, height in zip(lines, heights, strict=True):
        column, top = 0, top - height
        for panel in line:
            wide = 0.16 if panel.kind == "bargauge" else 0.045  # of the page, for the labels on the left
            left, right = column / WIDTH + wide, (column + panel.width) / WIDTH - 0.01
            axes = figure.add_axes((left, top / total, right - left, height / total))
            _draw_panel(axes, panel, ask_panel(url, panel, start, end, workflow), start)
            column += panel.width
        top -= between
    return figure


def _lines(dashboard: Dashboard) -> list[list[Panel]]:
    """Panels in lines of at most 24 columns; every row begins a new one."""
    lines: list[list[Panel]] = []
    for row in dashboard.rows:
        lines.append([])
        for panel in row.panels:
            if sum(one.width for one in lines[-1]) + panel.width > WIDTH:
                lines.append([])
            lines[-1].append(panel)
    return lines


def _draw_panel(axes: Any, panel: Panel, found: list[tuple[str, Series]], start: float) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    factor, unit = SCALE.get(panel.unit, (1, panel.unit))
    if not found:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="grey", transform=axes.transAxes)
        axes.set_axis_off()
        return
    if panel.kind != "timeseries":
        _draw_values(axes, panel, found, factor, unit)
        return
    for name, (_, points) in found:
        points = with_gaps(points)
        axes.plot([at - start for at, _ in points], [value / factor for _, value in points], label=name, lw=1.3)
    axes.set_ylabel(unit)
    axes.set_xlabel("seconds", loc="right", fontsize=8, labelpad=0)
    axes.grid(alpha=0.3)
    axes.margins(y=0.1)
    if "max" in panel.extra:
        axes.set_ylim(panel.extra["min"] / factor, 1.03 * panel.extra["max"] / factor)
    elif "min" in panel.extra:
        axes.set_ylim(bottom=panel.extra["min"])
    handles, names = axes.get_legend_handles_labels()
    if len(names) > LEGENDS:
        names[LEGENDS - 1] = f"… {len(names) - LEGENDS + 1} more"
    axes.legend(handles[:LEGENDS], names[:LEGENDS], fontsize=7, loc="upper right", framealpha=0.7)


def with_gaps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with a break wherever none was seen for over a minute."""
    steps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    found = points[:1]
    for step, point in zip(steps, points[1:], strict=True):
        found += [(point[0], math.nan)] if step > max(60, 1.5 * min(steps)) else []
        found.append(point)
    return found


def _draw_values(axes: Any, panel: Panel, found: list[tuple[str, Series]], factor: float, unit: str) -> None:
    """The last value of each series: as text, or as bars."""
    last = {name: points[-1][1] / factor for name, (_, points) in found}
    if panel.kind == "bargauge":
        bars = axes.barh(list(last), list(last.values()), color="tab:blue")
        axes.bar_label(bars, fmt="%.4g", fontsize=7, padding=2)
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        return
    axes.set_axis_off()
    large = panel.kind == "stat" and len(last) <= 3
    text = "\n".join(name if panel.kind == "table" else f"{value:.4g} {unit}  {name}" for name, value in last.items())
    axes.text(0.02, 0.9, text, va="top", fontsize=15 if large else 8, transform=axes.transAxes, wrap=True)


@click.command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--minutes", type=float, default=15, show_default=True, help="How far to look back.")
@click.option("--workflow", default=".*", help="Only this one's series.")
@click.option("--note", default="", help="Further words for the heading.")
def main(url: str, folder: Path, minutes: float, workflow: str, note: str) -> None:
    """Plots every dashboard's queries, asked of the Prometheus at URL, into FOLDER."""
    matplotlib.use("Agg")
    end = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    for name, dashboard in DASHBOARDS.items():
        path = folder / f"dashboard-{Path(name).stem}.png"
        figure = draw(url.rstrip("/"), dashboard, end - 60 * minutes, end, workflow=workflow, note=note)
        figure.savefig(path, dpi=75)
        click.echo(path)


if __name__ == "__main__":
    main()
