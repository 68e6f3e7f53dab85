"""The workflow on a real Kubernetes with Argo: what succeeds, what is skipped, what survives, what is explained.

Pods really run, with one made-up GPU each; all training is of a micro model on tones.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from argo import progress
from cli.submit import show_workflow
from common.config import Config
from common.data.sources import download_folder
from common.storage.artifacts import Key, inspect
from common.storage.manifest import Manifest
from stages.local_runner import Run, run_pipeline
from tests.cluster.lab import NAMESPACE, Lab, command, kubectl, succeeded, told, wait, workflow
from tests.cluster.node import find_node, kill_controller_and_kubelet

pytestmark = pytest.mark.timeout(1200)
# A checkpoint after each of many epochs, and no early stop: time to be hit in.
LONG = {"experts__epochs": 30, "experts__patience": 30, "asr__epochs": 15, "asr__patience": 15}


LABELS = {"extract[0]", "cluster", "gating", "experts[0]", "experts[1]", "asr"}


def digests(lab: Lab, store: str) -> dict[str, str]:
    """label → content digest of every task of a store's run, all files re-hashed."""
    place = lab.store(store)
    tasks = json.loads(place.read("micro/run.json"))["tasks"]
    states = {label: inspect(place, Key(t["stage"], t["key"]), deep=True) for label, t in tasks.items()}
    return {label: s.manifest.digest if s.status == "done" else s.status for label, s in states.items()}


def manifests(lab: Lab, store: str) -> list[Manifest]:
    """Of all artifacts of a store that stages made; the base model's transcripts are a by-product."""
    place = lab.store(store)
    keys = [entry.key for entry in place.list("artifacts/") if not entry.key.startswith("artifacts/base/")]
    names = [key for key in keys if key.endswith("/manifest.json")]
    return [Manifest.from_json(place.read(name), name) for name in names]


def copy_store(lab: Lab, source: str, target: str, folder: Path) -> None:
    """The same artifacts in another store."""
    download_folder(lab.store(source), folder / "copy")
    lab.store(target).put_folder(folder / "copy", "")


def delete_artifacts(lab: Lab, store: str, *keys: tuple[str, str]) -> None:
    """Removes whole artifacts (stage, key)."""
    place = lab.store(store)
    for stage, key in keys:
        for entry in list(place.list(f"artifacts/{stage}/{key}/")):
            place.delete(entry.key)


def task_key(lab: Lab, store: str, label: str) -> tuple[str, str]:
    task = json.loads(lab.store(store).read("micro/run.json"))["tasks"][label]
    return task["stage"], task["key"]


def trained(steps: dict[str, progress.WorkflowStep]) -> set[str]:
    """Labels of the tasks of stages for which pods ran."""
    return {label for label, task in steps.items() if task.tries and task.template in progress.WRAPPED}


MISTAKES = {
    "typo": ({"asr__epoch": 3}, {}, "asr.epoch: no such setting; did you mean asr.epochs"),
    "no corpus": ({"corpus": {"path": "s3://moe-asr-cluster/nowhere"}}, {}, "nowhere"),
    "bad credentials": ({}, {}, "moe-asr-cluster"),
    "unknown preset": ({}, {"gpu": "h100"}, "unknown preset"),
}
# Closes the text that it stands in, and goes on with a pod of its own.
CRAFTED = '1Gi"}}], "hostPID": true, "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi'


@pytest.fixture(scope="module")
def early(lab) -> dict[str, str]:
    """Workflows that need no other one, submitted together: most of their time is waiting."""
    names = {"first": lab.submit("first"), "killed": lab.submit("killed", lab.tree(**LONG))}
    names["waiting"] = lab.submit("waiting", gpu="a100-40")
    names["crafted"] = lab.submit("mistakes", retries="0", **{"scratch-size": CRAFTED})
    for mistake, (changes, parameters, _) in MISTAKES.items():
        template = lab.wrong if mistake == "bad credentials" else None
        names[mistake] = lab.submit("mistakes", lab.tree(**changes), template, **parameters)
    return names


@pytest.fixture(scope="module")
def first(early) -> str:
    """The workflow that made store `first`."""
    succeeded(early["first"])
    return early["first"]


