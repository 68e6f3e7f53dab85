"""The mixture: LoRA experts stacked in one module per linear layer, a gate, and the routing between them.

Shape letters: B utterances (rows) of a batch, T positions, I/O input/output features of a layer, E experts, K experts
per utterance, R rank, D width of an embedding; G groups of rows (1 or B) that share C columns of experts.

LoRA: Hu et al. 2021 (arXiv:2106.09685). Load-balance loss: Fedus et al. 2021 (arXiv:2101.03961), eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.lowrank import Columns, compute_dtype, low_rank_delta, low_rank_linear

Kernel = Literal["auto", "masked", "gathered", "grouped"]


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each utterance uses, and how much.

    Attributes:
        topk_ids_BK: int64 expert numbers, in 0…E-1.
        topk_weights_BK: weights, summing to 1 in each row (to 2 with a shared expert); they carry the gate's gradient.
    """

    topk_ids_BK: Tensor
    topk_weights_BK: Tensor

    def rows(self, index_N: Tensor) -> Routing:
        """The routing of the utterances `index_N`, in that order."""
        return Routing(self.topk_ids_BK[index_N], self.topk_weights_BK[index_N])


class RoutingSlot:
    """Holds the routing of the running batch; every layer of one model looks into the same slot.

    `None` means that no expert adds anything: the frozen base model.
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.tied: Tensor | None = None  # true while the experts are trained as one (`start_as_one`)


class MixtureLinear(nn.Module):
    """A frozen linear layer plus the weighted sum of its utterance's low-rank experts.

    y = W x + b + Σ_k weight_k · (alpha / rank) · B[e_k] A[e_k] x

    Args:
        base: the layer to adapt; its parameters are frozen.
        slot: where the model puts the batch's routing.
        num_experts: E, at least 1.
        rank: R, at least 1.
        alpha: scale; each expert's delta is multiplied by alpha / rank.
        dropout: probability of zeroing an input feature on the experts' way.
        shared: adds one expert (number E) with weight 1 for every utterance.
        kernel: how the deltas are computed (`mixture_delta`).

    Shape:
        x_BTI → y_BTO.
    """

    def __init__(
        self,
        base: nn.Linear,
        slot: RoutingSlot,
        *,
        num_experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        shared: bool = False,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.slot = slot
        self.num_experts, self.rank, self.shared, self.kernel = num_experts, rank, shared, kernel
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        total = num_experts + shared
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(total, rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(total, base.out_features, rank, device=device, dtype=torch.float32))
        for expert_RI in self.lora_A.data:  # as PEFT does: each expert is initialised like a linear layer
            nn.init.kaiming_uniform_(expert_RI, a=math.sqrt(5))

    def forward(self, x_BTI: Tensor) -> Tensor:
        routing = self.slot.routing
        if routing is None:
            plain_BTO: Tensor = self.base(x_BTI)
            return plain_BTO
        if self.shared:
            routing = with_shared_expert(routing, self.num_experts)
        dtype = compute_dtype(x_BTI)
        x_BTI, a_ERI, b_EOR = x_BTI.to(dtype), self.lora_A.to(dtype), self.lora_B.to(dtype)
        kernel = pick_kernel(x_BTI, a_ERI, routing) if self.kernel == "auto" else self.kernel
        if kernel == "grouped" or (self.training and isinstance(self.dropout, nn.Dropout)):
            y_BTO: Tensor = self.base(x_BTI)
            return y_BTO + mixture_delta(self.dropout(x_BTI), a_ERI, b_EOR, routing, self.scaling, kernel)
        columns = mixture_columns(a_ERI, b_EOR, routing, self.scaling, kernel)
        return low_rank_linear(x_BTI, self.base.weight, self.base.bias, columns)

    def delta_weight(self, expert: int) -> Tensor:
        """The dense weight (O, I) that expert `expert` adds to the base layer's."""
        return self.scaling * (self.lora_B[expert] @ self.lora_A[expert])


