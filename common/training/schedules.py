"""Learning rate schedules."""

import math


def learning_rate_factor(step: int, total: int, warmup_ratio: float, schedule: str = "linear") -> float:
    """Linear warm-up to 1, then linear decay to 0 (`linear`), a half cosine to 0 (`cosine`), or constant 1 (`none`)."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "none": 1.0}[schedule]
