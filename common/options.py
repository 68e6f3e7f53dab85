"""Command-line options as entries of the configuration: one table, from which click's options are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import yaml
from pydantic.fields import FieldInfo

from common.config import GPUS, MODES, Config, resolve
from common.errors import UsageError
from common.sections import Section

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """`flag` sets the configuration's `path`; with `value`, the flag takes none and sets that one."""

    flag: str
    path: str
    help: str
    value: Any = None


RUN_OPTIONS = (
    Option("--seed", "seed", "of everything random"),
    Option("--num-experts", "num_experts", "experts, and clusters wanted"),
    Option("--model", "model.name", "base Whisper: hub name, folder or store URI"),
    Option("--revision", "model.revision", "commit of a hub model"),
    Option("--corpus", "corpus.path", "folder or s3://bucket/prefix with index.jsonl"),
    Option("--store", "store", "folder or s3://bucket/prefix for all results"),
    Option("--endpoint-url", "endpoint_url", "of an S3-compatible store"),
    Option("--run", "run", "name of the run in the store; the mode's name by default"),
    Option("--gating-batch-size", "gating.batch_size", "utterances per batch of the gate"),
    Option("--expert-batch-size", "experts.batch_size", "utterances per batch of an expert"),
    Option("--asr-batch-size", "asr.batch_size", "utterances per batch of joint training"),
    Option("--num-workers", "runtime.num_workers", "loader processes"),
    Option("--device", "runtime.device", "auto, cpu or cuda"),
    Option("--processes", "runtime.processes", "of joint training, one per GPU; they share the batches of a step"),
    Option("--clustering-algorithm", "cluster.algorithm", ""),
    Option("--reduce", "cluster.reduce", "before clustering"),
    Option("--reduce-dim", "cluster.reduce_dim", "dimensions to reduce to"),
    Option("--plot-method", "cluster.plot", "of the cluster map"),
    Option("--min-cluster-size", "cluster.min_cluster_size", "HDBSCAN's, where it starts"),
    Option("--mixture", "asr.mixture", "how experts are mixed"),
    Option("--top-k", "asr.top_k", "experts per utterance"),
    Option("--adapt", "asr.adapt", "LoRA experts, AdaLoRA or all weights"),
    Option("--audio-context", "audio.context", "encoder length"),
    Option("--save-every-n-epochs", "runtime.save_every_n_epochs", "checkpoint at least this often"),
    Option("--log-file", "runtime.log_file", "also log to this file"),
    Option("--metrics-port", "runtime.metrics_port", "serve Prometheus metrics while running; 0 takes any free port"),
    Option("--no-reduce-experts", "cluster.reduce_experts", "fail when fewer clusters than experts are found", False),
    Option("--use-chunking", "audio.long_audio", "cut utterances over 30 s at pauses, their text aligned", "segment"),
    Option("--no-shared-expert", "asr.shared_expert", "train routed experts without a shared one", False),
    Option("--gradient-checkpointing", "asr.gradient_checkpointing", "recompute activations, saving memory", True),
    Option("--save-only-best", "runtime.save_only_best", "keep no checkpoint but the best and the newest", True),
    Option("--quiet", "runtime.quiet", "no progress bars", True),
    Option("--fp16", "precision", "train in fp16 with a loss scaler (default: by device)", "fp16"),
    Option("--bf16", "precision", "train in bf16 (default: by device)", "bf16"),
)

# One flag that sets several stages at once.
SHARED_OPTIONS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "--gradient-accumulation-steps": (
        ("experts.gradient_accumulation_steps", "asr.gradient_accumulation_steps"),
        "batches per optimiser step, of all processes",
    ),
    "--eval-every-n-epochs": (
        ("gating.eval_every_n_epochs", "experts.eval_every_n_epochs", "asr.eval_every_n_epochs"),
        "full evaluation; the epochs between look at the loss only",
    ),
}


def config_options(function: F) -> F:
    """Adds every option that leads to a configuration; the command then gets them in `**options`."""
    for option in reversed(RUN_OPTIONS):
        function = click_option(option.flag, option.path, option.help, option.value)(function)
    for flag, (paths, text) in reversed(list(SHARED_OPTIONS.items())):
        function = click_option(flag, paths[0], text)(function)
    for decorate in reversed(BASE_OPTIONS):
        function = decorate(function)
    return function


