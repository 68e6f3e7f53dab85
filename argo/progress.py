"""Reads a run's state from a Workflow object: its tasks, their tries, cache hits and reasons for waiting.

Used by `moe-asr status` and by the tests; works on plain JSON, as printed by kubectl.
"""

import base64
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from common.errors import DataError
from stages import STAGES

Object = Mapping[str, Any]
EXTEND = "extend"  # the fan-out of the template that adds experts
FAN_OUTS = frozenset(contract.name for contract in STAGES if contract.fan_out) | {EXTEND}
WRAPPED = frozenset(contract.name for contract in STAGES) | {EXTEND}  # templates that memoize around a pod
STEPS = ("plan", "report", "publish", "outcome", "join")


@dataclass(frozen=True, slots=True)
class Try:
    """One pod.

    Attributes:
        started: start time in seconds since 1970; None if it has not started.
    """

    pod: str
    phase: str
    message: str
    started: float | None


@dataclass(frozen=True, slots=True)
class WorkflowStep:
    """A step of the workflow, or one task of a stage.

    Attributes:
        label: `plan-asr`, `cluster`, `experts[1]`, `extend[F07]`, …
        template: stage or step that it runs.
        hit: whether its result came from the cache, without a pod.
    """

    label: str
    template: str
    phase: str
    message: str
    hit: bool
    started: float | None
    finished: float | None
    tries: tuple[Try, ...]


def workflow_steps(workflow: Object) -> list[WorkflowStep]:
    """All steps and tasks that the workflow has begun or waits to begin, in the order of their start.

    Raises:
        DataError: Argo keeps the steps in a database, or they cannot be read.
    """
    nodes = _nodes(workflow.get("status", {}))
    steps = [_step(node, nodes) for node in nodes if _is_step(node)]
    return sorted(steps, key=lambda step: (step.started is None, step.started or 0.0, step.label))


def _nodes(status: Object) -> list[Object]:
    """The nodes of a workflow, which Argo compresses where they would make the object larger than 1 MB."""
    if status.get("offloadNodeStatusVersion"):
        raise DataError(
            "Argo keeps the steps of this workflow in a database (nodeStatusOffLoad): `argo get` shows them if "
            "$ARGO_SERVER is set"
        )
    nodes = status.get("nodes") or {}
    if compressed := status.get("compressedNodes"):
        try:
            nodes = json.loads(gzip.decompress(base64.b64decode(compressed)))
        except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
            raise DataError(f"the compressed steps of this workflow cannot be read ({error})") from None
    return list(nodes.values())


def _is_step(node: Object) -> bool:
    template, kind = node.get("templateName"), node["type"]
    if template in WRAPPED:
        return kind not in ("TaskGroup", "Skipped", "Omitted")
    return template in STEPS and kind in ("Retry", "Pod") and not _is_try(node)


def _is_try(node: Object) -> bool:
    return node["type"] == "Pod" and bool((node.get("nodeFlag") or {}).get("retried"))


def _step(node: Object, nodes: Sequence[Object]) -> WorkflowStep:
    task = "outcome" if node["templateName"] == "outcome" else node["name"].split(".", 1)[-1].partition("(")[0]
    inputs = {p["name"]: p.get("value", "") for p in (node.get("inputs") or {}).get("parameters", [])}
    unit = inputs.get("who" if node["templateName"] == EXTEND else "shard", "?")
    shard = f"[{unit}]" if node["templateName"] in FAN_OUTS else ""
    tries = [_try(n) for n in nodes if n["type"] == "Pod" and _below(n["name"], node["name"])]
    ordered = tuple(sorted(tries, key=lambda attempt: (attempt.started is None, attempt.started or 0.0)))
    message = next((t.message for t in reversed(ordered) if t.message), "") or tidy(node.get("message", ""))
    waiting = node["phase"] == "Pending" and ordered  # a node that holds a lock stays so while its pod runs
    lock = (node.get("synchronizationStatus") or {}).get("waiting")
    return WorkflowStep(
        label=f"{task}{shard}",
        template=node["templateName"],
        phase=ordered[-1].phase if waiting else node["phase"],
        message=f"waits for {lock.rpartition('/')[2]}, which another workflow or task holds" if lock else message,
        hit=bool((node.get("memoizationStatus") or {}).get("hit")),
        started=seconds(node.get("startedAt")),
        finished=seconds(node.get("finishedAt")),
        tries=ordered,
    )


