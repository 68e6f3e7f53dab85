"""A frozen linear layer plus a low-rank delta, as one node of the graph.

Shape letters: B rows of a batch, T positions, I/O input/output features; G groups of rows (1 or B), N positions of a
group, C columns between the two low-rank matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Columns = tuple[Tensor, Tensor, Tensor | None]  # a_GCI, b_GCO, scale_B1C: delta = ((x aᵀ) · scale) b


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes `x`: autocast's dtype if autocast is active."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def low_rank_delta(x_BTI: Tensor, columns: Columns) -> Tensor:
    """delta_BTO = ((x aᵀ) · scale) b, by autograd's own operations."""
    a_GCI, b_GCO, scale_B1C = columns
    hidden_BTC = x_BTI @ a_GCI.transpose(1, 2)
    return (hidden_BTC if scale_B1C is None else hidden_BTC * scale_B1C) @ b_GCO


def side_by_side(parts: Sequence[Columns]) -> Columns:
    """The sum of several deltas as one pair: one product of all their columns in place of one for each."""
    if len(parts) == 1:
        return parts[0]
    groups = max(len(a_GCI) for a_GCI, _, _ in parts)
    a_GCI = torch.cat([a_GCI.expand(groups, -1, -1) for a_GCI, _, _ in parts], 1)
    b_GCO = torch.cat([b_GCO.expand(groups, -1, -1) for _, b_GCO, _ in parts], 1)
    rows = max((len(scale_B1C) for _, _, scale_B1C in parts if scale_B1C is not None), default=0)
    if not rows:
        return a_GCI, b_GCO, None
    scales = [
        a_GCI.new_ones(rows, 1, a_GCI.shape[1]) if scale_B1C is None else scale_B1C for a_GCI, _, scale_B1C in parts
    ]
    return a_GCI, b_GCO, torch.cat(scales, 2)


def low_rank_linear(x_BTI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, columns: Columns) -> Tensor:
    """y_BTO = x Wᵀ + bias + ((x aᵀ) · scale) b, with W and bias frozen: they get no gradient.

    Args:
        x_BTI: in the dtype to compute in (`compute_dtype`), as are the columns.
        weight_OI, bias_O: in any dtype.
    """
    bias_O = None if bias_O is None else bias_O.to(x_BTI.dtype)
    y_BTO: Tensor = _LowRankLinear.apply(x_BTI, weight_OI.to(x_BTI.dtype), bias_O, *columns)
    return y_BTO


class _LowRankLinear(torch.autograd.Function):
    """Adds the delta within its matrix product, and accumulates both gradients of x in one buffer.

    The same computation by autograd writes and reads several more tensors of the size of x and y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_GCI: Tensor,
        b_GCO: Tensor,
        scale_B1C: Tensor | None,
    ) -> Tensor:
        x_GNI = _grouped(x_BTI, len(a_GCI))
        hidden_GNC = x_GNI @ a_GCI.transpose(1, 2)
        y_GNO = F.linear(x_GNI, weight_OI, bias_O)
        y_GNO.baddbmm_(_scaled(hidden_GNC, scale_B1C), b_GCO)
        ctx.save_for_backward(x_BTI, weight_OI, a_GCI, b_GCO, scale_B1C, hidden_GNC)
        return y_GNO.view(*x_BTI.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, weight_OI, a_GCI, b_GCO, scale_B1C, hidden_GNC = ctx.saved_tensors
        x_GNI, grad_GNO = _grouped(x_BTI, len(a_GCI)), _grouped(grad_BTO, len(a_GCI))
        grad_GNC = grad_GNO @ b_GCO.transpose(1, 2)
        needs = ctx.needs_input_grad  # none of a frozen adapter's, below one that is added
        grad_b_GCO = _scaled(hidden_GNC, scale_B1C).transpose(1, 2) @ grad_GNO if needs[4] else None
        grad_scale_B1C = None
        if scale_B1C is not None:
            grad_scale_B1C = (grad_GNC * hidden_GNC).view(len(x_BTI), -1, a_GCI.shape[1]).sum(1, keepdim=True)
            grad_GNC = _scaled(grad_GNC, scale_B1C)
        grad_a_GCI = grad_GNC.transpose(1, 2) @ x_GNI if needs[3] else None
        grad_x_BTI = None
        if needs[0]:
            grad_x_GNI = grad_GNO @ weight_OI
            grad_x_BTI = grad_x_GNI.baddbmm_(grad_GNC, a_GCI).view(x_BTI.shape)
        return grad_x_BTI, None, None, grad_a_GCI, grad_b_GCO, grad_scale_B1C


def _grouped(tensor_BTI: Tensor, groups: int) -> Tensor:
    return tensor_BTI.reshape(groups, -1, tensor_BTI.shape[-1])


def _scaled(hidden_GNC: Tensor, scale_B1C: Tensor | None) -> Tensor:
    if scale_B1C is None:
        return hidden_GNC
    return (hidden_GNC.view(len(scale_B1C), -1, hidden_GNC.shape[-1]) * scale_B1C).view(hidden_GNC.shape)
