"""What a training keeps beside its step: checkpointed state, copies of weights, and their averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights, on the CPU, that an evaluation has judged; they may take part in an average.

    Attributes:
        value: the evaluation's WER or loss; inf where it did not look at it.
    """

    step: int
    value: float
    weights: dict[str, Tensor]


def keep(kept: Sequence[Kept], new: Kept, count: int, which: Literal["best", "last"]) -> list[Kept]:
    """The `count` best or last of them; of equal ones the earlier are better."""
    if which == "last":
        return [*kept, new][-count:]
    return sorted([*kept, new], key=lambda one: one.value)[:count]


def averaged(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several sets of weights."""
    return {name: torch.stack([one[name].float() for one in weights]).mean(0) for name in weights[0]}


def copies(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}


def put(trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copies such weights into the model."""
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(tensors[prefix + name])


def snapshot(
    trained: Mapping[str, Tensor],
    optimizer: Any,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next step depends on: weights, moments, random states, scaler.

    The random states are those of rank 0, which alone writes: after a resume several processes draw alike.
    """
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    moments = optimizer.state
    for name, p in trained.items():
        tensors |= {f"optim.{name}.{key}": value for key, value in moments.get(p, {}).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if accelerator.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return tensors, {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}


def restore(
    trained: Mapping[str, Tensor],
    optimizer: Any,
    accelerator: Accelerator,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Puts a `snapshot` back, in place."""
    put(trained, tensors, "model.")
    for name, p in trained.items():
        prefix = f"optim.{name}."
        moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps `step` on the CPU unless fused.
        optimizer.state[p] = {
            key: value.to(p.device) if key != "step" or p.is_cuda else value for key, value in moments.items()
        }
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], accelerator.device)
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