@pytest.fixture(scope="module")
def local(lab, run_here) -> Run:
    """The same configuration run on this machine, into a store of its own."""
    return run_here(lab.config("local"))


@pytest.fixture(scope="module")
def run_here(tmp_path_factory) -> Callable[[Config], Run]:
    """Runs the pipeline on this machine."""

    def run(config: Config) -> Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOE_ASR_CACHE", str(tmp_path_factory.mktemp("cache")))
            run_pipeline(config)
            return Run(config)

    return run


@pytest.fixture(scope="module")
def later(lab, first, local, tmp_path_factory) -> dict[str, str]:
    """Workflows that go on from finished work, submitted together."""
    for name, lost in LOST.items():
        copy_store(lab, "first", name, tmp_path_factory.mktemp("copy"))
        delete_artifacts(lab, name, *(task_key(lab, "first", label) for label in lost))
    names = {name: lab.submit(name) for name in ("lost", "twins")}
    names |= {"other twin": lab.submit("twins"), "again": lab.submit("first")}
    return names | {"from local": lab.submit_by_command("local", tmp_path_factory.mktemp("command"))}


LOST = {"lost": ["experts[1]"], "twins": ["experts[0]", "experts[1]", "asr"]}


def test_killed_pods_are_tried_again_and_go_on_with_the_same_result(lab, early, run_here):
    """While they train, one expert's pod is deleted, the other is killed as for want of memory, asr gets SIGTERM."""
    name = early["killed"]
    deleted = partial(kubectl, "delete", "pod", "-n", NAMESPACE, "--wait=false")
    strike(lab, name, {"experts[0]": deleted, "experts[1]": partial(signal_stage, number=9)})
    strike(lab, name, {"asr": partial(signal_stage, number=15)})
    run_here(lab.config("killed-local", **LONG))
    steps = succeeded(name, 900)
    assert [len(steps[label].tries) for label in ("experts[0]", "experts[1]", "asr")] == [2, 2, 2]
    assert "143" in steps["asr"].tries[0].message
    assert sorted(memory_limits(name, "experts")) == ["2Gi", "2Gi", "4Gi"]  # the deleted pod's limit went with it
    assert digests(lab, "killed") == digests(lab, "killed-local")
    (lab.kept / "killed.json").write_text(json.dumps(workflow(name)), encoding="utf-8")


def strike(lab: Lab, name: str, blows: Mapping[str, Callable[[str], object]]) -> None:
    """Hits the pod of each task of workflow `killed` as soon as the task itself has written a checkpoint: one that
    waited for the others might be over by then.
    """
    left, store = dict(blows), lab.store("killed")

    def hit(flow: dict[str, Any]) -> bool:
        nodes = {p.label: p.tries[-1].pod for p in progress.workflow_steps(flow) if p.tries and p.label in left}
        running = running_pods(name) if nodes else {}
        pods = {label: running[node] for label, node in nodes.items() if node in running}
        planned = Run(lab.config("killed", **LONG)).plan().planned if pods else ()
        for task in [p.task for p in planned if p.task.label in pods]:
            if any("/checkpoints/0" in entry.key for entry in store.list(task.key.prefix)):
                left.pop(task.label)(pods[task.label])
        return not left

    wait(name, until=hit)


