"""State of a training: checkpointed values, copies of weights, and their averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from common.errors import DataError
from common.tensors import check_names
from common.training.throughput import TOTALS

NUMBERS = ("best_step", "best_value", "evals_without_improvement", "epochs_evaluated", "split")  # of LoopState


@dataclass(frozen=True, slots=True)
class Kept:
    """Evaluated weights, on the CPU, that can be averaged.

    Attributes:
        value: WER or loss of the evaluation; inf if it was not computed.
    """

    step: int
    value: float
    weights: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The weights at the end of an epoch, and their scores or a function that waits for the scores."""

    step: int
    epoch: int
    full: bool  # decoded too, where checkpoints are selected by a decoded figure
    weights: dict[str, Tensor]
    scores: Mapping[str, float] | Callable[[], Mapping[str, float]]


@dataclass
class LoopState:
    """Progress of a training, in addition to weights, moments and random states (`snapshot`); saved in checkpoints.

    Attributes:
        step: optimiser steps done.
        best, best_step, best_value: the best weights so far, on the CPU; the value is a loss or an error rate.
        evals_without_improvement: full evaluations since the best evaluation.
        epochs_evaluated: epochs whose evaluation has begun.
        split: batches are computed in 2 ** split parts, after memory ran out.
        kept: weights that may be averaged at the end.
        pending: an evaluation whose scores are not available yet.
    """

    best: dict[str, Tensor]
    step: int = 0
    best_step: int = 0
    best_value: float = math.inf
    evals_without_improvement: int = 0
    epochs_evaluated: int = 0
    split: int = 0
    kept: list[Kept] = field(default_factory=list)
    pending: Evaluation | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the state by name; best or pending weights that equal the current weights are not written
        twice.
        """
        tensors = {f"best.{name}": value for name, value in self.best.items()} if self.best_step != self.step else {}
        for number, kept in enumerate(self.kept):
            tensors |= {f"kept{number}.{name}": value for name, value in kept.weights.items()}
        if self.pending and self.pending.step != self.step:
            tensors |= {f"pending.{name}": value for name, value in self.pending.weights.items()}
        return tensors

    def record(self) -> dict[str, Any]:
        """The numbers of the state, as JSON."""
        return {name: getattr(self, name) for name in NUMBERS} | {
            "kept": [(kept.step, kept.value) for kept in self.kept],
            "pending": self.pending.step if self.pending else None,
        }

    @staticmethod
    def restored(
        trained: Mapping[str, Tensor], step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> LoopState:
        """The state of a checkpoint whose weights are in the model again; without a pending evaluation."""

        def weights(prefix: str) -> dict[str, Tensor]:
            return {name: tensors[f"{prefix}.{name}"] for name in trained}

        return LoopState(
            best=copies(trained) if record["best_step"] == step else weights("best"),
            step=step,
            **{name: record[name] for name in NUMBERS},
            kept=[Kept(at, value, weights(f"kept{number}")) for number, (at, value) in enumerate(record["kept"])],
        )


def keep(kept: Sequence[Kept], new: Kept, count: int, which: Literal["best", "last"]) -> list[Kept]:
    """The `count` best or last weights; of equal weights, the earlier are better."""
    if which == "last":
        return [*kept, new][-count:]
    return sorted([*kept, new], key=lambda candidate: candidate.value)[:count]


def averaged(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several sets of weights."""
    return {name: torch.stack([checkpoint[name].float() for checkpoint in weights]).mean(0) for name in weights[0]}


def copies(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the current weights, on the CPU."""
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

    The random states are those of rank 0, which alone writes. Several processes set theirs at each step (`seed_step`).
    """
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    moments = optimizer.state
    for name, p in trained.items():
        tensors |= {f"optim.{name}.{key}": value for key, value in moments.get(p, {}).items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if accelerator.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return tensors, {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets the random states of one of several processes for one step.

    They start from the same seed, which the initial weights need, and would all draw the same dropout and augmentation.
    A resumed training draws as an uninterrupted one, since the states depend on nothing before the step.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def check_checkpoint(
    trained: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
    latest: tuple[int, Mapping[str, Tensor], Mapping[str, Any]],
    source: str,
) -> None:
    """Refuses a checkpoint that is incomplete or belongs to another training.

    Args:
        trained, extra: the tensors that it must contain, by name and shape.
        latest: step, tensors and record, as returned by `Checkpointer.latest`.
        source: origin of the checkpoint, for the message.

    Raises:
        DataError: the checkpoint does not fit; the message names the first difference.
    """
    step, tensors, record = latest
    remedy = "delete it to train from the start, or use the version of moe-asr that wrote it"
    try:
        weights = ["model."] + ["best."] * (record["best_step"] != step)
        weights += [f"kept{number}." for number in range(len(record["kept"]))]
        weights += ["pending."] * (record["pending"] not in (None, step))
        numbers = [record[name] for name in (*NUMBERS, "running")] + [record["throughput"][name] for name in TOTALS]
        numbers += [number for kept in record["kept"] for number in kept]
        usable = all(isinstance(number, int | float) for number in numbers) and 0 <= record["split"] < 32
        usable = usable and isinstance(record["rows"], list) and "scaler" in record
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise DataError(f"checkpoint {source}: its state cannot be used; {remedy}")
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}{name}": p.shape for prefix in weights for name, p in trained.items()
    }
    shapes |= {f"extra.{name}": value.shape for name, value in extra.items()}
    shapes["rng.cpu"] = torch.get_rng_state().shape
    for name, p in trained.items():  # none before the first step
        moments: dict[str, tuple[int, ...]] = {
            f"optim.{name}.exp_avg": p.shape,
            f"optim.{name}.exp_avg_sq": p.shape,
            f"optim.{name}.step": (),
        }
        shapes |= moments if moments.keys() & tensors.keys() else {}
    check_names(tensors.keys() - {"rng.cuda"}, shapes, f"checkpoint {source}")
    for name, shape in shapes.items():
        if (found_shape := tensors[name].shape) != shape:
            raise DataError(f"checkpoint {source}: {name} has shape {tuple(found_shape)}, not {tuple(shape)}; {remedy}")


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
        optimizer.state[p] = {key: value.to(p.device) for key, value in moments.items()}
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], accelerator.device)
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