def with_shared_expert(routing: Routing, expert: int) -> Routing:
    """Adds expert number `expert` with weight 1 to every row."""
    ids_B1 = torch.full_like(routing.topk_ids_BK[:, :1], expert)
    ones_B1 = torch.ones_like(routing.topk_weights_BK[:, :1])
    return Routing(
        torch.cat([routing.topk_ids_BK, ids_B1], 1),
        torch.cat([routing.topk_weights_BK, ones_B1], 1),
    )


def mixture_delta(
    x_BTI: Tensor, a_ERI: Tensor, b_EOR: Tensor, routing: Routing, scaling: float, kernel: Kernel = "auto"
) -> Tensor:
    """Σ_k weight_k · scaling · B[e_k] A[e_k] x for each row, by one of three equal computations.

    Args:
        x_BTI: inputs.
        a_ERI, b_EOR: the stacked experts, in the dtype of `x_BTI`.
        routing: K experts and weights of each of the B rows.
        scaling: alpha / rank.
        kernel: `masked` multiplies with all experts side by side and zeroes those not chosen (two GEMMs; wins while
            E·R is small), `gathered` copies each row's experts and multiplies batched, `grouped` sorts the rows by
            expert and multiplies in groups (bf16 on compute capability 9). `auto` chooses by `pick_kernel`.

    Returns:
        delta_BTO.
    """
    if kernel == "auto":
        kernel = pick_kernel(x_BTI, a_ERI, routing)
    if kernel == "grouped":
        return _grouped_delta(x_BTI, a_ERI, b_EOR, routing, scaling)
    return low_rank_delta(x_BTI, mixture_columns(a_ERI, b_EOR, routing, scaling, kernel))


def pick_kernel(x_BTI: Tensor, a_ERI: Tensor, routing: Routing) -> Literal["masked", "gathered"]:
    """The kernel that measures fastest for a shape (`bench/kernels.py`)."""
    experts, rank, _ = a_ERI.shape
    wanted = routing.topk_ids_BK.shape[1] * rank
    if x_BTI.shape[1] == 1 and not torch.is_grad_enabled():  # decoding step by step: the fewest launches
        return "masked"
    # On a GPU the masked product costs no more time than one launch up to about 128 columns.
    cheap_columns = 128 if x_BTI.is_cuda else wanted
    return "masked" if experts * rank <= cheap_columns else "gathered"


def mixture_columns(
    a_ERI: Tensor, b_EOR: Tensor, routing: Routing, scaling: float, kernel: Literal["masked", "gathered"]
) -> Columns:
    """The experts side by side as one low-rank pair: delta = ((x aᵀ) · scale) b, with C columns between.

    Returns:
        (a_GCI, b_GCO, scale_B1C): G is 1 where all rows share the columns and `scale` zeroes those not chosen
        (`masked`, C = E·R), and B where each row has its own, already weighted in `b` (`gathered`, C = K·R, no scale).
    """
    ids_BK, weights_BK = routing.topk_ids_BK, (routing.topk_weights_BK * scaling).to(a_ERI.dtype)
    (experts, rank, features), outputs, (rows, topk) = a_ERI.shape, b_EOR.shape[1], ids_BK.shape
    if kernel == "masked":
        weights_BE = weights_BK.new_zeros(rows, experts).scatter_add(1, ids_BK, weights_BK)
        b_GCO = b_EOR.transpose(1, 2).reshape(1, experts * rank, outputs)
        return a_ERI.reshape(1, experts * rank, features), b_GCO, weights_BE.repeat_interleave(rank, 1).unsqueeze(1)
    # Chosen by products with one-hot rows: their gradient is one more product, where an index's is a sort on a GPU.
    chosen_BKE = (ids_BK.unsqueeze(2) == torch.arange(experts, device=ids_BK.device)).to(a_ERI.dtype)
    a_BCI = (chosen_BKE @ a_ERI.reshape(experts, -1)).reshape(rows, topk * rank, features)
    b_BKOR = ((chosen_BKE * weights_BK.unsqueeze(2)) @ b_EOR.reshape(experts, -1)).reshape(rows, topk, outputs, rank)
    return a_BCI, b_BKOR.transpose(2, 3).reshape(rows, topk * rank, outputs), None


