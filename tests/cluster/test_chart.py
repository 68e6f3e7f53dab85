"""The chart on a real API server: installed by helm, tried by `helm test`, run from its template, upgraded, rolled
back and taken away, in a namespace that lets in only what passes "restricted" Pod Security."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from argo import progress
from common.pipeline.runs import run_record
from stages.extend.extension import added_of
from tests.cluster.lab import BUCKET, NAMESPACE, Lab, kubectl, small_settings, until
from tests.helm.tools import CHART, helm_program

pytestmark = pytest.mark.timeout(1200)
SPACE, RELEASE = "speech-chart", "speech"
TEMPLATE, CACHE = f"{RELEASE}-moe-asr-0.1.0", f"{SPACE}-{RELEASE}-moe-asr-cache"
EXTENSION = f"{RELEASE}-moe-asr-extend-0.1.0"
# Everything that a release could leave behind.
KINDS = (
    "configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,networkpolicies,pods,"
    "workflowtemplates,cronworkflows,workflows,workflowtaskresults"
)


@dataclass
class Release:
    """An installed release: what helm said, and what was there before it."""

    said: str
    before: set[str]
    values: Path


@pytest.fixture(scope="module")
def release(lab: Lab, tmp_path_factory) -> Iterator[Release]:
    kubectl("create", "namespace", SPACE)
    kubectl("label", "namespace", SPACE, "pod-security.kubernetes.io/enforce=restricted")
    try:
        until(lambda: "serviceaccount/default" in kubectl("get", "serviceaccounts", "-n", SPACE, "-o", "name"))
        make_store_secret()
        values = tmp_path_factory.mktemp("chart") / "values.yaml"
        values.write_text(yaml.safe_dump(small_values(lab)), encoding="utf-8")
        before = everything()
        yield Release(helm("install", RELEASE, CHART, "--values", values, "--wait"), before, values)
    finally:
        helm("uninstall", RELEASE, "--ignore-not-found")
        kubectl("delete", "namespace", SPACE)


def helm(*words: str | Path) -> str:
    """What helm says in the test's namespace; logs of its hooks come on the error stream.

    Raises:
        AssertionError: it failed; with what it said.
    """
    program = helm_program()
    assert isinstance(program, Path), program
    done = subprocess.run([program, "--namespace", SPACE, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"helm {words[0]}: {done.stdout[-3000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def make_store_secret() -> None:
    """As the chart's README tells the user to."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    literals = [f"--from-literal={name}={os.environ[name]}" for name in names]
    kubectl("create", "secret", "generic", "moe-asr-store", "-n", SPACE, *literals)


def small_values(lab: Lab) -> dict[str, Any]:
    """A regular mixture of two experts, which needs the fewest pods, in the resources of a test machine."""
    config = lab.tree(asr__pretrain="none")
    return {
        "images": {"registry": lab.registry, "tag": lab.tag},
        "store": {
            "url": f"s3://{BUCKET}/chart",
            "endpointUrl": lab.endpoint,
            "region": "us-east-1",
            "existingSecret": "moe-asr-store",
        },
        "config": config,
        "resources": {
            "gpuStage": {"cpu": "200m", "memoryGi": 2},
            "cpuStage": {"cpu": "200m", "memoryGi": 2},
            "step": {"cpu": "100m", "memoryGi": 1},
        },
        "workflow": {"shmSize": "64Mi", "scratchSize": "2Gi", "parameters": {"settings": small_settings(config)}},
        "argo": {"namespace": NAMESPACE},
    }


def everything() -> set[str]:
    """`kind/namespace/name` of all objects of KINDS in the test's namespace and in none, and of the cache's."""
    line = r"{range .items[*]}{.kind}/{.metadata.namespace}/{.metadata.name}{'\n'}{end}"
    names = kubectl("get", KINDS, "--all-namespaces", "-o", f"jsonpath={line}").split()
    return {name for name in names if f"/{SPACE}/" in name or "//" in name or CACHE in name}


def run_from_template(template: str = TEMPLATE, **parameters: str) -> list[progress.WorkflowStep]:
    """Submits with the chart's own defaults; the tasks of the workflow once it has succeeded."""
    arguments = {"parameters": [{"name": name, "value": value} for name, value in parameters.items()]}
    workflow = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": "from-chart-", "namespace": SPACE},
        "spec": {"workflowTemplateRef": {"name": template}, "arguments": arguments},
    }
    name = kubectl("create", "-f", "-", "-o", "jsonpath={.metadata.name}", text=json.dumps(workflow))
    flow: dict[str, Any] = {}

    def is_finished() -> bool:
        flow.update(json.loads(kubectl("get", "workflow", name, "-n", SPACE, "-o", "json")))
        return progress.phase(flow) in ("Succeeded", "Failed", "Error")

    until(is_finished, 900)
    tasks = progress.workflow_steps(flow)
    told = "\n".join(f"{task.label}: {task.phase} {task.message}" for task in tasks)
    assert progress.phase(flow) == "Succeeded", f"{flow['status'].get('message')}\n{told}"
    return tasks


