"""The configuration: one YAML tree, validated, frozen, and merged from mode, GPU preset and options.

Only stages and commands read it; they pass plain arguments to the modules. `common.sections` describes each setting.
"""

import difflib
import reprlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from common.errors import ConfigError, UsageError
from common.section_base import CREDENTIALS, Section, refuse_credentials
from common.sections import (
    AdaloraConfig,
    AsrConfig,
    AudioConfig,
    AugmentConfig,
    ClusterConfig,
    CorpusConfig,
    DecodeConfig,
    ExpertsConfig,
    ExtractConfig,
    GatingConfig,
    LoraConfig,
    ModelConfig,
    RuntimeConfig,
    SubsetsConfig,
)

MODES = ("full", "quick", "demo")
# Locations, not content: may differ within a run, and are never taken from a record in a store.
PLACES = ("store", "run", "endpoint_url", "corpus.path", "model.name")
LONGEST, DEEPEST = 2**20, 50  # characters of a YAML text, and brackets in brackets
SHOWN = 120  # characters of a value or a reason in an error
GPUS = ("a100-40", "a100-80", "h100-80", "h200-141", "cpu")


class Config(Section):
    """All of it. `store` and `run` say where results go, never what they are."""

    run: str = Field("full", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run in the store.")
    store: str = Field("runs", description="Folder or s3://bucket/prefix for all results.")
    endpoint_url: str | None = Field(None, description="Endpoint of an S3-compatible store.")
    seed: int = Field(42, ge=0, lt=2**32, description="Random seed for data order, initialisation and dropout.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="Training precision. auto uses bf16 on GPUs that support it, fp16 with a loss scaler on older "
        "GPUs, and fp32 on CPUs.",
    )
    num_experts: int | None = Field(
        8, gt=0, description="Number of routed experts, and of clusters. 1 trains one adapter for all speakers."
    )
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = ModelConfig()
    audio: AudioConfig = AudioConfig()
    augment: AugmentConfig = AugmentConfig()
    subsets: SubsetsConfig = SubsetsConfig()
    extract: ExtractConfig = ExtractConfig()
    cluster: ClusterConfig = ClusterConfig()
    lora: LoraConfig = LoraConfig()
    adalora: AdaloraConfig = AdaloraConfig()
    gating: GatingConfig = GatingConfig()
    experts: ExpertsConfig = ExpertsConfig()
    asr: AsrConfig = AsrConfig()
    decode: DecodeConfig = DecodeConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    _no_credentials = field_validator("store")(refuse_credentials)

    @field_validator("endpoint_url")
    @classmethod
    def _server_alone(cls, url: str | None) -> str | None:
        if url and ("@" in url or "?" in url):
            raise PydanticCustomError("credentials", CREDENTIALS)
        return url


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (`section.key`, value) for every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def known_paths() -> list[str]:
    """Every `section.key` that a configuration may hold."""
    return [path for path, _ in flatten(Config().model_dump())]


def read_values(config: Config, reads: tuple[str, ...]) -> dict[str, Any]:
    """The flattened values under the sections or keys named in `reads`: what goes into a stage's key."""
    values = dict(flatten(config.model_dump(mode="json")))
    picked = {p: v for p, v in values.items() if any(p == r or p.startswith(f"{r}.") for r in reads)}
    assert all(any(p == r or p.startswith(f"{r}.") for p in picked) for r in reads), f"no such config value in {reads}"
    return picked


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: the file cannot be read, is not YAML or contains no mapping.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except ValueError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {path} must contain a mapping of sections (found {type(tree).__name__})")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML loader without aliases and with limited nesting: a few lines with aliases can expand to more values than fit
    into memory, and the time to parse brackets grows with the square of their depth.
    """

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise ValueError("it is nested too deeply")
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not used here: write the value itself")
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: the text is not YAML; the message is one short line.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:SHOWN]) from None


def shipped(*parts: str) -> Path:
    """A file of `conf/`, from the source tree or the installed package."""
    return Path(str(files("conf").joinpath(*parts)))


def resolve(
    mode: str | None,
    *,
    base: Config | None = None,
    gpu: str | None = None,
    file: Path | None = None,
    tree: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    data_percent: float | None = None,
) -> Config:
    """Merges mode file, user's file, GPU preset and options, in that order, into a validated configuration.

    Args:
        mode: `full`, `quick` or `demo`; None starts from `base`, or the defaults.
        base: a whole configuration to start from.
        gpu: a preset's name (GPUS), already resolved from `auto`.
        file: the user's YAML file, merged over the mode's.
        tree: the content of the user's file, if it is already read.
        options: `section.key` → value, from the command line.
        data_percent: scales the subsets; with `asr.pretrain: none` only the ASR subset.

    Raises:
        ConfigError: a value or name that does not validate.
    """
    merged: dict[str, Any] = base.model_dump(mode="json") if base else {}
    if mode is not None:
        if mode not in MODES:
            raise UsageError(f"--mode {mode}: unknown mode; choose one of {', '.join(MODES)}")
        merge(merged, read_yaml(shipped(f"{mode}.yaml")))
    if file is not None:
        merge(merged, read_yaml(file))
    merge(merged, tree or {})
    if gpu is not None:
        if gpu not in GPUS:
            raise UsageError(f"--gpu {gpu}: unknown preset; choose one of auto, {', '.join(GPUS)}")
        merge(merged, read_yaml(shipped("gpu", f"{gpu}.yaml")))
    for path, value in (options or {}).items():
        merge(merged, nest(path, value))
    config = validate(merged)
    return scale_subsets(config, data_percent) if data_percent is not None else config


def merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Merges `over` into `tree`, section by section, in place."""
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            merge(tree[name], value)
        else:
            tree[name] = dict(value) if isinstance(value, Mapping) else value


def nest(path: str, value: Any) -> dict[str, Any]:
    """`a.b`, v → {"a": {"b": v}}."""
    head, _, rest = path.partition(".")
    return {head: nest(rest, value) if rest else value}


def validate(tree: Mapping[str, Any]) -> Config:
    """Builds the configuration; the error names the path, the value and, for a typo, the nearest valid name.

    Raises:
        ConfigError: a value does not validate; the message describes the first such value and gives the number of
            others.
    """
    try:
        config = Config.model_validate(tree)
    except ValidationError as failed:
        problems = failed.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(_explain(problems[0]) + more) from None
    batches, processes = config.asr.gradient_accumulation_steps, config.runtime.processes
    if batches % processes:
        raise ConfigError(
            f"runtime.processes: {processes} processes cannot share the {batches} batches of a step equally; set "
            f"--gradient-accumulation-steps {processes} or a multiple, and lower --asr-batch-size accordingly"
        )
    first, last = config.adalora.init_rank, config.adalora.target_rank or config.lora.rank
    if config.asr.adapt == "adalora" and first is not None and first < last:
        raise ConfigError(
            f"adalora.init_rank: {first} is below the mean rank of {last} at the end (adalora.target_rank, else "
            "lora.rank), so that no rank would be removed"
        )
    if processes > 1 and config.runtime.device.startswith("cuda:"):
        raise ConfigError(f"runtime.device: {config.runtime.device} is one GPU, but {processes} processes need as many")
    return config


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])[:SHOWN]
    if problem["type"] == "credentials":
        return f"{path}: {problem['msg']}"
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}; got {_shown(problem['input'])}"
    near = difflib.get_close_matches(path, [*known_paths(), *Config.model_fields], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; `moe-asr config show` lists all names"
    return f"{path}: no such setting{hint}"


def _shown(value: Any) -> str:
    """The Python representation of a value, truncated if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"


def scale_subsets(config: Config, data_percent: float) -> Config:
    """Applies `--data-percent`: scales each training subset, given in percent or as a number of utterances, or only the
    ASR subset if nothing is pre-trained.
    """
    if not 0 < data_percent <= 100:
        raise UsageError(f"--data-percent {data_percent}: must be above 0 and at most 100")
    subsets, scaled = config.subsets, {}
    for name in ("asr",) if config.asr.pretrain == "none" else ("embeddings", "experts", "asr"):
        percent, samples = (getattr(subsets, f"{name}_{unit}") for unit in ("percent", "samples"))
        scaled[f"{name}_percent"] = percent * data_percent / 100
        scaled[f"{name}_samples"] = samples and max(1, round(samples * data_percent / 100))
    return config.model_copy(update={"subsets": subsets.model_copy(update=scaled)})


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `--config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