BASE_OPTIONS = (
    click.option(
        "--mode", type=click.Choice(MODES), help="Which shipped configuration to start from.  [default: full]"
    ),
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="YAML file laid over the mode's."),
    click.option(
        "--gpu", type=click.Choice((*GPUS, "auto")), help="Batch sizes for this GPU; auto looks at this machine."
    ),
    click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Any other setting, as asr.epochs=3."),
    click.option(
        "--data-percent",
        type=float,
        help="Keep this share of each subset (of the ASR data alone with --skip-pretraining).",
    ),
    click.option(
        "--skip-pretraining", is_flag=True, help="Regular mixture: random gate and experts; needs --num-experts."
    ),
    click.option("--no-plot", is_flag=True, help="Draw no plots."),
)


def click_option(flag: str, path: str, text: str, value: Any = None) -> Callable[[F], F]:
    name = flag.removeprefix("--").replace("-", "_")
    if value is not None:
        return click.option(flag, name, is_flag=True, default=False, help=f"{_sentence(text)}.")
    field = field_of(path)
    return click.option(flag, name, type=_click_type(field), default=None, help=f"{_sentence(text) or path} [{path}].")


def _sentence(text: str) -> str:
    """With a capital first letter; the rest keeps its names and abbreviations."""
    return text[:1].upper() + text[1:]


def field_of(path: str) -> FieldInfo:
    """The declaration of `section.key`."""
    model: type[Section] = Config
    *sections, last = path.split(".")
    for section in sections:
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    return model.model_fields[last]


def _click_type(field: FieldInfo) -> Any:
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return click.Choice([str(kind) for kind in kinds])
    return kinds[0] if kinds[0] in (int, float, str) else str


def config_from(
    options: Mapping[str, Any], extra: Mapping[str, Any] | None = None, *, base: Config | None = None
) -> Config:
    """The configuration that a command's options describe.

    Args:
        options: what click collected for `config_options`.
        extra: further `path` → value.
        base: start from this configuration instead of a mode's.

    Raises:
        UsageError, ConfigError: an option or value that does not fit.
    """
    skip = options.get("skip_pretraining", False)
    if skip and options.get("num_experts") is None:
        raise UsageError("num_experts must be specified: --skip-pretraining needs --num-experts")
    chosen: dict[str, Any] = {}
    for option in RUN_OPTIONS:
        given = options.get(option.flag.removeprefix("--").replace("-", "_"))
        if given is not None and given is not False:
            chosen[option.path] = given if option.value is None else option.value
    for flag, (paths, _) in SHARED_OPTIONS.items():
        given = options.get(flag.removeprefix("--").replace("-", "_"))
        chosen |= dict.fromkeys(paths, given) if given is not None else {}
    if options.get("no_plot"):
        chosen |= {"cluster.plot": "none", "runtime.plots": False}
    if skip:
        chosen["asr.pretrain"] = "none"
    chosen |= dict(parse_setting(text) for text in options.get("settings", ()))
    chosen |= dict(extra or {})
    file = options.get("config_file")
    return resolve(
        options.get("mode") or (None if file or base else "full"),
        base=base,
        gpu=resolve_gpu(options.get("gpu")),
        file=file,
        options=chosen,
        data_percent=options.get("data_percent"),
    )


def parse_setting(text: str) -> tuple[str, Any]:
    """`asr.epochs=3` → ("asr.epochs", 3); values are YAML.

    Raises:
        UsageError: there is no `=`, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {text}: write it as section.key=value")
    try:
        return path.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {text}: {value!r} is not YAML") from None


def resolve_gpu(name: str | None) -> str | None:
    """`auto` → the preset of this machine's GPU by its name and memory; `cpu` without one."""
    if name != "auto":
        return name
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    properties = torch.cuda.get_device_properties(0)
    gigabytes = properties.total_memory / 1e9
    if "H200" in properties.name or gigabytes > 120:
        return "h200-141"
    if "H100" in properties.name or "H800" in properties.name:
        return "h100-80"
    return "a100-80" if gigabytes > 60 else "a100-40"
