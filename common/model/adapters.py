"""Experts on disk, in PEFT's format: one folder per expert, which PEFT and vLLM can load."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import DataError
from common.model.mixture import LoraStack, MixtureLinear, mixture_layers, replace_layer, untie
from common.tensors import check_names, check_weights, file_shapes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"  # of names in PEFT's file

Matrices = dict[str, tuple[Tensor, Tensor]]  # layer name → (A (R, I), B (O, R)), on the CPU


def expert_stack(layer: MixtureLinear, expert: int | None) -> tuple[LoraStack, int]:
    """Location of an expert in a layer: (stack, number in the stack).

    Args:
        expert: number of a routed expert, or None for the shared one.
    """
    if expert is not None:
        return layer.routed, expert
    assert layer.shared is not None, "the mixture has no shared expert"
    return layer.shared, 0


def expert_matrices(model: nn.Module, expert: int | None) -> Matrices:
    """One expert's matrices by layer as plain LoRA: magnitudes folded into A, without the scaling."""
    matrices: Matrices = {}
    for name, layer in mixture_layers(model):
        stack, number = expert_stack(layer, expert)
        a_RI, b_OR = stack.plain(number)
        matrices[name] = a_RI.detach().cpu(), b_OR.detach().cpu()
    return matrices


def save_expert(model: nn.Module, expert: int | None, folder: Path, *, base_model: str) -> None:
    """Writes a routed expert, or the shared one (None), as a plain PEFT LoRA adapter.

    Args:
        base_model: base model for PEFT: hub name or folder.
    """
    stack, _ = expert_stack(next(layer for _, layer in mixture_layers(model)), expert)
    save_adapter(expert_matrices(model, expert), folder, base_model=base_model, alpha=stack.scaling * stack.rank)


