"""Parameter groups with learning rates that depend on rank and part.

An adapter's output changes by about scaling · √rank · rate with each step of Adam. One base rate therefore suits every
rank and alpha if it is multiplied by the ratio of the reference adapter's scaling · √rank to that of the adapter.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from common.model.mixture import LoraStack, MixtureLinear, mixture_layers

REFERENCE_RANK, REFERENCE_SCALING = 48, 2.0  # of the adapter for which the base rate is given
LARGEST_FACTOR = 4.0  # A starts at a fixed size: a rate far from the base one would not suit it

Group = dict[str, Any]


def rank_factor(rank: int, scaling: float) -> float:
    """Factor of the base learning rate for an adapter with this rank and scaling (alpha / rank)."""
    factor = REFERENCE_SCALING / scaling * math.sqrt(REFERENCE_RANK / rank)
    return min(LARGEST_FACTOR, max(1 / LARGEST_FACTOR, factor))


def adapter_groups(model: nn.Module, *, routed_rate: float, magnitude_rate: float, weight_decay: float) -> list[Group]:
    """AdamW groups of a mixture's trainable experts, with rates as multiples of the base learning rate.

    The base learning rate is that of a shared expert of rank 48 at scaling 2.

    Args:
        routed_rate: rate of routed experts that are used with a shared expert, as a multiple of the shared expert's.
        magnitude_rate: rate of the magnitudes, as a multiple of their expert's; they have no weight decay.
    """
    layers = [layer for _, layer in mixture_layers(model)]
    groups: list[Group] = []
    for stacks, rate in _parts(layers, routed_rate):
        factors = [p for stack in stacks for p in (stack.lora_A, stack.lora_B) if p.requires_grad and p.numel()]
        magnitudes = [s.magnitude for s in stacks if s.magnitude.requires_grad and s.magnitude.numel()]
        groups.append({"params": factors, "rate": rate, "weight_decay": weight_decay})
        groups.append({"params": magnitudes, "rate": rate * magnitude_rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _parts(layers: Iterable[MixtureLinear], routed_rate: float) -> Iterable[tuple[list[LoraStack], float]]:
    layers = list(layers)
    shared = [layer.shared for layer in layers if layer.shared is not None]
    routed = [layer.routed for layer in layers]
    if shared:
        rate = rank_factor(shared[0].rank, shared[0].scaling)
        return [(shared, rate), (routed, rate * routed_rate)]
    if routed:
        return [(routed, rank_factor(routed[0].rank, routed[0].scaling))]
    return []
