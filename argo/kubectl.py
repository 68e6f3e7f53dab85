"""Access to the cluster of the current context through kubectl, without separate tokens or configuration."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from common.errors import DataError, MoeAsrError, RetryableError, UsageError

NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")  # of runs; those of Kubernetes' objects and namespaces are among them


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Runs kubectl and returns what it prints.

    Args:
        text: for its standard input.

    Raises:
        UsageError: there is no kubectl.
        DataError: the cluster has no such object.
        RetryableError: the cluster does not answer.
        MoeAsrError: the cluster refuses the request.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise UsageError("kubectl is not on PATH: install it, or submit with the argo command line (docs/cluster.md)")
    done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    stderr = " ".join(done.stderr.split())
    if "NotFound" in stderr or "not found" in stderr:
        raise DataError(stderr)
    if any(word in stderr for word in ("refused", "timeout", "no such host", "unreachable", "Unable to connect")):
        raise RetryableError(f"the cluster of the current kubectl context does not answer: {stderr}")
    raise MoeAsrError(f"kubectl {arguments[0]}: {stderr}")


def get(kind: str, namespace: str | None, *arguments: str) -> Any:
    """An object, or a list of objects, as JSON."""
    return json.loads(kubectl("get", kind, *arguments, *_place(namespace), "-o", "json"))


def create(thing: Mapping[str, Any], namespace: str | None) -> dict[str, Any]:
    """Creates an object and returns it as the cluster has it."""
    made = kubectl("create", "-f", "-", *_place(namespace), "-o", "json", text=json.dumps(thing))
    return dict(json.loads(made))


def _place(namespace: str | None) -> list[str]:
    if namespace and not NAME.fullmatch(namespace):
        raise UsageError(f"--namespace {namespace!r} is not a valid name of a namespace")
    return ["-n", namespace] if namespace else []


def find_workflow(name: str, namespace: str | None) -> dict[str, Any]:
    """A workflow by its own name, or the newest one of a run.

    Raises:
        UsageError: the name is not valid for a workflow or a run.
        DataError: there is no such workflow or run.
    """
    if not NAME.fullmatch(name):  # kubectl would take `--kubeconfig=…` for an option
        raise UsageError(
            f"{name!r} is not a valid name of a run or workflow: letters, digits, . _ and -, a letter or digit first"
        )
    listed = get("workflows.argoproj.io", namespace, "-l", f"moe-asr/run={name}")["items"]
    if listed:
        return dict(max(listed, key=lambda workflow: workflow["metadata"]["creationTimestamp"]))
    try:
        return dict(get("workflows.argoproj.io", namespace, name))
    except DataError:
        raise DataError(
            f"no workflow named {name!r} and no workflow of a run named {name!r} in this namespace"
        ) from None
