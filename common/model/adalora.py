"""AdaLoRA: one adapter P Λ Q per layer, whose ranks are reallocated to the most important layers as their number
decreases.

Zhang et al. 2023 (arXiv:2303.10512). PEFT has it too, but keeps importances and masks outside of any state that could
be saved, so that a training could not go on where it was interrupted. What differs from PEFT here: P and Q start
orthonormal, where the penalty would bring them, and the singular values have a higher learning rate. AdamW moves each
number by about its rate per step: a column of LoRA's B by √O times that, but a single value by no more, so that with
one rate for all the values would hardly leave zero in the steps that the other regimes need.

After the training, `to_lora` converts the adapters to plain LoRA, so that files, evaluation and export need no AdaLoRA.

Shape letters: B utterances, T positions, I/O input/output features, R ranks of a layer, L layers, N = L·R ranks of all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.model.lowrank import Columns, compute_dtype, low_rank_delta, low_rank_linear
from common.model.mixture import MixtureLinear, linear_layers, replace_layer
from common.model.routing import RoutingSlot

SMOOTHING = 0.85  # β₁ and β₂ of the paper


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Schedule of the number of ranks; names as in `common.sections.AdaloraConfig`.

    Attributes:
        init_rank: rank of each layer at the start.
        target_rank: mean rank over the layers at the end.
        warmup, final: share of all steps before the first change, and after the last change.
        interval: number of steps between two allocations.
    """

    init_rank: int
    target_rank: int
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10

    def last(self, total: int) -> int:
        """The step at which the final ranks are chosen."""
        return total - int(self.final * total)


