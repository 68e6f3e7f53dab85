"""Grafana dashboards as plain values: panels flow from left to right, 24 columns wide."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from common import telemetry

WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "moe-asr"
Kind = Literal["timeseries", "stat", "bargauge", "table"]


@dataclass(frozen=True, slots=True)
class Query:
    """One query in PromQL and the legend of its series (`{{label}}` is replaced)."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `unit` is Grafana's name of it (`percentunit`, `s`, `bytes`, `short`, …)."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    extra: dict[str, Any] = field(default_factory=dict)  # of fieldConfig.defaults: min, max, decimals, thresholds

    @property
    def height(self) -> int:
        """Rows of the grid."""
        return 5 if self.kind == "stat" else 8


@dataclass(frozen=True, slots=True)
class PanelRow:
    """A heading and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A whole dashboard; `uid` is what links and the chart know it by."""

    uid: str
    title: str
    description: str
    rows: tuple[PanelRow, ...]
    prices: bool = False

    @property
    def panels(self) -> list[Panel]:
        """All panels, in order."""
        return [panel for row in self.rows for panel in row.panels]


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard in Grafana's format."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": [TAG],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "moe-asr",
                "tags": [TAG],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
            }
        ],
        "templating": {"list": variables(prices=dashboard.prices)},
        "annotations": {"list": []},
        "panels": place(dashboard.rows),
    }


def variables(*, prices: bool) -> list[dict[str, Any]]:
    """$datasource $namespace $workflow $stage, and $gpu_hour_price where costs are shown."""
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"}
    chosen = [
        source | {"refresh": 1, "hide": 0, "multi": False, "includeAll": False, "options": [], "current": {}},
        _label_values("namespace", "Namespace", "moe_asr:pod_workflow:info", "namespace"),
        _label_values("workflow", "Workflow", 'moe_asr:pod_workflow:info{namespace=~"$namespace"}', "workflow"),
        _label_values("stage", "Stage", f'{telemetry.RUNNING}{{namespace=~"$namespace"}}', "stage"),
    ]
    if prices:
        price = {"text": "2.5", "value": "2.5"}
        chosen.append(
            {
                "type": "textbox",
                "name": "gpu_hour_price",
                "label": "Price of a GPU hour",
                "query": "2.5",
                "current": price,
                "options": [price | {"selected": True}],
                "hide": 0,
            }
        )
    return chosen


def _label_values(name: str, label: str, series: str, of: str) -> dict[str, Any]:
    query = f"label_values({series}, {of})"
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "options": [],
        "hide": 0,
    }


def place(rows: Sequence[PanelRow]) -> list[dict[str, Any]]:
    """Panels with their places on the grid and their numbers."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        placed.append(_heading(row.title, len(placed) + 1, y))
        y, x, tallest = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            placed.append(_panel(panel, len(placed) + 1, x, y))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return placed


def _heading(title: str, number: int, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {"type": "row", "id": number, "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    instant = panel.kind != "timeseries"
    targets = [
        {
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend or "__auto",
            "refId": chr(ord("A") + index),
            "instant": instant,
            "range": not instant,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for index, query in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "id": number,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": {"unit": panel.unit, **_drawing(panel.kind), **panel.extra}, "overrides": []},
        "options": OPTIONS[panel.kind],
        "targets": targets,
    }


def _drawing(kind: Kind) -> dict[str, Any]:
    if kind != "timeseries":
        return {}
    return {
        "custom": {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    }


OPTIONS: dict[Kind, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "mean"], "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
        "orientation": "auto",
    },
    "bargauge": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "displayMode": "gradient",
        "orientation": "horizontal",
        "showUnfilled": True,
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}