def _grouped_delta(x_BTI: Tensor, a_ERI: Tensor, b_EOR: Tensor, routing: Routing, scaling: float) -> Tensor:
    rows, topk = routing.topk_ids_BK.shape
    experts, _, _ = a_ERI.shape
    positions = x_BTI.shape[1]
    order_N = routing.topk_ids_BK.reshape(-1).argsort(stable=True)  # (row, k) pairs sorted by expert
    row_N = order_N.div(topk, rounding_mode="floor")
    counts_E = torch.bincount(routing.topk_ids_BK.reshape(-1), minlength=experts)
    ends_E = (counts_E * positions).cumsum(0).to(torch.int32)
    sorted_PI = x_BTI[row_N].reshape(rows * topk * positions, -1)
    hidden_PR = F.grouped_mm(sorted_PI, a_ERI.transpose(1, 2), offs=ends_E)
    out_NTO = F.grouped_mm(hidden_PR, b_EOR.transpose(1, 2), offs=ends_E).reshape(rows * topk, positions, -1)
    weights_N = (routing.topk_weights_BK * scaling).to(x_BTI.dtype).reshape(-1)[order_N]
    zeros_BTO = out_NTO.new_zeros(rows, positions, out_NTO.shape[-1])
    return zeros_BTO.index_add(0, row_N, out_NTO * weights_N[:, None, None])


class Gate(nn.Module):
    """A small MLP from the pooled embedding of the frozen encoder to one logit per expert.

    Args:
        dim: D, width of the embedding.
        hidden: width of the hidden layer.
        num_experts: E.
        dropout: on the hidden layer.

    Shape:
        embedding_BD → logits_BE. `mean_D` and `std_D` standardise the embedding; `fit_scale` sets them.
    """

    mean_D: Tensor
    std_D: Tensor

    def __init__(self, dim: int, hidden: int, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("std_D", torch.ones(dim))
        self.dim, self.hidden, self.num_experts = dim, hidden, num_experts
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, num_experts))

    def fit_scale(self, embeddings_ND: Tensor) -> None:
        """Takes mean and standard deviation from embeddings, so that the MLP sees unit scale."""
        self.mean_D.copy_(embeddings_ND.mean(0))
        self.std_D.copy_(embeddings_ND.std(0, correction=0).clamp_min(1e-6))

    def forward(self, embedding_BD: Tensor) -> Tensor:
        # In fp32 wherever it is asked: half precision would give some utterances other experts than the report says.
        with torch.autocast(embedding_BD.device.type, enabled=False):
            logits_BE: Tensor = self.net((embedding_BD.float() - self.mean_D) / self.std_D)
        return logits_BE


def route(logits_BE: Tensor, top_k: int) -> Routing:
    """The K experts of highest probability, with their softmax weights renormalised to sum to 1."""
    top_k = min(top_k, logits_BE.shape[1])
    best_BK, ids_BK = logits_BE.float().topk(top_k, dim=1)
    return Routing(ids_BK, best_BK.softmax(1))


def route_hard(logits_BE: Tensor) -> Routing:
    """The one most probable expert at unit weight."""
    ids_B1 = logits_BE.argmax(1, keepdim=True)
    return Routing(ids_B1, torch.ones_like(ids_B1, dtype=torch.float32))


def balance_loss(logits_BE: Tensor, ids_BK: Tensor) -> Tensor:
    """E · Σ_e (share of assignments to e) · (mean probability of e): 1 when balanced, E when collapsed."""
    experts = logits_BE.shape[1]
    share_E = torch.bincount(ids_BK.reshape(-1), minlength=experts).float() / ids_BK.numel()
    return experts * (share_E * logits_BE.float().softmax(1).mean(0)).sum()


def router_entropy(logits_BE: Tensor) -> Tensor:
    """Mean entropy of the routing probabilities, in nats: 0 certain, log E undecided."""
    log_probs_BE = logits_BE.float().log_softmax(1)
    return -(log_probs_BE.exp() * log_probs_BE).sum(1).mean()


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """How a set of utterances used the experts.

    Attributes:
        load: share of the total weight that each expert got; sums to 1.
        entropy: mean entropy of the router, in nats.
        top1_share: mean weight of the first choice.
        collapsed: one expert took over 90% of the weight although there are several, or half the experts got under
            a tenth of their fair share.
    """

    load: tuple[float, ...]
    entropy: float
    top1_share: float
    collapsed: bool


