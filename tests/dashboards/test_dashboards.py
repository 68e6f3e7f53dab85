"""Every panel of the dashboards says what it shows, and its queries name what exists."""

import json
import re

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from common.telemetry import MEMORY, METRICS
from dashboards.files import CHART, DASHBOARDS, generated
from dashboards.panels import TAG, WIDTH, to_json
from reference.__main__ import ROOT
from tests.dashboards.prometheus import EVERYTHING, expand

ALL = [to_json(dashboard) for dashboard in DASHBOARDS.values()]


def test_nothing_else_lies_beside_the_generated_files():
    folders = (ROOT / CHART / name for name in ("dashboards", "rules"))
    files = {path.relative_to(ROOT) for folder in folders for path in folder.iterdir()}
    assert files == set(generated())


@pytest.mark.parametrize("dashboard", ALL, ids=list(DASHBOARDS))
def test_every_panel_has_title_description_unit_and_queries(dashboard):
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) >= 10
    for panel in panels:
        assert panel["title"] and panel["targets"]
        assert len(panel["description"]) > 20 and panel["description"].endswith((".", "currency."))
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("dashboard", ALL, ids=list(DASHBOARDS))
def test_panels_neither_overlap_nor_leave_the_grid(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < WIDTH
        taken |= cells


@pytest.mark.parametrize("dashboard", ALL, ids=list(DASHBOARDS))
def test_variables_and_links(dashboard):
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names[:4] == ["datasource", "namespace", "workflow", "stage"]
    assert TAG in dashboard["tags"] and dashboard["links"][0]["tags"] == [TAG] and dashboard["links"][0]["includeVars"]
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps([panel.get("targets") for panel in dashboard["panels"]])))
    assert used <= set(names) | {"__range", "__rate_interval", "__interval"}


def lost(before, after, path=""):
    """Paths in `before` that `after` lacks or has otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [missing for name in before for missing in lost(before[name], after.get(name), f"{path}.{name}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [missing for a, b in zip(before, after, strict=True) for missing in lost(a, b, path)]
    return [] if before == after else [path]


@pytest.mark.parametrize("dashboard", ALL, ids=list(DASHBOARDS))
def test_grafanas_own_types_read_all_of_it(dashboard):
    plugins.register_default_plugins()
    again = json.loads(JSONEncoder().encode(GrafanaDashboard.from_json(dashboard)))
    assert set(lost(dashboard, again)) <= {".templating.list.definition"}  # what Grafana's editor shows of a query


def test_dashboards_are_told_apart_by_their_uid():
    assert len({dashboard["uid"] for dashboard in ALL}) == len(ALL) == 3


def test_queries_name_only_metrics_that_exist():
    known = {metric.name for metric in METRICS} | {MEMORY.name}
    known |= {"moe_asr_step_seconds_bucket", "moe_asr_step_seconds_sum"}
    texts = generated().values()
    assert {name for text in texts for name in re.findall(r"\bmoe_asr_[a-z_]+", text)} <= known


def test_every_metric_is_shown_or_used_by_a_rule():
    text = " ".join(generated().values())
    unused = {m.name for m in METRICS if m.name not in text}
    assert unused <= {"moe_asr_store_operations_total"}


def test_all_variables_are_replaced():
    assert "$" not in expand('x{a=~"$namespace",b="${stage}"}[$__rate_interval]', EVERYTHING)
