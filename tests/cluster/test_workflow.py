"""The workflow on a real Kubernetes with Argo: what succeeds, what is skipped, what survives, what is explained.

Pods really run, with one made-up GPU each; all training is of a micro model on tones.
"""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from argo import progress
from cli.submit import show_workflow
from common.artifacts import Key, inspect
from stages.pipeline import Run, run_pipeline
from tests.cluster.lab import NAMESPACE, Lab, kubectl, succeeded, told, wait, workflow

pytestmark = pytest.mark.timeout(1200)
LONG = {"experts__epochs": 60, "asr__epochs": 30}  # seconds of training: time to be hit in


def digests(lab: Lab, store: str) -> dict[str, str]:
    """label → content digest of every task of a store's run, all files re-hashed."""
    place = lab.store(store)
    tasks = json.loads(place.read("micro/run.json"))["tasks"]
    states = {label: inspect(place, Key(t["stage"], t["key"]), deep=True) for label, t in tasks.items()}
    return {label: s.manifest.digest if s.status == "done" else s.status for label, s in states.items()}


def copy_store(lab: Lab, source: str, target: str, tmp_path) -> None:
    """The same artifacts in another store."""
    lab.store(source).get_folder("", tmp_path / "copy")
    lab.store(target).put_folder(tmp_path / "copy", "")


def delete_artifacts(lab: Lab, store: str, *keys: tuple[str, str]) -> None:
    """Removes whole artifacts (stage, key)."""
    place = lab.store(store)
    for stage, key in keys:
        for entry in list(place.list(f"artifacts/{stage}/{key}/")):
            place.delete(entry.key)


def task_key(lab: Lab, store: str, label: str) -> tuple[str, str]:
    task = json.loads(lab.store(store).read("micro/run.json"))["tasks"][label]
    return task["stage"], task["key"]


def trained(found: dict[str, progress.Piece]) -> set[str]:
    """Labels of the pieces of stages for which pods ran."""
    return {label for label, piece in found.items() if piece.tries and piece.template in progress.WRAPPED}


@pytest.fixture(scope="module")
def first(lab) -> str:
    """The workflow that made store `first`."""
    name = lab.submit("first")
    succeeded(name)
    return name


