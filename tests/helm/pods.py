"""Pods of a rendered chart, put together as Argo's controller does it (workflow/controller/workflowpod.go)."""

from __future__ import annotations

import json
import re
from typing import Any

from argo.parameters import QUANTITIES, quantity

Tree = dict[str, Any]
TAG = re.compile(r"\{\{=?(?P<inside>.*?)\}\}(?!\})", re.DOTALL)


def kind_of(objects: list[Tree], kind: str) -> list[Tree]:
    """The objects of one kind."""
    return [manifest for manifest in objects if manifest["kind"] == kind]


def workflow_of(objects: list[Tree]) -> Tree:
    """The WorkflowTemplate of the pipeline."""
    template, _ = kind_of(objects, "WorkflowTemplate")
    return template


def extension_of(objects: list[Tree]) -> Tree:
    """The WorkflowTemplate that adds experts to a finished model."""
    _, template = kind_of(objects, "WorkflowTemplate")
    return template


def parameters_of(template: Tree) -> dict[str, str]:
    """Parameter → default."""
    return {parameter["name"]: parameter["value"] for parameter in template["spec"]["arguments"]["parameters"]}


def pods_of(objects: list[Tree]) -> dict[str, Tree]:
    """Name → pod: those of the release itself, and one for each template of a workflow that has a container.

    Pods of the second workflow are called `extension: …`.
    """
    pods = {pod["metadata"]["name"]: pod for pod in kind_of(objects, "Pod")}
    for start, workflow in (("", workflow_of(objects)), ("extension: ", extension_of(objects))):
        for template in workflow["spec"]["templates"]:
            if "container" in template:
                pods[start + template["name"]] = workflow_pod(workflow, template)
    return pods


def workflow_pod(workflow: Tree, template: Tree) -> Tree:
    """The pod of one template, with Argo's own two containers, its parameters filled in and the patches applied."""
    spec = workflow["spec"]
    metadata = merged(spec.get("podMetadata", {}), template.get("metadata", {}))
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": spec["serviceAccountName"],
        "automountServiceAccountToken": spec["automountServiceAccountToken"],
        "initContainers": [executor("init", template)],
        "containers": [executor("wait", template), {"name": "main", **template["container"]}],
        "volumes": [
            {"name": "var-run-argo", "emptyDir": {}},
            {"name": "tmp-dir-argo", "emptyDir": {}},
            *template.get("volumes", []),
            *mounted(spec.get("volumes", []), template["container"]),
            {
                "name": "exec-sa-token",
                "secret": {"secretName": f"{spec['executor']['serviceAccountName']}.service-account-token"},
            },
        ],
        "securityContext": template.get("securityContext") or spec["securityContext"],
    }
    for field in ("nodeSelector", "affinity", "tolerations", "priorityClassName"):
        pod |= {field: template.get(field) or spec.get(field)} if template.get(field) or spec.get(field) else {}
    for field in ("imagePullSecrets", "schedulerName"):
        pod |= {field: spec[field]} if field in spec else {}
    values = parameters_of(workflow)
    for patch in (spec.get("podSpecPatch"), template.get("podSpecPatch")):
        pod = merged(pod, json.loads(filled(patch, values)) if patch else {})
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": template["name"], **metadata}, "spec": pod}
    return {key: json.loads(filled(json.dumps(value), values)) for key, value in whole.items()}


def executor(name: str, template: Tree) -> Tree:
    """A container that Argo adds to a pod, as its controller makes it without any configuration."""
    token = {"name": "exec-sa-token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}
    mirrored = template["container"].get("volumeMounts", []) if name == "wait" else []
    mounts = [{**mount, "mountPath": f"/mainctrfs{mount['mountPath']}"} for mount in mirrored]
    return {"name": name, "image": "argoexec", "command": ["argoexec", name], "volumeMounts": [token, *mounts]}


def mounted(volumes: list[Tree], container: Tree) -> list[Tree]:
    """Those volumes of a workflow that a container mounts."""
    names = {mount["name"] for mount in container.get("volumeMounts", [])}
    return [volume for volume in volumes if volume["name"] in names]


def filled(text: str, values: dict[str, str]) -> str:
    """Text with parameters in place of their tags, and 1 in place of expressions and of what only a run knows."""
    known = {f"workflow.parameters.{name}": value for name, value in values.items()}
    known |= {quantity(name)[3:-2]: values[name] for name in QUANTITIES if name in values}
    return TAG.sub(lambda tag: json.dumps(known.get(tag["inside"], "1"))[1:-1], text)


def merged(under: Tree, over: Tree) -> Tree:
    """Kubernetes' strategic merge, as far as it is needed: lists of named things are merged by name."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value)
        elif isinstance(old, list) and all(isinstance(item, dict) and "name" in item for item in [*old, *value]):
            result[key] = merged_lists(old, value)
        else:
            result[key] = value
    return result


def merged_lists(under: list[Tree], over: list[Tree]) -> list[Tree]:
    names = {item["name"]: item for item in over}
    kept = [merged(item, names.pop(item["name"], {})) for item in under]
    return kept + list(names.values())
