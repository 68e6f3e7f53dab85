"""The parameters of the workflow, which `argo submit -p name=value` can set, and the settings of its installation."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from common import __version__

GPU_LABEL = "nvidia.com/gpu.product"

# GPU preset → values of the node label that GPU feature discovery sets.
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "a100-40": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "a100-80": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    "h100-80": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
    "h200-141": ("NVIDIA-H200",),
    "cpu": ("none",),
}

GROWS = "doubled, then quadrupled after running out of memory"
# name → (default, description): what `argo submit -p name=value` sets.
PARAMETERS: Mapping[str, tuple[str, str]] = {
    "mode": ("", "shipped configuration to start from: full, quick or demo; full where no config is given"),
    "config": ("", "text of a YAML file that overrides the mode's values"),
    "gpu": ("h100-80", "preset: a100-40, a100-80, h100-80, h200-141 or cpu"),
    "settings": ("", "further settings, one section.key=value per line"),
    "run": ("", "name of the run in the store; the configuration's by default"),
    "store": ("", "s3://bucket/prefix of all results, or a mounted folder"),
    "endpoint-url": ("", "endpoint of an S3-compatible store"),
    "resume": ("false", "true: continue a run that has another configuration"),
    "verify": ("false", "true: the plan re-hashes all finished results, and damaged ones are recomputed"),
    "parallelism": ("4", "tasks of one stage that run at once"),
    "gpus": ("1", "GPUs of joint training"),
    "gpu-products": ("", f"comma-separated values of node label {GPU_LABEL} instead of the preset's"),
    "gpu-table": (json.dumps(PRODUCTS), "values of this node label for every preset, as JSON"),
    "gpu-stage-cpu": ("4", "CPUs of a stage with a GPU"),
    "gpu-stage-memory": ("32", f"memory of a stage with a GPU, in GiB; {GROWS}"),
    "cpu-stage-cpu": ("2", "CPUs of a stage without a GPU"),
    "cpu-stage-memory": ("8", f"memory of a stage without a GPU, in GiB; {GROWS}"),
    "step-cpu": ("250m", "CPUs of plan, report and outcome"),
    "step-memory": ("2", "memory of plan, report and outcome, in GiB"),
    "shm-size": ("8Gi", "size of /dev/shm, which loader processes share"),
    "scratch-size": ("200Gi", "limit of a pod's scratch folder: inputs, model and checkpoints"),
    "retries": ("5", "maximum number of retries of a task that loses its node or meets a temporary fault"),
    "stage-deadline": ("259200", "seconds that one attempt at a stage may take"),
    "queue": ("", "Kueue's local queue"),
    "artifacts": ("false", "true: also save report and summary to Argo's artifact repository"),
}

# The same for the template that adds experts to a finished model.
EXTEND_PARAMETERS: dict[str, tuple[str, str]] = {
    "parent": ("", "run in the store that experts are added to"),
    "corpus": ("", "s3://bucket/prefix of the new speech with text, or a mounted folder"),
    "speakers": ("", 'who gets an expert, as JSON: ["F07", "F08", "etiology=ataxia"]'),
    "method": ("auto", "way to add them: auto, choose, gates, expert, neighbour or shared"),
} | {name: entry for name, entry in PARAMETERS.items() if name not in ("resume", "verify", "artifacts")}
EXTEND_PARAMETERS |= {"run": ("", "name of the run with the added experts; PARENT-extended by default")}


@dataclass(frozen=True, slots=True)
class Installation:
    """Settings of the template's installation, which are not parameters: users who may only refer to the template can
    run only these images, with this account, these credentials and this priority.

    Attributes:
        registry, tag: the image of a stage is <registry>/<stage>:<tag>.
        digests: stage → digest of its image (`sha256:…`), which is then used instead of the tag.
        service_account: account of all pods; needs create and patch on workflowtaskresults.
        store_secret: Secret with the store's credentials (AWS_*); may be missing.
        webhook_secret: Secret whose key `url` is the address to which the outcome is posted; may be missing.
        priority_class: priority class of all pods.
    """

    registry: str = "moe-asr"
    tag: str = __version__
    digests: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"
    store_secret: str = "moe-asr-store"
    webhook_secret: str = "moe-asr-webhook"
    priority_class: str = ""

    def image(self, stage: str) -> str:
        """Name of a stage's image."""
        digest = self.digests.get(stage)
        return f"{self.registry}/{stage}@{digest}" if digest else f"{self.registry}/{stage}:{self.tag}"


# What a quantity of CPU or memory is: decimal, with a suffix or none. Without `?`, which would end Argo's condition.
QUANTITY = "^[0-9]+([.][0-9]+|)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|)$"
# Whole numbers, so that nothing else reaches a pod's patch.
NUMBERS = ("parallelism", "gpus", "gpu-stage-memory", "cpu-stage-memory", "step-memory", "retries", "stage-deadline")
QUANTITIES = ("gpu-stage-cpu", "cpu-stage-cpu", "step-cpu", "shm-size", "scratch-size")
FLAGS = ("resume", "verify", "artifacts")


def template_name(name: str = "moe-asr") -> str:
    """Name of an installed template: it holds the version, so that templates of several versions can be installed."""
    return f"{name}-{__version__}"


def parameter(name: str) -> str:
    """The template tag of a workflow parameter."""
    assert name in PARAMETERS or name in EXTEND_PARAMETERS, name
    return f"{{{{workflow.parameters.{name}}}}}"


def quantity(name: str) -> str:
    """The tag of a parameter in a pod's patch: its value if that is a quantity, otherwise a text that Kubernetes
    refuses.

    Argo inserts a value into the text of the patch without escaping, so that it could change any part of a pod.
    """
    assert name in QUANTITIES, name
    value = f"workflow.parameters['{name}']"
    return f"{{{{={value} matches '{QUANTITY}' ? {value} : 'parameter {name} is no quantity'}}}}"


def find_problem(name: str, value: str) -> str:
    """The reason why a value is not valid for a parameter; empty if it is valid."""
    if name in NUMBERS and not re.fullmatch("[0-9]{1,9}", value):
        return "give a whole number"
    if name in QUANTITIES and not re.fullmatch(QUANTITY, value):
        return "give a Kubernetes quantity, as 500m, 2, 1.5 or 200Gi"
    if name in FLAGS and value not in ("true", "false"):
        return "give true or false"
    return ""
