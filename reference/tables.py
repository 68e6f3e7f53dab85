"""Tables of exit codes, stages, manifests, metrics, alerts and parameters, from the code that defines them."""

import dataclasses
import inspect
import re

from argo.parameters import PARAMETERS
from common import errors
from common.storage.manifest import Manifest
from common.telemetry import MEMORY, METRICS, STAGE
from dashboards.rules import rule_files
from reference.blocks import table
from stages import STAGES

# Codes that no exception stands for.
OTHER_CODES = (
    (errors.EXIT_DONE, "", "done"),
    (errors.EXIT_FAULT, "any other exception", "bug in moe-asr: please report the traceback"),
    (errors.EXIT_INTERRUPTED, "", "interrupted by Ctrl-C outside of a run's stages, or a second time"),
    (137, "", "killed, usually out of memory"),
    (141, "", "the reader closed the pipe (`moe-asr … | head`)"),
)
AGAIN = (75, 137, 143)  # what a cluster retries by itself


def exit_code_rows() -> list[str]:
    """Every exit code: its exception, what it means, whether a cluster retries it."""
    rows = list(OTHER_CODES)
    for kind in errors.MoeAsrError.__subclasses__():
        if "exit_code" in vars(kind) and kind.__module__ == errors.__name__:
            rows.append((kind.exit_code, f"`{kind.__name__}`", " ".join((kind.__doc__ or "").split()).rstrip(".")))
    lines = [
        (str(code), who, what, "yes" if code in AGAIN else "") for code, who, what in sorted(rows, key=lambda r: r[0])
    ]
    return table(("code", "raised as", "what it means", "retried on a cluster"), lines)


def stage_rows() -> list[str]:
    """Every stage: what it reads, what it writes."""
    rows = []
    for contract in STAGES:
        reads = ", ".join((*contract.sources, *contract.inputs))
        tasks = "one per shard or cluster" if contract.fan_out else "one"
        rows.append((f"`{contract.name}`", contract.summary, reads, contract.output, tasks, str(contract.gpus)))
    return table(("stage", "what it makes", "reads", "writes", "tasks", "GPUs"), rows)


def manifest_rows() -> list[str]:
    """Every field of a manifest."""
    told = _attributes(Manifest.__doc__ or "")
    return table(
        ("field", "what it is"),
        [(f"`{f.name}`", told.get(f.name) or FIELDS[f.name]) for f in dataclasses.fields(Manifest)],
    )


# Fields that speak for themselves in the code.
FIELDS = {
    "schema": "format of this file",
    "stage": "name of the stage",
    "key": "the key, 32 hexadecimal digits",
    "shard": "number of the task in its stage; null for a stage of one task",
    "ingredients": "what the key was made of, in plain text: configuration values, input keys, format",
    "version": "version of moe-asr",
    "host": "name of the machine that made it",
    "metrics": "figures of the stage, and the last values of its live metrics",
}


def metric_rows() -> list[str]:
    """Every metric: its kind, and its labels beyond those of all stages."""
    rows = []
    for metric in (*METRICS, MEMORY):
        labels = ", ".join(label for label in metric.labels if label not in STAGE)
        rows.append((f"`{metric.name}`", metric.kind, labels, metric.help))
    return table(("metric", "kind", "further labels", ""), rows)


def alert_rows() -> list[str]:
    """Every alert: how long it waits, what it says."""
    rules = [rule for group in rule_files()["alerts.yaml"]["groups"] for rule in group["rules"]]
    rows = [(f"`{r['alert']}`", r["labels"]["severity"], r["for"], f"{r['annotations']['summary']}.") for r in rules]
    return table(("alert", "severity", "after", ""), rows)


def parameter_rows() -> list[str]:
    """Every parameter of the workflow."""
    rows = []
    for name, (value, text) in PARAMETERS.items():
        shown = "" if not value else "(see `argo/parameters.py`)" if len(value) > 40 else f"`{value}`"
        rows.append((f"`{name}`", shown, text))
    return table(("parameter", "default", ""), rows)


def _attributes(text: str) -> dict[str, str]:
    """name → description, of an `Attributes:` paragraph."""
    body = inspect.cleandoc(text).partition("Attributes:\n")[2]
    attributes = re.findall(r"^    (\w+): (.+(?:\n     .+)*)", body, flags=re.M)
    return {name: " ".join(words.split()) for name, words in attributes}
