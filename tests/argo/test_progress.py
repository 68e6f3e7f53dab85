"""What a Workflow object tells: read from one that a real cluster left (`finished.json`, without its templates)."""

import base64
import gzip
import json
from pathlib import Path

import pytest

from argo.progress import explain, gpu_products, phase, tidy, wanted_products, workflow_steps
from common.errors import DataError

FINISHED = json.loads(Path(__file__).with_name("finished.json").read_text())
LABELS = ["extract[0]", "cluster", "gating", "experts[0]", "experts[1]", "asr"]


def node(product, gpus=8):
    labels = {"nvidia.com/gpu.product": product} if product else {}
    return {"metadata": {"labels": labels}, "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}}}


def waiting_pod(*products, message="0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."):
    match = {"key": "nvidia.com/gpu.product", "operator": "In", "values": [*products, products[0]]}
    required = {"nodeSelectorTerms": [{"matchExpressions": [match]}]}
    return {
        "spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}},
        "status": {"conditions": [{"reason": "Unschedulable", "message": message}]},
    }


def test_every_task_is_found_once_with_its_tries():
    steps = {task.label: task for task in workflow_steps(FINISHED)}
    assert phase(FINISHED) == "Succeeded"
    assert [label for label in steps if label in LABELS] == LABELS
    assert {"plan", "plan-asr", "report", "outcome"} <= set(steps)
    assert all(task.tries and task.tries[-1].phase == "Succeeded" for task in steps.values())
    pods = [attempt.pod for task in steps.values() for attempt in task.tries]
    nodes = FINISHED["status"]["nodes"].values()
    assert sorted(pods) == sorted(n["id"] for n in nodes if n["type"] == "Pod")


def test_added_experts_are_named_by_their_speakers():
    changed = json.loads(json.dumps(FINISHED))
    for n in changed["status"]["nodes"].values():
        for old, new in (("experts-pod", "extend-pod"), ("experts", "extend")):
            if n.get("templateName") == old:
                n["templateName"] = new
        for p in (n.get("inputs") or {}).get("parameters", []):
            p |= {"name": "who", "value": f"F0{p['value']}"} if p["name"] == "shard" else {}
    steps = [task for task in workflow_steps(changed) if task.template == "extend"]
    assert [task.label for task in steps] == ["experts[F00]", "experts[F01]"]
    assert [task.tries for task in steps] == [p.tries for p in workflow_steps(FINISHED) if p.template == "experts"]


def test_steps_are_the_same_where_argo_compressed_them():
    packed = base64.b64encode(gzip.compress(json.dumps(FINISHED["status"]["nodes"]).encode())).decode()
    status = {name: value for name, value in FINISHED["status"].items() if name != "nodes"}
    assert workflow_steps({"status": status | {"compressedNodes": packed}}) == workflow_steps(FINISHED)
    for broken in (packed[:-200], "no base64", base64.b64encode(b"no gzip").decode()):
        with pytest.raises(DataError, match="cannot be read"):
            workflow_steps({"status": status | {"compressedNodes": broken}})


def test_steps_that_argo_keeps_in_a_database_are_not_said_to_be_none():
    with pytest.raises(DataError, match="in a database"):
        workflow_steps({"status": {"offloadNodeStatusVersion": "fnv:1"}})


def test_the_message_is_that_of_the_newest_pod_whatever_the_order_of_nodes():
    changed = json.loads(json.dumps(FINISHED))
    (step,) = [task for task in workflow_steps(changed) if task.label == "experts[0]"]
    assert len(step.tries) > 1
    nodes = {n["id"]: n for n in changed["status"]["nodes"].values()}
    for number, attempt in enumerate(step.tries):
        nodes[attempt.pod]["message"] = f"message {number}"
    for order in (1, -1):
        changed["status"]["nodes"] = dict(list(changed["status"]["nodes"].items())[::order])
        (step,) = [task for task in workflow_steps(changed) if task.label == "experts[0]"]
        assert step.message == f"message {len(step.tries) - 1}"


def test_a_hit_has_no_pod():
    changed = json.loads(json.dumps(FINISHED))
    nodes = changed["status"]["nodes"]
    (asr,) = [n for n in nodes.values() if n.get("templateName") == "asr" and n["type"] == "DAG"]
    asr["memoizationStatus"] = {"hit": True}
    below = [key for key, n in nodes.items() if n["name"].startswith(asr["name"] + ".")]
    for key in below:
        del nodes[key]
    (task,) = [p for p in workflow_steps(changed) if p.label == "asr"]
    assert below and task.hit and task.tries == ()


def test_a_task_that_waits_for_a_lock_says_so():
    changed = json.loads(json.dumps(FINISHED))
    (asr,) = [n for n in changed["status"]["nodes"].values() if n.get("templateName") == "asr" and n["type"] == "DAG"]
    asr["synchronizationStatus"] = {"waiting": "argo/Mutex/moe-asr-0123"}
    (task,) = [p for p in workflow_steps(changed) if p.label == "asr"]
    assert "waits for moe-asr-0123" in task.message


def test_a_gpu_that_no_node_has_is_explained_with_those_that_there_are():
    pod = waiting_pod("NVIDIA-H200", "NVIDIA-GH200")
    assert wanted_products(pod) == ["NVIDIA-H200", "NVIDIA-GH200"]
    told = explain(pod, [node("NVIDIA-H100-PCIe", 4), node("NVIDIA-H100-PCIe", 4), node(None, 0)])
    assert "product NVIDIA-H200 or NVIDIA-GH200" in told and "NVIDIA-H100-PCIe (8)" in told
    assert gpu_products([node(None, 0)]) == {}
    assert "none" in explain(pod, [node(None, 0)])
    assert explain(pod, []).startswith("0/1 nodes are available")


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "memory", "cpu"])
def test_a_full_node_is_explained_by_what_it_lacks(resource):
    pod = waiting_pod("NVIDIA-H200", message=f"0/1 nodes are available: 1 Insufficient {resource}.")
    assert f"enough {resource} free" in explain(pod, [node("NVIDIA-H200")])


def test_an_image_that_cannot_be_pulled_is_named():
    waiting = {"image": "here/asr:9", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off"}}}
    assert "here/asr:9 cannot be pulled" in explain({"spec": {}, "status": {"containerStatuses": [waiting]}}, [])


def test_a_pod_that_runs_has_nothing_to_explain():
    assert explain({"spec": {}, "status": {"conditions": [{"type": "Ready"}]}}, []) == ""


def test_messages_are_one_line_without_argos_own():
    log = 'time=2026 level=INFO msg="waiting for signals" argo=true'
    assert tidy(f"main: Error (exit code 137): {log}\n{log}\nError: exit status 137") == (
        "main: Error (exit code 137): Error: exit status 137"
    )
    assert tidy("pod deleted") == "pod deleted"
