"""Trained models on disk: gate, experts and their description, in one folder.

recogniser.json   base model, mixture, audio context, LoRA shape
gate.safetensors gate.json
experts/0/ …      PEFT adapters;  shared/ the always-on one;  dense/ all weights after a full fine-tune
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import DataError
from common.files import read_document
from common.json_files import read_object, write_object
from common.model.adapters import adapter_rank, load_expert, save_expert
from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Mixture, Recogniser, RouterOptions
from common.model.whisper import load_whisper
from common.tensors import check_weights

DESCRIPTION = "recogniser.json"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """Content of recogniser.json.

    Attributes:
        base: name of the base model as configured; `base_digest` is its digest in keys.
        layer, pooling: encoder layer and pooling of the gate's embeddings.
        context, margin: audio context of training, to be used in transcription too.
        num_experts, rank: routed experts and their rank; num_experts is 0 for a dense adapter.
        shared_rank: rank of the shared expert; 0 without a shared expert.
        gate: whether the model has a gate.
        route_by: routing by the gate for each utterance or each speaker, or by a table, beside which a gate may stand.
        column: column of the corpus for routing by a table; empty otherwise.
        groups: values of that column, in the order of the routed experts.
        seconds: duration that 19 of 20 training utterances do not exceed; None in models of older versions.
    """

    base: str
    base_digest: str
    language: str
    task: Literal["transcribe", "translate"]
    context: Annotated[str, Field(pattern="^(dynamic|30s)$")]
    margin: NonNegativeInt
    layer: Annotated[int, Field(ge=-1)]
    pooling: Literal["mean", "max", "meanstd"]
    adapt: Literal["lora", "adalora", "full"]
    num_experts: NonNegativeInt
    shared_rank: NonNegativeInt
    mixture: Mixture
    top_k: PositiveInt
    rank: PositiveInt
    alpha: Positive
    targets: tuple[str, ...]
    within: str
    gate: bool
    route_by: Literal["utterance", "speaker", "table"] = "utterance"
    column: str = ""
    groups: tuple[str, ...] = ()
    seconds: Positive | None = None


def save_gate(gate: Gate, folder: Path) -> None:
    """Writes gate.safetensors and its sizes in gate.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in gate.state_dict().items()},
        folder / "gate.safetensors",
    )
    sizes = {"dim": gate.dim, "hidden": gate.hidden, "num_experts": gate.num_experts}
    (folder / "gate.json").write_text(json.dumps(sizes) + "\n", encoding="utf-8")


def load_gate(folder: Path, dropout: float = 0.0) -> Gate:
    """Reads a gate.

    Raises:
        DataError: the gate is missing or damaged.
    """
    try:
        sizes = read_object(folder / "gate.json")
        tensors = load_file(folder / "gate.safetensors")
        dim, hidden, experts = sizes["dim"], sizes["hidden"], sizes["num_experts"]
        shapes = [tuple(tensors[name].shape) for name in ("net.0.weight", "net.3.weight", "whiten_DD")]
        if shapes != [(hidden, dim), (experts, hidden), (dim, dim)]:
            raise ValueError("gate.json and gate.safetensors differ in the gate's sizes")
        check_weights(tensors, "gate.safetensors")
        gate = Gate(dim, hidden, experts, dropout)
        gate.load_state_dict(tensors)
        if not (gate.std_D > 0).all():
            raise ValueError("a standard deviation in std_D is not above 0")
        return gate
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, DataError) as error:
        # The message of a missing key or tensor would be only its name.
        message = " ".join(str(error).split())[:300]
        raise DataError(f"gate in {folder} cannot be read: {type(error).__name__}: {message}") from None