class SvdLinear(nn.Module):
    """A frozen linear layer plus P Λ Q.

    y = W x + b + (alpha / rank) · P (λ ∘ (Q x))

    Args:
        base: the layer to adapt; its parameters are frozen.
        slot: if its routing is None, the layer computes only the base.
        rank: R at the start.
        scaling: factor of the adapter's output.
        dropout: probability of zeroing an input feature of the adapter.

    Shape:
        x_BTI → y_BTO. `kept_R` marks the ranks in use; the values of other ranks are 0.
    """

    kept_R: Tensor

    def __init__(self, base: nn.Linear, slot: RoutingSlot, *, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.slot, self.rank, self.scaling = slot, rank, scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        device = base.weight.device
        self.P_OR = nn.Parameter(torch.empty(base.out_features, rank, device=device))
        self.Q_RI = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.value_R = nn.Parameter(torch.zeros(rank, device=device))
        for matrix in (self.P_OR, self.Q_RI):
            nn.init.orthogonal_(matrix)
        self.register_buffer("kept_R", torch.ones(rank, dtype=torch.bool, device=device))
        for name, parameter in self.factors():
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(parameter))

    def factors(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """(name, P, Q or λ)."""
        return ("P_OR", self.P_OR), ("Q_RI", self.Q_RI), ("value_R", self.value_R)

    def forward(self, x_BTI: Tensor) -> Tensor:
        if self.slot.routing is None:
            plain_BTO: Tensor = self.base(x_BTI)
            return plain_BTO
        dtype = compute_dtype(x_BTI)
        x_BTI = x_BTI.to(dtype)
        scale_B1R = (self.scaling * self.value_R).to(dtype).expand(len(x_BTI), 1, -1)
        columns: Columns = self.Q_RI.to(dtype)[None], self.P_OR.t().to(dtype)[None], scale_B1R
        if self.training and isinstance(self.dropout, nn.Dropout):
            y_BTO: Tensor = self.base(x_BTI)
            return y_BTO + low_rank_delta(self.dropout(x_BTI), columns)
        return low_rank_linear(x_BTI, self.base.weight, self.base.bias, columns)

    def scores(self) -> Tensor:
        """Importance of each rank, score_R: sensitivity times uncertainty of λ, plus the means of P's and Q's."""
        importance = {
            name: getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
            for name, _ in self.factors()
        }
        score_R: Tensor = importance["value_R"] + importance["P_OR"].mean(0) + importance["Q_RI"].mean(1)
        return score_R


def add_adalora(
    model: nn.Module, *, targets: Sequence[str], rank: int, scaling: float, dropout: float = 0.0, within: str = ""
) -> RoutingSlot:
    """Replaces the linear layers named in `targets` by `SvdLinear`, and freezes all other parameters, as
    `mixture.add_mixture`.

    Raises:
        DataError: one of the targets matches no layer.
    """
    slot = RoutingSlot()
    model.requires_grad_(False)
    for name, layer in linear_layers(model, targets, within):
        ranks = min(rank, layer.in_features, layer.out_features)
        replace_layer(model, name, SvdLinear(layer, slot, rank=ranks, scaling=scaling, dropout=dropout))
    return slot


def svd_layers(model: nn.Module) -> Iterator[tuple[str, SvdLinear]]:
    """(name in the model without adapters, layer), in module order."""
    for name, layer in model.named_modules():
        if isinstance(layer, SvdLinear):
            yield name, layer


def importance_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that `allocate` uses and changes, by name, for checkpoints."""
    return {
        f"{name}.{key}": value for name, layer in svd_layers(model) for key, value in layer.named_buffers(recurse=False)
    }


def orthogonality(model: nn.Module) -> Tensor:
    """Mean over all P and Q of ‖PᵀP − I‖ and ‖Q Qᵀ − I‖ (Frobenius)."""
    distances = []
    for _, layer in svd_layers(model):
        identity_RR = torch.eye(layer.rank, device=layer.P_OR.device)
        distances += [
            torch.linalg.matrix_norm(layer.P_OR.t() @ layer.P_OR - identity_RR),
            torch.linalg.matrix_norm(layer.Q_RI @ layer.Q_RI.t() - identity_RR),
        ]
    return torch.stack(distances).mean()


@torch.no_grad()
def allocate(model: nn.Module, step: int, total: int, plan: RankPlan) -> None:
    """Measures importance and removes ranks; called after each optimiser step, before its gradients are cleared.

    Args:
        step: number of finished steps, including this one.
        total: number of steps of the training.
    """
    layers = [layer for _, layer in svd_layers(model)]
    first, last = int(plan.warmup * total), plan.last(total)
    if step < last:
        for layer in layers:
            _measure(layer)
    if step == last or (first < step < last and step % plan.interval == 0):
        start = sum(layer.rank for layer in layers)
        target = min(start, plan.target_rank * len(layers))
        _choose(layers, rank_budget(step, start=start, target=target, first=first, last=last))
    elif step > last:
        for layer in layers:  # momentum moves what was taken away
            layer.value_R.masked_fill_(~layer.kept_R, 0.0)


def _measure(layer: SvdLinear) -> None:
    """Smoothed sensitivity |w · gradient| of each weight, and how much it varies (the paper's eqs. 9 to 11)."""
    for name, weight in layer.factors():
        if weight.grad is None:
            continue
        now = (weight * weight.grad).abs()
        smooth, spread = getattr(layer, f"sensitivity_{name}"), getattr(layer, f"uncertainty_{name}")
        smooth.mul_(SMOOTHING).add_(now, alpha=1 - SMOOTHING)
        spread.mul_(SMOOTHING).add_((now - smooth).abs(), alpha=1 - SMOOTHING)


def _choose(layers: Sequence[SvdLinear], budget: int) -> None:
    """Keeps the `budget` most important ranks of all layers; of equally important ranks, those of earlier layers."""
    score_N = torch.cat([layer.scores() for layer in layers])
    kept_N = torch.zeros_like(score_N, dtype=torch.bool)
    kept_N[score_N.argsort(descending=True, stable=True)[:budget]] = True
    for layer, kept_R in zip(layers, torch.split(kept_N, [layer.rank for layer in layers]), strict=True):
        layer.kept_R.copy_(kept_R)
        layer.value_R.masked_fill_(~kept_R, 0.0)


@torch.no_grad()
def to_lora(model: nn.Module) -> dict[str, int]:
    """Converts the adapters to LoRA of the largest layer's rank: B = scale · P Λ and A = Q, padded with zeros.

    Returns:
        Layer → ranks in use.
    """
    layers = list(svd_layers(model))
    ranks = {name: int(layer.kept_R.sum()) for name, layer in layers}
    rank = max(1, *ranks.values())
    for name, layer in layers:
        mixture = MixtureLinear(layer.base, layer.slot, num_experts=0, rank=rank, alpha=rank, shared_rank=rank)
        kept_R, lora = layer.kept_R, mixture.train(layer.training).shared
        assert lora is not None
        lora.lora_A.zero_()
        lora.lora_A[0, : ranks[name]] = layer.Q_RI[kept_R]
        lora.lora_B[0, :, : ranks[name]] = layer.scaling * layer.P_OR[:, kept_R] * layer.value_R[kept_R]
        replace_layer(model, name, mixture)
    return ranks


def rank_budget(step: int, *, start: int, target: int, first: int, last: int) -> int:
    """Number of ranks of all layers: `start` until step `first`, then decreasing cubically to `target` at step `last`.

    Zhang et al. 2023 (arXiv:2303.10512), eq. 13.
    """
    if step <= first:
        return start
    if step >= last:
        return target
    left = 1 - (step - first) / (last - first)
    return int(target + (start - target) * left**3)