@pytest.fixture(scope="module")
def local(lab, tmp_path_factory) -> Run:
    """The same configuration run on this machine, into a store of its own."""
    config = lab.config("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ASR_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_pipeline(config)
        return Run(config)


def test_the_whole_workflow_gives_what_a_local_run_gives(lab, first, local):
    found = succeeded(first)
    assert trained(found) == {"extract[0]", "cluster", "gating", "experts[0]", "experts[1]", "asr"}
    assert digests(lab, "first") == digests(lab, "local")
    summary = json.loads(lab.store("first").read("micro/summary.json"))
    assert summary["wer_after"] == json.loads(lab.store("local").read("micro/summary.json"))["wer_after"]
    assert lab.store("first").size("micro/report.html")
    assert json.loads(lab.store("first").read("micro/outcome.json"))["status"] == "Succeeded"


def test_experts_are_pods_of_their_own_with_a_gpu_and_clustering_has_none(lab, first):
    found = succeeded(first)
    labels = f"workflows.argoproj.io/workflow={first}"
    pods = json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-l", labels, "-o", "json"))["items"]
    gpus = {}
    for pod in pods:
        main = next(c for c in pod["spec"]["containers"] if c["name"] == "main")
        stage = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        gpus.setdefault(stage, []).append(main["resources"].get("limits", {}).get("nvidia.com/gpu", "0"))
    assert gpus["experts"] == ["1", "1"] and gpus["asr"] == ["1"] and gpus["cluster"] == ["0"]
    assert len({t.pod for label in ("experts[0]", "experts[1]") for t in found[label].tries}) == 2


def test_submitted_again_everything_comes_from_the_cache(lab, first):
    found = succeeded(lab.submit("first"))
    assert trained(found) == set()
    assert [label for label, piece in found.items() if piece.template in progress.WRAPPED and not piece.hit] == []


def test_a_run_begun_on_this_machine_goes_on_in_the_cluster_and_back(lab, first, local):
    found = succeeded(lab.submit("local"))
    assert {piece.message for piece in found.values()} == {""}
    assert digests(lab, "local") == digests(lab, "first")
    assert Run(lab.config("first")).plan(deep=True).finished


def running_with_checkpoint(lab: Lab, store: str, stage: str) -> bool:
    return any("/checkpoints/" in entry.key for entry in lab.store(store).list(f"artifacts/{stage}/"))


def wait_for_checkpoint(lab: Lab, store: str, stage: str, name: str) -> None:
    wait(name, until=lambda found: running_with_checkpoint(lab, store, stage))


def test_killed_pods_are_tried_again_and_go_on_with_the_same_result(lab, tmp_path):
    """An expert's pod is deleted, the asr pod gets SIGTERM, both while they train."""
    config = lab.config("killed-local", **LONG)
    run_pipeline(config)
    name = lab.submit("killed", lab.tree(**LONG))
    wait_for_checkpoint(lab, "killed", "experts", name)
    kubectl("delete", "pod", "-n", NAMESPACE, "--wait=false", pod_of(name, "experts"))
    wait_for_checkpoint(lab, "killed", "asr", name)
    kubectl(
        "exec", "-n", NAMESPACE, pod_of(name, "asr"), "-c", "main", "--", "python", "-c", "import os; os.kill(1, 15)"
    )
    found = succeeded(name, 900)
    assert len(found["experts[0]"].tries) + len(found["experts[1]"].tries) == 3
    assert [t.phase for t in found["asr"].tries] == ["Failed", "Succeeded"]
    assert "143" in found["asr"].tries[0].message
    assert digests(lab, "killed") == digests(lab, "killed-local")


def pod_of(name: str, component: str) -> str:
    """A running pod of a stage."""
    labels = f"workflows.argoproj.io/workflow={name},app.kubernetes.io/component={component}"
    pods = json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-l", labels, "-o", "json"))["items"]
    return next(p["metadata"]["name"] for p in pods if p["status"]["phase"] == "Running")


def test_a_lost_artifact_is_made_again_and_nothing_else(lab, first, tmp_path):
    copy_store(lab, "first", "lost", tmp_path)
    delete_artifacts(lab, "lost", task_key(lab, "lost", "experts[1]"))
    name = lab.submit("lost")
    found = succeeded(name)
    assert trained(found) == {"experts[1]"}
    assert digests(lab, "lost") == digests(lab, "first")
    plan = next(t.pod for t in found["plan"].tries)
    assert plan
    said = kubectl("logs", "-n", NAMESPACE, "-c", "main", "-l", f"workflows.argoproj.io/workflow={name}", "--tail=-1")
    assert "experts[1]: todo" in said and "experts[0]: done" in said


@pytest.mark.parametrize(
    ("changes", "parameters", "reason"),
    [
        ({"asr__epoch": 3}, {}, "asr.epoch: no such setting; did you mean asr.epochs"),
        ({"corpus": {"path": "s3://moe-asr-cluster/nowhere"}}, {}, "nowhere"),
        ({}, {"store-secret": "wrong-store"}, "moe-asr-cluster"),
        ({}, {"gpu": "h100"}, "no such preset"),
    ],
    ids=["typo", "no corpus", "bad credentials", "no such preset"],
)
def test_a_users_error_ends_in_plan_with_its_reason_and_no_retry(lab, changes, parameters, reason):
    found = wait(lab.submit("mistakes", lab.tree(**changes), **parameters), seconds=180)
    assert progress.phase(found) == "Failed"
    steps = {piece.label: piece for piece in progress.pieces(found)}
    assert reason in steps["plan"].message, told(found)
    assert len(steps["plan"].tries) == 1 and not trained(steps)
    assert reason in subprocess.run(
        ["argo", "get", "-n", NAMESPACE, found["metadata"]["name"]], capture_output=True, text=True, check=True
    ).stdout.replace("\n", " ")


def test_neither_a_new_controller_nor_a_lost_cache_loses_work(lab, first, tmp_path):
    copy_store(lab, "first", "restarted", tmp_path)
    delete_artifacts(lab, "restarted", task_key(lab, "restarted", "experts[0]"), task_key(lab, "restarted", "asr"))
    kubectl("delete", "configmap", "-n", NAMESPACE, "moe-asr-cache")
    before = digests(lab, "restarted")
    name = lab.submit("restarted")
    wait(name, until=lambda found: any(p.template == "cluster" for p in progress.pieces(found)))
    kubectl("rollout", "restart", "deployment/workflow-controller", "-n", "argo")
    found = succeeded(name)
    assert digests(lab, "restarted") == digests(lab, "first")
    assert [len(piece.tries) for piece in found.values() if piece.template in progress.WRAPPED] == [1] * 6
    kept = [label for label, digest in before.items() if digest != "missing"]
    started = min(t.started or 0 for piece in found.values() for t in piece.tries)
    for label in kept:  # their pods found the work done
        state = inspect(lab.store("restarted"), Key(*task_key(lab, "restarted", label)))
        assert state.manifest and state.manifest.started < started


def test_a_gpu_that_no_node_has_leaves_pods_waiting_with_an_explanation(lab, capsys):
    name = lab.submit("waiting", gpu="a100-40")
    try:
        wait(name, until=lambda found: "Unschedulable" in told(found), seconds=180)
        show_workflow(name, NAMESPACE, as_json=False)
        shown = capsys.readouterr().out
        assert "no node has a GPU of product NVIDIA-A100-SXM4-40GB or NVIDIA-A100-PCIE-40GB" in shown
        assert "NVIDIA-H100-80GB-HBM3 (8)" in shown
    finally:
        subprocess.run(["argo", "terminate", "-n", NAMESPACE, name], check=True)


def test_two_submissions_at_once_do_each_piece_of_work_once(lab, first, tmp_path):
    copy_store(lab, "first", "twins", tmp_path)
    lost = [task_key(lab, "twins", label) for label in ("experts[0]", "experts[1]", "asr")]
    delete_artifacts(lab, "twins", *lost)
    names = [lab.submit("twins"), lab.submit("twins")]
    for name in names:
        succeeded(name, 900)
    assert digests(lab, "twins") == digests(lab, "first")
    for stage, key in lost:
        keys = [entry.key.split("/")[3] for entry in lab.store("twins").list(f"artifacts/{stage}/{key}/")]
        assert len(set(keys) - {"manifest.json"}) == 1, "a second attempt wrote something"
    said = [
        kubectl("logs", "-n", NAMESPACE, "-c", "main", "-l", f"workflows.argoproj.io/workflow={name}", "--tail=-1")
        for name in names
    ]
    assert time and said and workflow(names[0])