def save_recogniser(recogniser: Recogniser, info: BundleInfo, folder: Path) -> None:
    """Writes a trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / DESCRIPTION, asdict(info))
    if recogniser.gate is not None:
        save_gate(recogniser.gate, folder)
    if info.adapt == "full":
        recogniser.whisper.save_pretrained(folder / "dense")
        return
    for expert in range(info.num_experts):
        save_expert(recogniser.whisper, expert, folder / "experts" / str(expert), base_model=info.base)
    if info.shared_rank:
        save_expert(recogniser.whisper, None, folder / "shared", base_model=info.base)


def read_info(folder: Path) -> BundleInfo:
    """The description of a trained model.

    Raises:
        DataError: the folder contains no trained model.
    """
    try:
        values = json.loads(read_document(folder / DESCRIPTION))
        BundleInfo(**values)  # refuses names that it does not know, which pydantic would pass over
        info = TypeAdapter(BundleInfo).validate_json(json.dumps(values), strict=True)
        if problem := _find_problem(info):
            raise ValueError(problem)
        return info
    except FileNotFoundError:
        raise DataError(f"{folder} contains no {DESCRIPTION}: it is not the output of the asr stage") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise DataError(f"{folder / DESCRIPTION} cannot be used: {name} {first['input']!r}: {first['msg']}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{folder / DESCRIPTION} cannot be used: {error}") from None


def _find_problem(info: BundleInfo) -> str:
    """A problem of a bundle's values that no training can have written; empty if the values are consistent."""
    checks = {
        "num_experts": info.num_experts + info.shared_rank > 0 or info.adapt == "full",
        "gate": info.gate == (info.num_experts > 1 and info.adapt != "full")
        or (info.route_by == "table" and not info.gate),
        "groups": len(info.groups) == (info.num_experts if info.route_by == "table" else 0),
    }
    return "; ".join(f"{name} {getattr(info, name)!r} is not valid" for name, good in checks.items() if not good)


def _check_experts(info: BundleInfo, folder: Path) -> None:
    """Compares the existing experts with the description, before memory is allocated for the mixture.

    Raises:
        DataError: an expert is missing or superfluous, or has another rank.
    """
    count = len(list((folder / "experts").glob("*")))
    if count != info.num_experts:
        raise DataError(f"{folder} holds {count} routed experts, and {DESCRIPTION} says {info.num_experts}")
    ranks = {f"experts/{number}": info.rank for number in range(info.num_experts)}
    for part, expected in (ranks | ({"shared": info.shared_rank} if info.shared_rank else {})).items():
        if (rank := adapter_rank(folder / part)) != expected:
            raise DataError(f"adapter {folder / part} has rank {rank}, and {DESCRIPTION} says {expected}")


def load_recogniser(folder: Path, base: Path, device: torch.device) -> tuple[Recogniser, BundleInfo]:
    """Reads a trained model back, on its base.

    Args:
        base: folder of the base model (unused after a full fine-tune, whose weights are in the folder).

    Raises:
        DataError: it cannot be read, or does not fit the base.
    """
    info = read_info(folder)
    if info.adapt == "full":
        return Recogniser(load_whisper(folder / "dense")).to(device).eval(), info
    _check_experts(info, folder)
    whisper = load_whisper(base)
    try:
        slot = add_mixture(
            whisper,
            targets=info.targets,
            num_experts=info.num_experts,
            rank=info.rank,
            alpha=info.alpha,
            shared_rank=info.shared_rank,
            magnitude=False,  # folded into the weights
            within=info.within,
        )
    except DataError as error:
        raise DataError(f"model {folder} does not fit its base {base}: {error}") from None
    for expert in range(info.num_experts):
        load_expert(whisper, expert, folder / "experts" / str(expert))
    if info.shared_rank:
        load_expert(whisper, None, folder / "shared")
    gate = load_gate(folder) if info.gate else None
    width = whisper.config.d_model * (2 if info.pooling == "meanstd" else 1)
    if gate and (gate.num_experts, gate.dim) != (info.num_experts, width):
        raise DataError(
            f"the gate in {folder} takes {gate.dim} values for {gate.num_experts} experts; the model gives {width} "
            f"for {info.num_experts}"
        )
    options = RouterOptions(mixture=info.mixture, top_k=info.top_k)
    return Recogniser(whisper, slot=slot, gate=gate, options=options).to(device).eval(), info
