"""From a configuration to a submitted workflow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argo.parameters import PARAMETERS, PRODUCTS, find_problem
from common.config import Config, flatten, resolve
from common.data.sources import is_hub_name
from common.errors import UsageError

# Parameters of their own, so not among the settings.
OWN = ("store", "endpoint_url", "run", "runtime.processes")


def submission(config: Config, *, mode: str | None, file: Path | None, gpu: str | None) -> dict[str, str]:
    """The workflow parameters from which its pods compute the same configuration; all of them, even the empty ones,
    since the template may have other defaults.

    Args:
        config: the configuration from mode, file, preset and all other options.
        mode, file, gpu: the options as given.

    Raises:
        UsageError: a location is not accessible for the pods.
    """
    if gpu is None or gpu not in PRODUCTS:
        raise UsageError(f"--gpu {gpu or 'is missing'}: choose the preset of the cluster's GPUs: {', '.join(PRODUCTS)}")
    check_reachable(config)
    base = resolve(mode or (None if file else "full"), file=file, gpu=gpu)
    before = dict(flatten(base.model_dump(mode="json")))
    changed = {k: v for k, v in flatten(config.model_dump(mode="json")) if before[k] != v and k not in OWN}
    return {
        "mode": mode or ("" if file else "full"),
        "config": file.read_text(encoding="utf-8") if file else "",
        "gpu": gpu,
        "settings": "\n".join(f"{path}={json.dumps(value)}" for path, value in changed.items()),
        "run": config.run,
        "store": config.store,
        "endpoint-url": config.endpoint_url or "",
        "gpus": str(config.runtime.processes),
    }


def check_reachable(config: Config) -> None:
    """Refuses locations that exist only on this machine.

    Raises:
        UsageError: there is such a location; the message names the first.
    """
    for path, value in (
        ("store", config.store),
        ("corpus.path", config.corpus.path),
        ("model.name", config.model.name),
    ):
        if path == "model.name" and is_hub_name(value):
            continue
        if "://" not in value and not Path(value).is_absolute():
            raise UsageError(
                f"{path} {value!r} is a place on this machine: give s3://bucket/prefix, or the path of a folder that "
                "is mounted into the pods"
            )


def chosen_parameters(given: Mapping[str, str]) -> dict[str, str]:
    """Checks the names and values of `-p name=value`.

    Raises:
        UsageError: the template has no such parameter, or the value is invalid.
    """
    for name in given:
        if name not in PARAMETERS:
            raise UsageError(f"-p {name}: the workflow has no such parameter; it has {', '.join(PARAMETERS)}")
        if problem := find_problem(name, given[name]):
            raise UsageError(f"-p {name}={given[name]}: {problem}")
    return dict(given)


def make_workflow(template: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """The object to be created: a reference to the template and its parameters."""
    from hera.workflows import Parameter, Workflow
    from hera.workflows import models as m

    workflow = Workflow(
        generate_name=f"moe-asr-{parameters['run'].lower().replace('_', '-').replace('.', '-')}-",
        workflow_template_ref=m.WorkflowTemplateRef(name=template),
        arguments=[Parameter(name=name, value=value) for name, value in parameters.items()],
    )
    made: dict[str, Any] = workflow.to_dict()
    return made