def routing_report(logits_NE: Tensor, top_k: int) -> RoutingReport:
    """Summarises the routing of N utterances."""
    routing = route(logits_NE, top_k)
    experts = logits_NE.shape[1]
    load_E = torch.zeros(experts).scatter_add(
        0, routing.topk_ids_BK.reshape(-1).cpu(), routing.topk_weights_BK.detach().reshape(-1).float().cpu()
    )
    load_E = load_E / load_E.sum()
    idle = int((load_E < 0.1 / experts).sum())
    collapsed = experts > 1 and (float(load_E.max()) > 0.9 or idle * 2 >= experts)
    return RoutingReport(
        load=tuple(load_E.tolist()),
        entropy=float(router_entropy(logits_NE)),
        top1_share=float(routing.topk_weights_BK[:, 0].mean()),
        collapsed=collapsed,
    )


def add_mixture(
    model: nn.Module,
    *,
    targets: Sequence[str],
    num_experts: int,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    shared: bool = False,
    within: str = "",
) -> RoutingSlot:
    """Replaces the linear layers named in `targets` by mixtures around them, and freezes all else.

    Args:
        model: any module; changed in place.
        targets: last parts of module names, as PEFT's `target_modules` (`q_proj`, `fc1`, …).
        within: only layers whose full name holds this (`encoder.layers` or `decoder.layers`); everywhere when empty.

    Returns:
        The slot that decides the routing of all replaced layers.

    Raises:
        ValueError: no layer matches.
    """
    slot = RoutingSlot()
    model.requires_grad_(False)
    for name, layer in linear_layers(model, targets, within):
        mixture = MixtureLinear(
            layer, slot, num_experts=num_experts, rank=rank, alpha=alpha, dropout=dropout, shared=shared
        )
        replace_layer(model, name, mixture)
    return slot


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` where the module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def linear_layers(model: nn.Module, targets: Sequence[str], within: str = "") -> list[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers that `targets` and `within` mean, as in `add_mixture`.

    Raises:
        ValueError: there is none.
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets and within in name
    ]
    if not found:
        raise ValueError(f"no linear layer of the model is named {', '.join(targets)}")
    return found


def start_as_one(model: nn.Module) -> Tensor:
    """Makes all experts of a mixture equal to the first, and keeps them so while the flag that is returned is true.

    Each then gets the sum of all experts' gradients, so that together they learn as one adapter does, whatever the
    routing; the optimiser's moments are equal too, so that nothing jumps when they part. A shared expert is left alone.

    Returns:
        The flag, a tensor on the CPU; the slot of the model's mixtures holds it too.

    Raises:
        ValueError: the model has no mixture.
    """
    layers = [layer for _, layer in mixture_layers(model)]
    if not layers:
        raise ValueError("the model has no experts that could start as one")
    slot, experts = layers[0].slot, layers[0].num_experts
    slot.tied = torch.tensor(True)

    def summed(gradient: Tensor) -> Tensor | None:
        if slot.tied is None or not slot.tied:
            return None
        sum_1 = gradient[:experts].sum(0, keepdim=True).expand(experts, -1, -1)
        return torch.cat([sum_1, gradient[experts:]])

    for layer in layers:
        for stack in (layer.lora_A, layer.lora_B):
            stack.data[:experts] = stack.data[:1]
            stack.register_hook(summed)  # type: ignore[no-untyped-call]
    return slot.tied


def part_after(slot: RoutingSlot, share: float, step: int, total: int) -> None:
    """Ends the common training of experts after a share of the steps (for `train.train`'s `after_step`)."""
    assert slot.tied is not None
    slot.tied.fill_(step < share * total)


def mixture_layers(model: nn.Module) -> Iterator[tuple[str, MixtureLinear]]:
    """(name in the model without mixtures, layer) of every mixture, in module order."""
    for name, layer in model.named_modules():
        if isinstance(layer, MixtureLinear):
            yield name, layer