def pods_of(name: str, *more: str) -> list[dict[str, Any]]:
    """Those of a workflow that are still there; `more` are further labels."""
    labels = ",".join([f"workflows.argoproj.io/workflow={name}", *more])
    return list(json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-l", labels, "-o", "json"))["items"])


def running_pods(name: str) -> dict[str, str]:
    """Node of the workflow → name of its pod."""
    metadata = [pod["metadata"] for pod in pods_of(name) if pod["status"]["phase"] == "Running"]
    return {m["annotations"]["workflows.argoproj.io/node-id"]: m["name"] for m in metadata}


def memory_limits(name: str, component: str) -> list[str]:
    """Of all pods of a stage that are still there."""
    pods = pods_of(name, f"app.kubernetes.io/component={component}")
    mains = [c for pod in pods for c in pod["spec"]["containers"] if c["name"] == "main"]
    return [main["resources"]["limits"]["memory"] for main in mains]


def signal_stage(pod: str, number: int) -> None:
    """Sends a signal to the stage's process in a pod; process 1 is Argo's, which passes on what may be passed on."""
    find = "[p for p in os.listdir('/proc') if p.isdigit() and p not in ('1', str(os.getpid()))]"
    code = f"import os; [os.kill(int(p), {number}) for p in {find}]" if number == 9 else "import os; os.kill(1, 15)"
    words = ["kubectl", "exec", "-n", NAMESPACE, pod, "-c", "main", "--", "python", "-c", code]
    subprocess.run(words, check=False)  # it may end with the container that it ends


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_error_ends_in_plan_with_its_reason_and_no_retry(early, mistake):
    reason = MISTAKES[mistake][2]
    flow = wait(early[mistake])
    assert progress.phase(flow) == "Failed"
    steps = {task.label: task for task in progress.workflow_steps(flow)}
    assert reason in steps["plan"].message, told(flow)
    assert len(steps["plan"].tries) == 1 and not trained(steps)
    assert reason in command("argo", "get", "-n", NAMESPACE, early[mistake])


def test_a_value_that_would_change_a_pod_makes_none(early):
    flow = wait(early["crafted"])
    messages = [node.get("message", "") for node in flow["status"]["nodes"].values()]
    assert progress.phase(flow) in ("Failed", "Error")
    assert any("PodSpecPatch" in message for message in messages), told(flow)
    assert not pods_of(early["crafted"])


def test_a_gpu_that_no_node_has_leaves_pods_waiting_with_an_explanation(early, capsys):
    name = early["waiting"]
    wait(name, until=lambda flow: "Unschedulable" in told(flow))
    show_workflow(name, NAMESPACE, as_json=False)
    command("argo", "terminate", "-n", NAMESPACE, name)
    shown = capsys.readouterr().out
    assert "no node has a GPU of product NVIDIA-A100-SXM4-40GB or NVIDIA-A100-PCIE-40GB" in shown
    assert "NVIDIA-H100-80GB-HBM3 (8)" in shown


def test_the_whole_workflow_gives_what_a_local_run_gives(lab, first, local):
    steps = succeeded(first)
    assert trained(steps) == {"extract[0]", "cluster", "gating", "experts[0]", "experts[1]", "asr"}
    assert digests(lab, "first") == digests(lab, "local")
    keys = {p.task.key.digest for p in local.plan().planned}
    assert keys == {task["key"] for task in json.loads(lab.store("first").read("micro/run.json"))["tasks"].values()}
    summary = json.loads(lab.store("first").read("micro/summary.json"))
    assert summary["wer_after"] == json.loads(lab.store("local").read("micro/summary.json"))["wer_after"]
    assert lab.store("first").size("micro/report.html")
    assert json.loads(lab.store("first").read("micro/outcome.json"))["status"] == "Succeeded"


def test_experts_are_pods_of_their_own_with_a_gpu_and_clustering_has_none(first):
    steps = succeeded(first)
    gpus: dict[str, list[str]] = {}
    for pod in pods_of(first):
        main = next(c for c in pod["spec"]["containers"] if c["name"] == "main")
        stage = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        gpus.setdefault(stage, []).append(main["resources"].get("limits", {}).get("nvidia.com/gpu", "0"))
    assert gpus["experts"] == ["1", "1"] and gpus["asr"] == ["1"] and gpus["cluster"] == ["0"]
    assert len({t.pod for label in ("experts[0]", "experts[1]") for t in steps[label].tries}) == 2


def test_submitted_again_everything_comes_from_the_cache(later):
    steps = succeeded(later["again"])
    assert trained(steps) == set()
    assert {label for label, task in steps.items() if task.hit} == LABELS


def test_a_run_begun_on_this_machine_goes_on_in_the_cluster_and_back(lab, later):
    steps = succeeded(later["from local"])
    assert [t.phase for task in steps.values() for t in task.tries if t.phase != "Succeeded"] == []
    assert digests(lab, "local") == digests(lab, "first")
    started = min(t.started or 0 for task in steps.values() for t in task.tries)
    assert all(manifest.started < started for manifest in manifests(lab, "local"))
    assert Run(lab.config("first")).plan(deep=True).finished


def test_a_lost_artifact_is_made_again_and_nothing_else(lab, later):
    steps = succeeded(later["lost"])
    assert trained(steps) == {"experts[1]"}
    assert digests(lab, "lost") == digests(lab, "first")
    labels = f"workflows.argoproj.io/workflow={later['lost']},app.kubernetes.io/component=plan"
    said = kubectl("logs", "-n", NAMESPACE, "-c", "main", "-l", labels, "--tail=-1")
    assert "experts[1]: todo" in said and "experts[0]: done" in said


def test_two_submissions_at_once_do_each_piece_of_work_once(lab, later):
    both = [succeeded(later[name], 900) for name in ("twins", "other twin")]
    assert digests(lab, "twins") == digests(lab, "first")
    for label in LOST["twins"]:
        _, key = task_key(lab, "twins", label)
        assert len(attempts(lab, "twins", label)) == 1, "a second attempt wrote something"
        first_try, second_try = sorted(t.started or 0.0 for steps in both for t in steps[label].tries)
        done = next(m for m in manifests(lab, "twins") if m.key == key)
        assert first_try <= done.started < done.started + done.seconds <= second_try + 1  # a second is Argo's unit


def test_neither_a_lost_cache_nor_a_replaced_controller_loses_work(lab, later, tmp_path):
    """The controller is replaced while `cluster` is looked up."""
    for name in later.values():
        wait(name)
    kubectl("delete", "configmap", "-n", NAMESPACE, "moe-asr-cache")
    with unfinished(lab, "replaced", tmp_path) as name:
        wait(name, until=lambda flow: any(p.template == "cluster" for p in progress.workflow_steps(flow)))
        kubectl("rollout", "restart", "deployment/workflow-controller", "-n", "argo")


def test_a_controller_and_a_kubelet_that_are_killed_lose_no_work(lab, later, tmp_path):
    """Both get SIGKILL while an expert runs."""
    for name in later.values():
        wait(name)
    if not (node := find_node()):
        pytest.skip("this cluster's controller and kubelet cannot be killed from here")
    kubectl("rollout", "status", "deployment/workflow-controller", "-n", "argo", "--timeout=180s")
    with unfinished(lab, "restarted", tmp_path) as name:
        wait(name, until=lambda flow: trains(flow, "experts[0]"))
        kill_controller_and_kubelet(node)


@contextmanager
def unfinished(lab: Lab, store: str, folder: Path) -> Iterator[str]:
    """Submits a copy of store `first` that lacks an expert and joint training; after the block, the workflow must
    succeed with the same artifacts, each made once.
    """
    lost = ["experts[0]", "asr"]
    copy_store(lab, "first", store, folder)
    delete_artifacts(lab, store, *(task_key(lab, "first", label) for label in lost))
    before = {m.key: m.attempt for m in manifests(lab, store)}
    name = lab.submit(store)
    yield name
    steps = succeeded(name)
    assert digests(lab, store) == digests(lab, "first")
    tries = {label: len(steps[label].tries) for label in LABELS}  # none where the cache had the result
    assert set(tries.values()) <= {0, 1} and all(tries[label] == 1 for label in lost)
    after = {m.key: m.attempt for m in manifests(lab, store)}
    assert len(before) == len(LABELS) - len(lost) and before.items() <= after.items()  # found done
    for label in lost:
        assert len(attempts(lab, store, label)) == 1, f"{label} was done twice"


def trains(flow: dict[str, Any], label: str) -> bool:
    """Whether the pod of a task runs."""
    tries = [t for task in progress.workflow_steps(flow) if task.label == label for t in task.tries]
    return any(t.phase == "Running" for t in tries)


def attempts(lab: Lab, store: str, label: str) -> set[str]:
    """Folders of one artifact in which something was written."""
    stage, key = task_key(lab, store, label)
    return {entry.key.split("/")[3] for entry in lab.store(store).list(f"artifacts/{stage}/{key}/")} - {"manifest.json"}
