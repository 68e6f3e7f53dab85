"""Runs on a cluster: submitted, looked at, their logs read."""

import json
import time
from contextlib import suppress
from typing import Any

import click

from cli.table import text_table
from common.console import echo
from common.errors import DataError, MoeAsrError, UsageError
from common.options import config_from, config_options

namespace_option = click.option(
    "--namespace", "-n", help="Namespace of the workflow. The kubectl context's by default."
)


@click.command()
@config_options
@namespace_option
@click.option("--template", help="Name of the WorkflowTemplate. moe-asr-<version> by default.")
@click.option("-p", "--parameter", "given", multiple=True, metavar="NAME=VALUE", help="Any other workflow parameter.")
@click.option("--resume", is_flag=True, help="Continue a run that has another configuration.")
@click.option("--dry-run", is_flag=True, help="Print the workflow instead of submitting it.")
def submit(
    namespace: str | None, template: str | None, given: tuple[str, ...], resume: bool, dry_run: bool, **options: Any
) -> None:
    """Run the pipeline on the cluster of the current kubectl context, as an Argo workflow.

    \b
        moe-asr submit --config my.yaml --gpu h100-80 --store s3://bucket/runs
        moe-asr submit --corpus s3://bucket/corpus --gpu a100-80 --store s3://bucket/runs -p parallelism=8 --processes 4
    """
    from argo.kubectl import create
    from argo.parameters import template_name
    from argo.submit import chosen_parameters, make_workflow, submission

    config = config_from(options)
    parameters = submission(config, mode=options["mode"], file=options["config_file"], gpu=options["gpu"])
    parameters |= {"resume": "true"} if resume else {}
    parameters |= chosen_parameters(dict(_pair(text) for text in given))
    workflow = make_workflow(template or template_name(), parameters)
    if dry_run:
        echo(json.dumps(workflow, indent=1))
        return
    made = create(workflow, namespace)
    name, place = made["metadata"]["name"], made["metadata"]["namespace"]
    echo(f"submitted {name} in namespace {place}; to follow it:")
    echo(f"  moe-asr status --cluster -n {place} {name}")
    echo(f"  moe-asr logs --cluster -n {place} {name}")
    echo(f"  argo watch -n {place} {name}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"-p {text}: write it as name=value")
    return name, value


def show_workflow(name: str, namespace: str | None, *, as_json: bool) -> None:
    """Prints the steps of a workflow, and why those that wait do so."""
    from argo.kubectl import find_workflow
    from argo.progress import phase, workflow_steps

    workflow = find_workflow(name, namespace)
    if as_json:
        echo(json.dumps(workflow, indent=1))
        return
    steps = workflow_steps(workflow)
    status = workflow.get("status", {})
    echo(f"workflow {workflow['metadata']['name']}: {phase(workflow)} {status.get('progress', '')}".rstrip())
    waiting = _waiting(workflow)
    rows = []
    for step in steps:
        reason = next((waiting[t.pod] for t in step.tries if t.pod in waiting), step.message)
        state = "from cache" if step.hit else step.phase
        rows.append((step.label, state, _duration(step.started, step.finished), str(len(step.tries)), reason))
    echo(text_table(("task", "state", "took", "pods", "message"), rows))
    if status.get("message") and phase(workflow) != "Succeeded":
        echo(status["message"])


def _duration(started: float | None, finished: float | None) -> str:
    return f"{(finished or time.time()) - started:.0f} s" if started else ""


def _waiting(workflow: dict[str, Any]) -> dict[str, str]:
    """Node id → why its pod does not run yet."""
    from argo.kubectl import get
    from argo.progress import explain

    metadata = workflow["metadata"]
    label = f"workflows.argoproj.io/workflow={metadata['name']}"
    pods = get("pods", metadata["namespace"], "-l", label, "--field-selector", "status.phase=Pending")["items"]
    nodes: list[Any] = []
    with suppress(MoeAsrError):  # many users may not look at nodes: then Kubernetes' own message has to do
        nodes = get("nodes", None)["items"] if pods else []
    return {pod["metadata"]["annotations"]["workflows.argoproj.io/node-id"]: explain(pod, nodes) for pod in pods}


def show_workflow_logs(name: str, stage: str | None, namespace: str | None) -> None:
    """Prints what the pods of a workflow, or of one stage of it, have said.

    Raises:
        DataError: none of its pods is left.
    """
    from argo.kubectl import find_workflow, get, kubectl

    metadata = find_workflow(name, namespace)["metadata"]
    label = f"workflows.argoproj.io/workflow={metadata['name']}"
    label += f",app.kubernetes.io/component={stage}" if stage else ""
    pods = get("pods", metadata["namespace"], "-l", label)["items"]
    if not pods:
        raise DataError(f"no pod of {name} {stage or ''} is left: finished pods are deleted after a while (podGC)")
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"]):
        if pod["status"]["phase"] != "Pending":
            said = kubectl("logs", "-n", metadata["namespace"], pod["metadata"]["name"], "-c", "main")
            for line in said.splitlines():
                if "argo=true" in line:  # Argo's own, of its wrapper around the stage
                    continue
                echo(f"{pod['metadata']['labels']['app.kubernetes.io/component']}: {line}")
