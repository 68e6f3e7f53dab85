"""The gradients of one optimiser step, computed in as many parts as the memory requires."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.errors import ConfigError
from common.training.throughput import TrainBatch


def forward_backward(
    model: nn.Module, micro: Sequence[TrainBatch], weight: Tensor, accelerator: Accelerator, split: int
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Computes the gradients of one step, each batch in `split` parts; returns (loss of this process, logs, whether
    memory was sufficient).
    """
    total = torch.zeros((), device=accelerator.device)
    logs: dict[str, Tensor] = {}
    parts = [part for batch in micro for part in halves(batch, split)]
    try:
        for number, part in enumerate(parts):
            with accelerator.no_sync(model) if number + 1 < len(parts) else nullcontext(), accelerator.autocast():
                loss, values = model(part)
                accelerator.backward(loss / weight * accelerator.num_processes)
            total += loss.detach().float() / weight
            logs = {name: logs[name] + value if name in logs else value for name, value in values.items()}
    except torch.OutOfMemoryError:
        if accelerator.num_processes > 1:  # the others wait in an all-reduce and cannot split their batches
            raise ConfigError("out of memory on one of several processes; lower the batch size") from None
        torch.cuda.empty_cache()
        return total, logs, False
    return total, logs, True


def halves(batch: TrainBatch, split: int) -> list[TrainBatch]:
    """The batch in at most `split` parts of equal size."""
    size = -(-len(batch) // split)
    return [batch] if split == 1 else [batch.part(i, i + size) for i in range(0, len(batch), size)]