def with_pods(tasks: list[progress.WorkflowStep]) -> set[str]:
    """Labels of the tasks of stages that did not come from the cache."""
    return {task.label for task in tasks if task.tries and task.template in progress.WRAPPED}


def live_template() -> dict[str, str]:
    """Parameter → default of the installed template."""
    template = json.loads(kubectl("get", "workflowtemplate", TEMPLATE, "-n", SPACE, "-o", "json"))
    return {parameter["name"]: parameter["value"] for parameter in template["spec"]["arguments"]["parameters"]}


def cache_entries() -> int:
    cache = json.loads(kubectl("get", "configmap", CACHE, "-n", NAMESPACE, "-o", "json"))
    return len(cache.get("data") or {})


def test_the_notes_say_how_to_submit_and_what_the_controller_needs(release):
    assert f"argo submit --namespace {SPACE} --from workflowtemplate/{TEMPLATE}" in release.said
    assert f"kubectl auth can-i update configmaps/{CACHE} --namespace {NAMESPACE}" in release.said
    assert "grafana_dashboard=1" in release.said
    assert "No store is set" not in release.said


def test_the_controller_may_write_its_cache(release):
    account = f"system:serviceaccount:{NAMESPACE}:argo"
    told = kubectl("auth", "can-i", "update", f"configmaps/{CACHE}", "--namespace", NAMESPACE, "--as", account)
    assert told.strip() == "yes"


def test_helm_test_finds_what_a_run_needs(release):
    said = helm("test", RELEASE, "--timeout", "8m")
    for line in (
        "create-only writes",
        "ok  may create workflowtaskresults.argoproj.io",
        "ok  may not get secrets",
        "1 of 1 nodes offer one of NVIDIA-H100-80GB-HBM3",
        "num_experts: 2",
    ):
        assert line in said
    assert "BAD" not in said


def test_a_run_from_the_template_succeeds_where_pods_are_restricted(release):
    trained = with_pods(run_from_template())
    assert "asr" in trained
    pods = json.loads(kubectl("get", "pods", "-n", SPACE, "-l", f"app.kubernetes.io/instance={RELEASE}", "-o", "json"))
    assert pods["items"]
    for pod in pods["items"]:
        assert pod["spec"]["automountServiceAccountToken"] is False
        (main,) = [c for c in pod["spec"]["containers"] if c["name"] == "main"]
        assert not any("serviceaccount" in mount["mountPath"] for mount in main["volumeMounts"])
    assert cache_entries() == len(trained)


def test_the_second_template_adds_an_expert_for_each_speaker_once(release, lab, tmp_path):
    new = {"parent": "micro", "corpus": f"s3://{BUCKET}/corpus", "method": "gates"}
    added = run_from_template(EXTENSION, **new, run="voices", speakers='["s00"]')
    assert with_pods(added) == {"extend[s00]"}
    again = run_from_template(EXTENSION, **new, run="more", speakers='["s00", "s01"]')
    assert with_pods(again) == {"extend[s01]"}
    store = lab.store("chart")
    names = [[info.name for info, _ in added_of(store, run_record(store, run), tmp_path)] for run in ("voices", "more")]
    assert names == [["s00"], ["s00", "s01"]]


def test_upgrade_and_rollback_change_the_template_and_keep_the_cache(release):
    remembered = cache_entries()
    helm("upgrade", RELEASE, CHART, "--values", release.values, "--set", "workflow.retries=2,cron.enabled=true")
    assert live_template()["retries"] == "2"
    assert "cronworkflow" in kubectl("get", "cronworkflows", "-n", SPACE, "-o", "name")
    helm("rollback", RELEASE, "1")
    assert live_template()["retries"] == "5"
    assert kubectl("get", "cronworkflows", "-n", SPACE, "-o", "name") == ""
    assert cache_entries() == remembered > 0
    assert not with_pods(run_from_template())


def test_uninstall_leaves_nothing_behind(release):
    helm("uninstall", RELEASE, "--wait")
    kubectl("delete", "workflows", "--all", "-n", SPACE, "--cascade=foreground")
    end = time.monotonic() + 60
    while (left := everything() - release.before) and time.monotonic() < end:
        time.sleep(1)
    assert left == set()