def _below(name: str, parent: str) -> bool:
    return name == parent or name.startswith((f"{parent}.", f"{parent}("))


def _try(node: Object) -> Try:
    return Try(
        pod=node["id"],
        phase=node["phase"],
        message=tidy(node.get("message", "")),
        started=seconds(node.get("startedAt")),
    )


def tidy(message: str) -> str:
    """A message as one line, without the log lines of Argo's wrapper around a stage, with which it may end."""
    head, _, tail = message.partition("time=")
    kept = [line for line in f"time={tail}".splitlines() if "argo=true" not in line] if tail else []
    return " ".join([head.strip(), *kept]).strip()


def seconds(text: str | None) -> float | None:
    """Kubernetes' time as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp() if text else None


def phase(workflow: Object) -> str:
    """Phase of the workflow: Pending, Running, Succeeded, Failed or Error."""
    return str(workflow.get("status", {}).get("phase") or "Pending")


def explain(pod: Object, nodes: Sequence[Object]) -> str:
    """The reason why a pod does not run yet, for the user who submitted it; empty if it is unknown.

    Args:
        pod: the pod, as returned by kubectl.
        nodes: all nodes of the cluster; empty if they are unknown.
    """
    for container in pod.get("status", {}).get("containerStatuses", []):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            return (
                f"image {container['image']} cannot be pulled: check registry and tag of the template, and pull secrets"
            )
        if waiting.get("message"):
            return f"{waiting['reason']}: {waiting['message']}"
    for condition in pod.get("status", {}).get("conditions", []):
        if condition.get("reason") == "Unschedulable":
            return _unschedulable(pod, nodes, str(condition.get("message", "")))
    return ""


def _unschedulable(pod: Object, nodes: Sequence[Object], message: str) -> str:
    wanted = wanted_products(pod)
    there = gpu_products(nodes)
    if nodes and wanted and not set(wanted) & set(there):
        have = ", ".join(f"{product} ({count})" for product, count in there.items()) or "none"
        return (
            f"no node has a GPU of product {' or '.join(wanted)}; this cluster's are: {have}. "
            "Submit with another --gpu, or with -p gpu-products=NAME,NAME"
        )
    for resource, remedy in (
        ("nvidia.com/gpu", "all GPUs of the right nodes are taken, or a pod asks for more than one node has"),
        ("memory", "lower gpu-stage-memory or cpu-stage-memory, or wait"),
        ("cpu", "lower gpu-stage-cpu or cpu-stage-cpu, or wait"),
    ):
        if f"Insufficient {resource}" in message:
            return f"no node has enough {resource} free: {remedy} ({message})"
    return message


def wanted_products(pod: Object) -> list[str]:
    """Values of the GPU label that a pod's node affinity allows, each once."""
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = (affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms", [])
    wanted = [
        value
        for term in terms
        for expression in term.get("matchExpressions", [])
        if expression["key"] == "nvidia.com/gpu.product" and expression["operator"] == "In"
        for value in expression.get("values", [])
    ]
    return list(dict.fromkeys(wanted))


def gpu_products(nodes: Sequence[Object]) -> dict[str, int]:
    """Product → number of GPUs in the cluster."""
    counts: dict[str, int] = {}
    for node in nodes:
        product = node["metadata"].get("labels", {}).get("nvidia.com/gpu.product")
        if product:
            counts[product] = counts.get(product, 0) + int(node["status"]["allocatable"].get("nvidia.com/gpu", 0))
    return counts
