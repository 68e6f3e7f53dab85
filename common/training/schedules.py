"""Numbers that change with the step of a training: the learning rate, the budget of ranks."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """Linear warm-up to 1, then half a cosine to 0, a line to 0 (`linear`), or 1 to the end (`none`)."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "none": 1.0}[schedule]


def rank_budget(step: int, *, start: int, target: int, first: int, last: int) -> int:
    """How many ranks all layers share: `start` until step `first`, then a cubic fall to `target` at step `last`.

    Zhang et al. 2023 (arXiv:2303.10512), eq. 13.
    """
    if step <= first:
        return start
    if step >= last:
        return target
    left = 1 - (step - first) / (last - first)
    return int(target + (start - target) * left**3)
