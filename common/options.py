"""Command-line options as entries of the configuration: one table, from which click's options are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from common.config import GPUS, MODES, SHOWN, Config, parse_yaml, resolve
from common.errors import UsageError
from common.escape import escaped
from common.section_base import Section

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """`flag` sets the configuration's `path`; its help text is the setting's description.

    Attributes:
        value: value that a flag without argument sets.
        help: help text in place of the setting's description.
    """

    flag: str
    path: str
    value: Any = None
    help: str = ""

    @property
    def name(self) -> str:
        """The parameter of a command that receives it."""
        return self.flag.removeprefix("--").replace("-", "_")


RUN_OPTIONS = (
    Option("--seed", "seed"),
    Option("--num-experts", "num_experts"),
    Option("--model", "model.name"),
    Option("--revision", "model.revision"),
    Option("--corpus", "corpus.path"),
    Option("--store", "store"),
    Option("--endpoint-url", "endpoint_url"),
    Option("--run", "run"),
    Option("--gating-batch-size", "gating.batch_size", help="Utterances per batch of the gate's training."),
    Option("--expert-batch-size", "experts.batch_size", help="Utterances per batch of the experts' pre-training."),
    Option("--asr-batch-size", "asr.batch_size", help="Utterances per batch of joint training."),
    Option("--num-workers", "runtime.num_workers"),
    Option("--device", "runtime.device"),
    Option("--processes", "runtime.processes"),
    Option("--clustering-algorithm", "cluster.algorithm"),
    Option("--reduce", "cluster.reduce"),
    Option("--reduce-dim", "cluster.reduce_dim"),
    Option("--plot-method", "cluster.plot"),
    Option("--min-cluster-size", "cluster.min_cluster_size"),
    Option("--mixture", "asr.mixture"),
    Option("--top-k", "asr.top_k"),
    Option("--adapt", "asr.adapt"),
    Option("--audio-context", "audio.context"),
    Option("--save-every-n-epochs", "runtime.save_every_n_epochs"),
    Option("--log-file", "runtime.log_file"),
    Option("--metrics-port", "runtime.metrics_port"),
    Option("--no-reduce-experts", "cluster.reduce_experts", False, "Fail when fewer clusters than experts are found."),
    Option(
        "--use-chunking", "audio.long_audio", "segment", "Cut utterances over 30 s at pauses, with their text aligned."
    ),
    Option("--no-shared-expert", "asr.shared_expert", False, "Train routed experts without a shared one."),
    Option("--gradient-checkpointing", "asr.gradient_checkpointing", True),
    Option("--save-only-best", "runtime.save_only_best", True),
    Option("--quiet", "runtime.quiet", True),
    Option("--fp16", "precision", "fp16", "Train in fp16 with a loss scaler. The default depends on the device."),
    Option("--bf16", "precision", "bf16", "Train in bf16. The default depends on the device."),
)

# One flag that sets several stages at once.
SHARED_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "--gradient-accumulation-steps": ("experts.gradient_accumulation_steps", "asr.gradient_accumulation_steps"),
    "--eval-every-n-epochs": ("gating.eval_every_n_epochs", "experts.eval_every_n_epochs", "asr.eval_every_n_epochs"),
}


def config_options(function: F) -> F:
    """Adds all options that set configuration values; the command receives them in `**options`."""
    for option in reversed(RUN_OPTIONS):
        function = click_option(option)(function)
    for flag, paths in reversed(list(SHARED_OPTIONS.items())):
        function = click_option(Option(flag, paths[0]), paths)(function)
    for decorate in reversed(BASE_OPTIONS):
        function = decorate(function)
    return function


BASE_OPTIONS = (
    click.option("--mode", type=click.Choice(MODES), help="Shipped configuration to start from.  [default: full]"),
    click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="YAML file that overrides the mode's values."
    ),
    click.option(
        "--gpu",
        type=click.Choice((*GPUS, "auto")),
        help="Preset for a GPU: batch sizes, gradient accumulation, evaluation interval, loader processes and "
        "precision. auto detects the GPU.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any setting of the configuration, such as asr.epochs=3.",
    ),
    click.option(
        "--data-percent",
        type=float,
        help="Share of each subset to keep, in percent; only of the ASR data with --skip-pretraining.",
    ),
    click.option(
        "--skip-pretraining",
        is_flag=True,
        help="Skip pre-training: the gate is initialised randomly and trained jointly with the experts. "
        "Needs --num-experts.",
    ),
    click.option("--no-plot", is_flag=True, help="Draw no plots."),
)


def click_option(option: Option, paths: Sequence[str] = ()) -> Callable[[F], F]:
    """A click option that sets a value of the configuration; `paths` are all that it sets, if several."""
    field = field_of(option.path)
    text = option.help or field.description
    if option.value is not None:
        return click.option(option.flag, option.name, is_flag=True, default=False, help=text)
    text = f"{text} [{', '.join(paths or (option.path,))}]"
    return click.option(option.flag, option.name, type=_click_type(field), default=None, help=text)


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
        options: values that click collected for `config_options`.
        extra: further `path` → value.
        base: configuration to start from instead of a mode's.

    Raises:
        UsageError, ConfigError: an option or value is invalid.
    """
    skip = options.get("skip_pretraining", False)
    if skip and options.get("num_experts") is None:
        raise UsageError("num_experts must be specified: --skip-pretraining needs --num-experts")
    chosen: dict[str, Any] = {}
    for option in RUN_OPTIONS:
        given = options.get(option.name)
        if given is not None and given is not False:
            chosen[option.path] = given if option.value is None else option.value
    for flag, paths in SHARED_OPTIONS.items():
        given = options.get(Option(flag, paths[0]).name)
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
    shown = escaped(text)[:SHOWN]  # escaped first: half of an address with a password does not look like one
    if not equals or not path.strip() or len(path) > SHOWN:
        raise UsageError(f"--set {shown}: write it as section.key=value")
    try:
        return path.strip(), parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {shown}: the value is not YAML ({error})") from None


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
