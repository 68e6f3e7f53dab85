"""What the release brings for Prometheus and Grafana."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.helm.pods import kind_of, pods_of
from tests.helm.tools import CHART

BOTH = ("--set", "metrics.podMonitor.enabled=true,metrics.rules.enabled=true")
RULES, DASHBOARDS = sorted((CHART / "rules").glob("*.yaml")), sorted((CHART / "dashboards").glob("*.json"))


def dashboards(objects):
    return [o for o in kind_of(objects, "ConfigMap") if "-dashboard-" in o["metadata"]["name"]]


def test_every_stage_and_no_other_step_has_the_port_that_is_scraped(render):
    objects = render(*BOTH)
    (monitor,) = kind_of(objects, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    (policy,) = kind_of(objects, "NetworkPolicy")
    for name, pod in pods_of(objects).items():
        if "-test-" in name:
            continue
        assert selected <= pod["metadata"]["labels"].items()
        ports = [p for c in pod["spec"]["containers"] for p in c.get("ports", []) if p["name"] == endpoint["port"]]
        if not name.endswith("-pod"):
            assert ports == [], name
            continue
        (port,) = ports
        (main,) = [c for c in pod["spec"]["containers"] if c["name"] == "main"]
        settings = next(e["value"] for e in main["env"] if e["name"] == "MOE_ASR_SETTINGS")
        assert settings.splitlines()[0] == f"runtime.metrics_port={port['containerPort']}"
        assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]


def test_settings_of_a_user_win_over_those_of_the_chart(render):
    objects = render("--set-string", "workflow.parameters.settings=runtime.metrics_port=1")
    (main,) = [c for c in pods_of(objects)["asr-pod"]["spec"]["containers"] if c["name"] == "main"]
    settings = next(e["value"] for e in main["env"] if e["name"] == "MOE_ASR_SETTINGS")
    assert settings.splitlines() == ["runtime.metrics_port=9470", "runtime.metrics_port=1"]


def test_monitors_and_rules_come_where_the_cluster_knows_them(render):
    wanted = {"PodMonitor", "PrometheusRule"}
    assert not wanted & {o["kind"] for o in render()}
    assert wanted <= {o["kind"] for o in render("--api-versions", "monitoring.coreos.com/v1")}
    off = ("--set", "metrics.podMonitor.enabled=false,metrics.rules.enabled=false")
    assert not wanted & {o["kind"] for o in render("--api-versions", "monitoring.coreos.com/v1", *off)}


def test_rules_are_those_of_the_files(render):
    made = kind_of(render(*BOTH), "PrometheusRule")
    assert RULES
    assert [rule["spec"] for rule in made] == [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES]


def test_dashboards_are_those_of_the_files(render):
    made = dashboards(render())
    assert len(made) == len(DASHBOARDS) >= 3
    for config_map, path in zip(made, DASHBOARDS, strict=True):
        assert json.loads(config_map["data"][path.name]) == json.loads(path.read_text(encoding="utf-8"))
        assert len(config_map["data"][path.name]) < 1_000_000
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config_map["metadata"]["annotations"] == {"grafana_folder": "moe-asr"}


def test_label_and_folder_of_dashboards_are_values(render):
    settings = "label=dash,labelValue=yes,folderAnnotation=where,folder=Speech,namespace=monitoring"
    made = dashboards(render("--set", ",".join(f"metrics.dashboards.{s}" for s in settings.split(","))))
    assert made
    for config_map in made:
        assert config_map["metadata"]["namespace"] == "monitoring"
        assert config_map["metadata"]["labels"]["dash"] == "yes"
        assert config_map["metadata"]["annotations"] == {"where": "Speech"}


@pytest.mark.parametrize("kind", ["podMonitor", "rules"])
def test_labels_by_which_prometheus_selects_are_values(render, kind):
    objects = render(*BOTH, "--set", f"metrics.{kind}.labels.release=prometheus")
    chosen = [o for o in objects if o["metadata"].get("labels", {}).get("release") == "prometheus"]
    assert {o["kind"] for o in chosen} == {{"podMonitor": "PodMonitor", "rules": "PrometheusRule"}[kind]}


def test_without_metrics_nothing_of_them_is_left(render):
    objects = render("--set", "metrics.enabled=false", *BOTH)
    assert not {"PodMonitor", "PrometheusRule"} & {o["kind"] for o in objects}
    assert not dashboards(objects)
    assert not any(c.get("ports") for pod in pods_of(objects).values() for c in pod["spec"]["containers"])
    (policy,) = kind_of(objects, "NetworkPolicy")
    assert policy["spec"]["ingress"] == []
