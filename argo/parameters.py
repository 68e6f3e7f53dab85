"""The parameters of the workflow: all that `argo submit -p name=value` can set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common import __version__

FILE = Path(__file__).with_name("moe-asr.yaml")  # the generated template
GPU_LABEL = "nvidia.com/gpu.product"

# GPU preset → values of the node label that GPU feature discovery sets.
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "a100-40": ("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    "a100-80": ("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    "h100-80": ("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
    "h200-141": ("NVIDIA-H200",),
    "cpu": ("none",),
}

# name → (default, description): what `argo submit -p name=value` sets.
PARAMETERS: Mapping[str, tuple[str, str]] = {
    "mode": ("", "shipped configuration to start from: full, quick or demo; full where no config is given"),
    "config": ("", "text of a YAML file that is laid over the mode's"),
    "gpu": ("h100-80", "preset: a100-40, a100-80, h100-80, h200-141 or cpu"),
    "settings": ("", "further settings, one section.key=value a line"),
    "run": ("", "name of the run in the store; the configuration's by default"),
    "store": ("", "s3://bucket/prefix of all results, or a mounted folder"),
    "endpoint-url": ("", "of an S3-compatible store"),
    "store-secret": (
        "moe-asr-store",
        "Secret with the store's credentials (AWS_*); may be missing",
    ),
    "resume": ("false", "true: go on in a run that holds another configuration"),
    "verify": ("false", "true: the plan re-hashes every file that it relies on"),
    "parallelism": ("4", "pieces of one stage that run at once"),
    "gpus": ("1", "GPUs of joint training"),
    "gpu-products": ("", f"comma-separated values of node label {GPU_LABEL} instead of the preset's"),
    "gpu-table": (json.dumps(PRODUCTS), "the same for every preset, as JSON"),
    "gpu-stage-cpu": ("4", "CPUs of a stage with a GPU"),
    "gpu-stage-memory": ("32", "its memory in GiB; doubled at each retry after running out of it"),
    "cpu-stage-cpu": ("2", "CPUs of a stage without a GPU"),
    "cpu-stage-memory": ("8", "its memory in GiB; doubled likewise"),
    "step-cpu": ("250m", "CPUs of plan, report and outcome"),
    "step-memory": ("2", "their memory in GiB"),
    "shm-size": ("8Gi", "size of /dev/shm, which loader processes share"),
    "scratch-size": ("200Gi", "limit of a pod's scratch folder: inputs, model and checkpoints"),
    "retries": ("5", "tries after the first, where a piece lost its node or met a passing fault"),
    "stage-deadline": ("259200", "seconds that one try of a stage may take"),
    "registry": ("moe-asr", "where the stages' images are: <registry>/<stage>:<tag>"),
    "tag": (__version__, "of the images"),
    "service-account": ("default", "of all pods; needs create and patch on workflowtaskresults"),
    "priority-class": ("", "of all pods"),
    "queue": ("", "Kueue's local queue"),
    "artifacts": ("false", "true: also hand report and summary to Argo's artifact repository"),
    "webhook-secret": ("moe-asr-webhook", "Secret whose key `url` is an address that gets the outcome; may be missing"),
}


def parameter(name: str) -> str:
    """The tag that stands for a workflow parameter."""
    assert name in PARAMETERS, name
    return f"{{{{workflow.parameters.{name}}}}}"
