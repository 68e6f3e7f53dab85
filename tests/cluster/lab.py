"""A real cluster for the tests: Kubernetes with Argo, an S3 server, images, and the runs that are submitted to it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from argo import progress
from argo.parameters import Installation
from argo.workflow import to_text
from common.config import Config, validate
from common.storage import open_store
from common.storage.store import Store

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = os.environ.get("MOE_ASR_TEST_NAMESPACE", "argo")
TOOL = os.environ.get("KUBELAB", str(ROOT.parent / "shared" / "kubelab" / "kubelab"))
BUCKET = "moe-asr-cluster"
STAGES = ("extract", "cluster", "gating", "experts", "asr")
# So small that pods of two CPU cores hold them side by side.
SMALL = {
    "gpu-stage-cpu": "200m",
    "gpu-stage-memory": "2",
    "cpu-stage-cpu": "200m",
    "cpu-stage-memory": "2",
    "step-cpu": "100m",
    "step-memory": "1",
    "shm-size": "64Mi",
    "scratch-size": "2Gi",
}


class NoClusterError(Exception):
    """No cluster can be had here; the message says why."""


def command(*words: str | Path, text: str | None = None, timeout: float = 600) -> str:
    """Standard output of a command.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run([str(w) for w in words], input=text, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{shlex.join(str(w) for w in words)}: {done.stderr[-2000:]}"
    return done.stdout


def kubectl(*words: str, text: str | None = None) -> str:
    return command("kubectl", *words, text=text)


@contextmanager
def running_cluster() -> Iterator[None]:
    """The cluster of $KUBECONFIG, or one that kubelab brings up and that goes down afterwards.

    Raises:
        NoClusterError: there is neither.
    """
    if os.environ.get("KUBECONFIG"):
        missing = [n for n in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if n not in os.environ]
        if missing:
            raise NoClusterError(f"$KUBECONFIG is set, but not {', '.join(missing)} of an S3 server for pods")
        yield
        return
    if not Path(TOOL).is_file():
        raise NoClusterError(f"$KUBECONFIG is not set, and there is no {TOOL} to bring a cluster up ($KUBELAB)")
    up = subprocess.run([TOOL, "status"], capture_output=True).returncode == 0
    try:
        for words in [] if up else [["build"], ["up"]]:
            done = subprocess.run([TOOL, *words], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise NoClusterError(f"{TOOL} {words[0]} failed: {done.stderr[-1500:]}")
        os.environ |= exports(command(TOOL, "env")) | exports(command(TOOL, "s3", "up"))
        yield
    finally:
        if not up:
            subprocess.run([TOOL, "down"], check=False)


def exports(text: str) -> dict[str, str]:
    """The variables of `export NAME=value` lines."""
    variables: dict[str, str] = {}
    for line in text.splitlines():
        for word in shlex.split(line, comments=True)[1:]:
            name, _, value = word.partition("=")
            variables[name] = value.replace("$PATH", os.environ["PATH"])
    return variables


@dataclass
class Lab:
    """What the tests work with.

    Attributes:
        endpoint: the S3 server, for this machine and for pods.
        registry, tag: of the stages' images.
        template: name of the installed WorkflowTemplate.
        wrong: name of one whose Secret holds other credentials than the store's.
        kept: folder for what is worth a look afterwards.
    """

    endpoint: str
    registry: str
    tag: str
    template: str
    wrong: str
    kept: Path

    def store(self, name: str) -> Store:
        """A store in the test bucket."""
        return open_store(f"s3://{BUCKET}/{name}", endpoint_url=self.endpoint)

    def config(self, name: str, **changes: Any) -> Config:
        """The configuration of a run in store `name`, as pods and this machine see it."""
        return validate(self.tree(**changes) | {"store": f"s3://{BUCKET}/{name}", "endpoint_url": self.endpoint})

    def tree(self, **changes: Any) -> dict[str, Any]:
        """The user's YAML; `changes` are `section__key` values."""
        tree: dict[str, Any] = {
            "run": "micro",
            "corpus": {"path": f"s3://{BUCKET}/corpus"},
            "model": {"name": f"s3://{BUCKET}/model"},
            "num_experts": 2,
            "subsets": {"embeddings_percent": 100, "experts_percent": 50, "dev_samples": 8, "test_samples": 12},
            "lora": {"rank": 2, "alpha": 4, "shared_rank": 4, "targets": ["q_proj", "fc1"]},
            "cluster": {"plot": "none", "algorithm": "spectral"},
            "gating": {"epochs": 2, "batch_size": 16},
            "experts": {"epochs": 2, "batch_size": 8},
            "asr": {"epochs": 2, "batch_size": 8, "select_samples": 4, "pretrain": "alone"},
            "decode": {"max_new_tokens": 6},
            "runtime": {"num_workers": 0, "device": "cpu", "quiet": True, "plots": False, "save_every_n_epochs": 1},
        }
        for path, value in changes.items():
            section, _, key = path.partition("__")
            tree[section] = {**tree[section], key: value} if key else value
        return tree

    def submit(
        self, name: str, tree: Mapping[str, Any] | None = None, template: str | None = None, **parameters: str
    ) -> str:
        """Submits a run into store `name` with kubectl alone; returns the workflow's name.

        The preset is `h100-80`, with its batch sizes set back to the small ones of the configuration.
        """
        config = dict(tree or self.tree())
        values = {"config": yaml.safe_dump(config), "gpu": "h100-80", "settings": small_settings(config)}
        values |= {"store": f"s3://{BUCKET}/{name}", "endpoint-url": self.endpoint}
        values |= SMALL | parameters
        workflow = {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {"generateName": "test-", "namespace": NAMESPACE},
            "spec": {
                "workflowTemplateRef": {"name": template or self.template},
                "podGC": {"strategy": "OnPodSuccess", "deleteDelayDuration": "7200s"},  # tests look at them
                "arguments": {"parameters": [{"name": n, "value": v} for n, v in values.items()]},
            },
        }
        return kubectl("create", "-f", "-", "-o", "jsonpath={.metadata.name}", text=json.dumps(workflow))

    def submit_by_command(self, name: str, folder: Path) -> str:
        """The same with `moe-asr submit`."""
        file = folder / "my.yaml"
        file.write_text(yaml.safe_dump(self.tree()), encoding="utf-8")
        words = ["submit", "--config", file, "--gpu", "h100-80", "--store", f"s3://{BUCKET}/{name}"]
        words += ["--endpoint-url", self.endpoint, "--namespace", NAMESPACE, "--template", self.template]
        words += [w for line in small_settings(self.tree()).splitlines() for w in ("--set", line)]
        words += [w for n, v in SMALL.items() for w in ("-p", f"{n}={v}")]
        return command(sys.executable, "-m", "cli.main", *words).split()[1]


def until(true: Callable[[], Any], seconds: float = 120) -> None:
    """Returns once the function says true.

    Raises:
        AssertionError: it takes longer.
    """
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not so after {seconds:.0f} s"
        time.sleep(0.5)


def small_settings(tree: Mapping[str, Any]) -> str:
    """Settings that undo what the preset `h100-80` would change, so that a local run has the same configuration."""
    wanted = {"runtime.num_workers": 0, "runtime.save_every_n_epochs": 1}
    for stage in ("gating", "experts", "asr"):
        wanted[f"{stage}.batch_size"] = tree.get(stage, {}).get("batch_size", 8)
        wanted[f"{stage}.eval_every_n_epochs"] = 1
    for stage in ("experts", "asr"):
        wanted[f"{stage}.gradient_accumulation_steps"] = 1
    return "\n".join(f"{path}={value}" for path, value in wanted.items())


def workflow(name: str) -> dict[str, Any]:
    """The Workflow object as it is now."""
    return dict(json.loads(kubectl("get", "workflow", name, "-n", NAMESPACE, "-o", "json")))


def wait(name: str, until: Callable[[dict[str, Any]], Any] | None = None, seconds: float = 600) -> dict[str, Any]:
    """The Workflow object once it is finished, or once `until` is true of it.

    Raises:
        AssertionError: it takes longer, or it finished without.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        flow = workflow(name)
        done = progress.phase(flow) in ("Succeeded", "Failed", "Error")
        if (until is None and done) or (until is not None and until(flow)):
            return flow
        assert not done, f"{name} ended {progress.phase(flow)}: {told(flow)}"
        time.sleep(1)
    raise AssertionError(f"{name} is {progress.phase(flow)} after {seconds:.0f} s: {told(flow)}")


def told(flow: Mapping[str, Any]) -> str:
    """All tasks and their messages, for the reader of a failed test."""
    lines = [f"{p.label}: {p.phase}, {len(p.tries)} pods, {p.message}" for p in progress.workflow_steps(flow)]
    return "\n".join([str(flow.get("status", {}).get("message", "")), *lines])


def succeeded(name: str, seconds: float = 600) -> dict[str, progress.WorkflowStep]:
    """Waits for success; label → task."""
    flow = wait(name, seconds=seconds)
    assert progress.phase(flow) == "Succeeded", told(flow)
    return {task.label: task for task in progress.workflow_steps(flow)}


def install_template(place: Installation, suffix: str = "") -> str:
    """Applies a WorkflowTemplate as `python -m argo` prints it, its name with a suffix; returns the name."""
    template = yaml.safe_load(to_text(place))
    template["metadata"]["name"] += suffix
    kubectl("apply", "-n", NAMESPACE, "-f", "-", text=json.dumps(template))
    return str(template["metadata"]["name"])
