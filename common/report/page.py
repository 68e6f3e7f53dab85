"""Parts of a page: figures as inline SVG, numbers as text, word alignments and the geometry of a timeline."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

from markupsafe import Markup, escape

from common import progress
from common.json_files import Row
from common.report.plots import GRID, INK, MUTED, PALETTE, PAPER, render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--page)"} | {
    light: f"var(--c{i})" for i, (light, _) in enumerate(PALETTE)
}


def render_page(template: str, **values: object) -> str:
    """A page of `common/report/templates`, with this module's number formats as filters."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("common.report"),
        autoescape=True,  # transcripts and names come from a corpus
        undefined=jinja2.ChainableUndefined,  # a number that is missing is a dash, not an error
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (percent, points, number, clock, interval)}
    return environment.get_template(template).render(palette=PALETTE, **values)


def inline_svg(draw: Callable[[], Figure], name: str, label: str) -> Markup:
    """A figure as an `<svg>` element for a page: text as text, colours by CSS variable, ids prefixed with `name`.

    Args:
        draw: makes the figure.
        name: name that is unique on the page.
        label: alternative text of the figure.
    """
    svg = render_svg(draw)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box, "matplotlib writes a viewBox"
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="{box[0][9:-1]}" '
    head += f'style="max-width:{float(box[1]) * 4 / 3:.0f}px">'
    return Markup(head + _compact(svg[svg.index(">") + 1 :].strip(), name))


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as percent; a dash where there is none."""
    return f"{100 * value:.{digits}f}%" if is_number(value) else "–"


def points(value: float | None) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−") if is_number(value) else "–"


def number(value: float | None, digits: int = 2) -> str:
    """A count with thousands apart, or a decimal number; a dash where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{value:.{digits}f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Two fractions as an interval in percent."""
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%" if bounds and all(map(is_number, bounds)) else "–"


def clock(seconds: float | None) -> str:
    """A duration in the two largest units that it has; a dash where there is none."""
    return progress.clock(seconds) if is_number(seconds) else "–"


def axis_of_time(spans: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], float, list[Row]]:
    """Seconds on an axis whose long pauses are shortened, the axis's length, and the positions of the shortened pauses.

    Otherwise the bars of a run that is resumed the next day would be too narrow to see.
    """
    busy: list[list[float]] = []
    for start, end in sorted(spans):
        if busy and start <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([start, end])
    worked = sum(end - start for start, end in busy) or 1.0
    pauses = [(a[1], b[0]) for a, b in pairwise(busy) if b[0] - a[1] > 0.1 * worked]
    short = 0.02 * worked

    def place(time: float) -> float:
        return time - busy[0][0] - sum(b - a - short for a, b in pauses if b <= time)

    span = place(busy[-1][1]) if busy else 1.0
    return place, span or 1.0, [{"left": (place(b) - short / 2) / (span or 1.0), "seconds": b - a} for a, b in pauses]


def lanes(events: Sequence[Row], place: Callable[[float], float], span: float) -> list[Row]:
    """Bars of one stage; overlapping bars are on separate lanes."""
    ends: list[float] = []
    bars = []
    for event in events:
        start, end = event["started"], event["started"] + event["seconds"]
        lane = next((i for i, last in enumerate(ends) if last <= start + 1e-6), len(ends))
        ends[lane : lane + 1] = [end]
        shard = "" if event["shard"] is None else f" {event['shard']}"
        label = f"{event['stage']}{shard}: {clock(event['seconds'])} on {event['host']}"
        bars.append({"left": place(start) / span, "width": event["seconds"] / span, "lane": lane, "label": label})
    return bars


def _compact(svg: str, name: str) -> str:
    """Matplotlib's SVG body with ids that are unique on a page, roles for colours, and few digits."""
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    ids = dict.fromkeys(re.findall(r' id="([^"]*)"', svg))
    short = {old: f"{name}-{i}" for i, old in enumerate(ids)}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{short[m[1]]}"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', lambda m: f'href="#{short.get(m[1], m[1])}"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", lambda m: f"url(#{short.get(m[1], m[1])})", svg)
    svg = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"(<g[^>]*>)\s*((?:<use [^>]*/>\s*){2,})", _hoist_style, svg)
    return re.sub("|".join(_ROLES), lambda m: _ROLES[m[0]], svg)


def _hoist_style(match: re.Match[str]) -> str:
    """Moves a style that many markers share to their group."""
    styles = set(re.findall(r'style="([^"]*)"', match[2]))
    if len(styles) != 1 or "style=" in match[1]:
        return match[0]
    style = styles.pop()
    return f'{match[1][:-1]} style="{style}">' + match[2].replace(f' style="{style}"', "")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value from a file is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