def save_adapter(matrices: Matrices, folder: Path, *, base_model: str, alpha: float) -> None:
    """Writes matrices of one rank as a PEFT LoRA adapter."""
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in matrices.items():
        tensors[f"{PREFIX}{name}{A}"] = a_RI.contiguous()
        tensors[f"{PREFIX}{name}{B}"] = b_OR.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": len(next(iter(matrices.values()))[0]),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _target_pattern(list(matrices)),
        "task_type": None,
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _target_pattern(names: Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`: the last parts of the names, or a regular expression where only one half is adapted."""
    last = sorted({name.rpartition(".")[2] for name in names})
    halves = {part for name in names for part in ("encoder", "decoder") if f".{part}." in f".{name}"}
    return last if len(halves) != 1 else rf".*\.{halves.pop()}\..*\.({'|'.join(last)})"


# Patterns of layers' names that are matched in little time: `.*decoder.*(q_proj|v_proj)`, `layers\.\d+\.fc1`.
# Repeated groups, classes and look-ahead could keep a matcher busy for years.
_PATTERN = re.compile(r"(?:[\w^$-]|\\?\.|(?:\.|\\d)[*+]|\((?:\?:)?\w+(?:\|\w+)*\))*")
_PATTERN_OR_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")  # names in a list are compared
_PATTERNS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
MAX_REPEATS, MAX_GROUPS, MAX_PATTERN = 4, 3, 1000  # over all of an adapter; characters of one


def check_patterns(settings: Mapping[str, Any], path: Path) -> None:
    """Refuses regular expressions that may take long to match: PEFT tries them on each layer's name.

    Args:
        settings: content of adapter_config.json.
        path: its path, for the message.

    Raises:
        DataError: a pattern may be slow; the message names the setting.
    """
    given = [(name, settings.get(name)) for name in (*_PATTERN_OR_NAMES, *_PATTERNS)]
    texts = [(name, value) for name, value in given if isinstance(value, str)]
    texts += [
        (n, str(pattern))
        for n, value in given
        if n in _PATTERNS and isinstance(value, list | dict)
        for pattern in value
    ]
    repeats = groups = 0
    for name, text in texts:
        simple = len(text) <= MAX_PATTERN and _PATTERN.fullmatch(text) is not None
        words = [group.split("|") for group in re.findall(r"([\w|]+)\)", text)] if simple else []
        repeats, groups = repeats + text.count("*") + text.count("+"), groups + len(words)
        if not simple or repeats > MAX_REPEATS or groups > MAX_GROUPS or any(len(set(w)) < len(w) for w in words):
            raise DataError(f"{path}: {name} {text[:80]!r} is too complex a pattern: list the names of layers instead")


def load_expert(model: nn.Module, expert: int | None, folder: Path) -> None:
    """Reads a PEFT LoRA adapter into a routed expert of the model's mixtures, or into the shared one (None).

    Raises:
        DataError: the folder is not such an adapter, or its layers, rank or shapes differ from the model's.
    """
    tensors = read_adapter(folder)
    with torch.no_grad():
        for name, layer in mixture_layers(model):
            stack, number = expert_stack(layer, expert)
            stack.magnitude[number].zero_()  # folded into A when it was saved
            for matrix, parameter in (("lora_A", stack.lora_A), ("lora_B", stack.lora_B)):
                value = tensors.pop(f"base_model.model.{name}.{matrix}.weight", None)
                if value is None or value.shape != parameter.shape[1:]:
                    got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise DataError(
                        f"adapter {folder}: {name}.{matrix} should have shape {tuple(parameter.shape[1:])}, found "
                        f"{got}; was it trained with another rank, target list or base model?"
                    )
                parameter[number].copy_(value)
    if tensors:
        raise DataError(f"adapter {folder} adapts {next(iter(tensors))}, which this model does not adapt")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter folder.

    Raises:
        DataError: they are missing or damaged, or a number in them is not finite.
    """
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise DataError(f"{folder} contains no {WEIGHTS}: not a PEFT LoRA adapter") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from None
    check_weights(tensors, str(folder / WEIGHTS))
    return tensors


def adapter_matrices(folder: Path) -> Matrices:
    """The matrices of a PEFT LoRA adapter by layer, without their scale.

    Raises:
        DataError: as `read_adapter`; or a layer lacks one of the two matrices, or they do not fit each other.
    """
    tensors = read_adapter(folder)
    names = sorted({name.removesuffix(end) for name in tensors for end in (A, B) if name.endswith(end)})
    check_names(tensors, [name + end for name in names for end in (A, B)], f"adapter {folder}")
    matrices = {name.removeprefix(PREFIX): (tensors[name + A], tensors[name + B]) for name in names}
    for name, (a_RI, b_OR) in matrices.items():
        if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != b_OR.shape[1]:
            raise DataError(f"adapter {folder}: {name} has shapes {tuple(a_RI.shape)} and {tuple(b_OR.shape)}")
    return matrices


def adapter_rank(folder: Path) -> int:
    """The rank of an adapter, from the header of its file.

    Raises:
        DataError: the file cannot be read, or contains no LoRA matrix.
    """
    try:
        shapes = file_shapes(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise DataError(f"adapter {folder} cannot be read: {error}") from None
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith(A) and shape]
    if not ranks:
        raise DataError(f"adapter {folder} contains no LoRA matrix")
    return ranks[0]


def merge_experts(model: nn.Module, weights: Mapping[int, float]) -> None:
    """Adds the shared expert and a weighted sum of routed ones to the base weights, leaving a plain dense model.

    Args:
        weights: weights of routed experts, as in a fixed routing.
    """
    untie(model, [layer.base for _, layer in mixture_layers(model)])
    for name, layer in list(mixture_layers(model)):
        with torch.no_grad():
            for expert, weight in weights.items():
                layer.base.weight += weight * layer.routed.delta_weight(expert).to(layer.base.weight.dtype)
            if layer.shared is not None:
                layer.base.weight += layer.shared.delta_weight(0).to(layer.base.weight.dtype)
        replace_layer(model, name, layer.base)
