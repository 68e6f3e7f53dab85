"""Experts on disk, in PEFT's format: one folder per expert that PEFT and vLLM load unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import DataError
from common.model.moe import mixture_layers, replace_layer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


Matrices = dict[str, tuple[Tensor, Tensor]]  # layer name → (A (R, I), B (O, R)), on the CPU


def expert_matrices(model: nn.Module, expert: int) -> Matrices:
    """One expert's matrices by layer, as they are in training: without the scale."""
    return {
        name: (layer.lora_A[expert].detach().cpu(), layer.lora_B[expert].detach().cpu())
        for name, layer in mixture_layers(model)
    }


def save_expert(model: nn.Module, expert: int, folder: Path, *, base_model: str, alpha: float) -> None:
    """Writes expert number `expert` (or the shared one, number E) as a PEFT LoRA adapter.

    Args:
        base_model: what PEFT should load it on: hub name or folder.
        alpha: LoRA's alpha, of which the scale is alpha / rank.
    """
    save_adapter(expert_matrices(model, expert), folder, base_model=base_model, alpha=alpha)


def save_adapter(matrices: Matrices, folder: Path, *, base_model: str, alpha: float) -> None:
    """Writes matrices of one rank as a PEFT LoRA adapter."""
    tensors: dict[str, Tensor] = {}
    for name, (a_RI, b_OR) in matrices.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR.contiguous()
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


def load_expert(model: nn.Module, expert: int, folder: Path) -> None:
    """Reads a PEFT LoRA adapter into slot `expert` of the model's mixtures.

    Raises:
        DataError: the folder is no such adapter, or its layers, rank or shapes are not the model's.
    """
    tensors = read_adapter(folder)
    with torch.no_grad():
        for name, layer in mixture_layers(model):
            for matrix, stack in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                value = tensors.pop(f"base_model.model.{name}.{matrix}.weight", None)
                if value is None or value.shape != stack.shape[1:]:
                    got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise DataError(
                        f"adapter {folder}: {name}.{matrix} should have shape {tuple(stack.shape[1:])}, found {got}; "
                        "was it trained with another rank, target list or base model?"
                    )
                stack[expert].copy_(value)
    if tensors:
        raise DataError(f"adapter {folder} adapts {next(iter(tensors))}, which this model leaves alone")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter folder.

    Raises:
        DataError: they are missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {WEIGHTS}: not a PEFT LoRA adapter") from None
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from None
    return tensors


def merge_experts(model: nn.Module, weights: Mapping[int, float]) -> None:
    """Adds a weighted sum of experts to the base weights and takes all mixtures out, leaving a plain dense model.

    Args:
        weights: of each expert (number E is the shared one), as a fixed routing would give them.
    """
    for name, layer in list(mixture_layers(model)):
        with torch.no_grad():
            for expert, weight in weights.items():
                layer.base.weight += weight * layer.delta_weight(expert).to(layer.base.weight.dtype)
        replace_layer(model, name, layer.base)


def copy_experts(source: Sequence[Path], model: nn.Module) -> None:
    """Loads the adapters of `source`, in order, into experts 0, 1, …; further experts keep their start values."""
    for expert, folder in enumerate(source):
        load_expert(model, expert, folder)
