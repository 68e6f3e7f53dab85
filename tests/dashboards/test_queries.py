"""A real Prometheus scrapes a real run and texts in the exporters' form: every query of every panel has an answer."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config import to_yaml
from dashboards.files import DASHBOARDS
from stages.local_runner import Run, run_one
from tests.dashboards.prometheus import EVERYTHING, ask, expand, exporters, job, prometheus, query_range
from tests.servers import free_port
from tests.stages.test_local_runner import micro_config

TEXTS = Path(__file__).parent / "exporters"
WORKFLOW = "demo-x7k2p"
PANELS = [(name, panel) for name, dashboard in DASHBOARDS.items() for panel in dashboard.panels]


def exporter_texts():
    """One GPU for each of two pods, and what the cluster says of them."""
    dcgm = (TEXTS / "dcgm.prom").read_text()
    return {
        "/dcgm": dcgm.replace("@POD", "demo-asr-1").replace("-@", "-a"),
        "/dcgm-exported": dcgm.replace("@POD", "demo-experts-0").replace("-@", "-b"),
        "/pods": (TEXTS / "kube-state-metrics.prom").read_text(),
        "/argo": (TEXTS / "argo.prom").read_text(),
    }


@pytest.fixture(scope="module")
def observed(tmp_path_factory, micro_model, tones):
    """(URL, start, end, folder) of a Prometheus that has seen a stage from beginning to end."""
    folder = tmp_path_factory.mktemp("observed")
    changes = {"asr__epochs": 4, "asr__pretrain": "none"}  # two stages only: extract and asr
    config = micro_config(folder / "store", micro_model, tones, **changes)
    (folder / "config.yaml").write_text(to_yaml(config))
    run = Run(config)
    run_one(run, run.plan().planned[0], stopping=lambda: False)
    port = free_port()
    with exporters(exporter_texts()) as served:
        jobs = [
            job("moe-asr", port, namespace="speech", pod="demo-asr-1"),
            job("dcgm", served, "/dcgm", honor_labels=True),
            job("dcgm-by-default", served, "/dcgm-exported", namespace="gpu-operator", pod="dcgm-exporter-abcde"),
            job("kube-state-metrics", served, "/pods", honor_labels=True),
            job("argo", served, "/argo", namespace="argo", pod="workflow-controller-0"),
        ]
        with prometheus(folder, jobs) as url:
            start = time.time()
            command = ["stages", "asr", "--config", folder / "config.yaml", "--metrics-port", str(port)]
            own = {"MOE_ASR_CACHE": str(folder / "cache")}
            done = subprocess.run(
                [sys.executable, "-m", *command],
                env=os.environ | own,
                capture_output=True,
                text=True,
                cwd=Path(__file__).resolve().parents[2],
            )
            assert done.returncode == 0, done.stderr
            # Rules are evaluated every 15 seconds, and some read what others recorded: they need two rounds.
            time.sleep(max(0, start + 32 - time.time()))
            yield url, start, time.time(), folder


def answers(observed, expr, **values):
    """Series that a panel's query has over the whole run."""
    url, start, end, _ = observed
    return query_range(url, expand(expr, EVERYTHING | values), start, end, 0.5)


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=[f"{name}: {panel.title}" for name, panel in PANELS])
def test_every_query_of_the_panel_returns_data(observed, name, panel):
    empty = [query.expr for query in panel.queries if not answers(observed, query.expr)]
    assert not empty


@pytest.mark.parametrize("name", ["namespace", "workflow", "stage"])
def test_the_variables_find_their_values(observed, name):
    url, start, end, _ = observed
    series = {"stage": "moe_asr_stage_running"}.get(name, "moe_asr:pod_workflow:info")
    values = ask(url, f"label/{name}/values", **{"match[]": series, "start": start, "end": end})
    expected = {"namespace": "speech", "workflow": WORKFLOW, "stage": "asr"}
    assert expected[name] in values


def test_panels_of_another_workflow_are_empty(observed):
    loss = next(panel for _, panel in PANELS if panel.title == "Loss")
    assert not answers(observed, loss.queries[0].expr, workflow="another")
    assert answers(observed, loss.queries[0].expr, workflow=WORKFLOW)


def test_both_spellings_of_the_pod_label_lead_to_the_workflow(observed):
    by_uuid = {labels["UUID"]: labels for labels, _ in answers(observed, "moe_asr:gpu_busy:ratio")}
    assert {uuid: labels["pod"] for uuid, labels in by_uuid.items()} == {
        "GPU-a": "demo-asr-1",
        "GPU-b": "demo-experts-0",
    }
    assert {labels["workflow"] for labels in by_uuid.values()} == {WORKFLOW}
    assert {labels["namespace"] for labels in by_uuid.values()} == {"speech"}


def test_a_gpu_belongs_to_the_stage_that_runs_in_its_pod(observed):
    stages = {labels["stage"] for labels, _ in answers(observed, 'moe_asr:gpu_busy:ratio{UUID="GPU-a"}')}
    assert "asr" in stages
    assert {labels["stage"] for labels, _ in answers(observed, 'moe_asr:gpu_busy:ratio{UUID="GPU-b"}')} == {"none"}


def test_the_last_values_are_seen(observed):
    """The process waits for one more scrape before it ends."""
    series = answers(observed, 'moe_asr_word_error_ratio{split="test",model="after",etiology="all"}')
    assert len(series) == 1 and math.isfinite(series[0][1][-1][1])
    done = answers(observed, 'moe_asr_tasks_total{stage="asr",result="run"}')
    assert done[0][1][-1][1] == 1


def test_they_are_also_in_the_manifest(observed):
    (path,) = (observed[3] / "store" / "artifacts" / "asr").glob("*/manifest.json")
    metrics = json.loads(path.read_text())["metrics"]
    wer = 'moe_asr_word_error_ratio{etiology="all",model="after",split="test"}'
    assert metrics["live"][wer] == metrics["wer_after"]
    assert metrics["live"]["moe_asr_samples_total"] > 0


def test_all_rules_evaluate(observed):
    groups = ask(observed[0], "rules")["groups"]
    assert {rule["name"]: rule["lastError"] for g in groups for rule in g["rules"] if rule.get("lastError")} == {}
    assert {g["name"] for g in groups} >= {"moe-asr-pods-and-gpus", "moe-asr-training", "moe-asr-gpu-alerts"}
