"""Functions shared by the training of single experts and joint training."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from common.data.batches import BatchLoader, Example, epoch_batches


def mean_loss(
    model: nn.Module, examples: Sequence[Example], loader: BatchLoader, accelerator: Accelerator, batch_seconds: float
) -> float:
    """Cross-entropy per token over a set, computed by all processes together."""
    batches = epoch_batches(examples, batch_size=1, batch_seconds=batch_seconds, shuffle=False)
    total = torch.zeros(2, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in loader(batches[accelerator.process_index :: accelerator.num_processes]):
            _, logs = model(batch)
            total += torch.stack([logs["ce"].float(), batch.weight.float()])
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1].clamp_min(1))
