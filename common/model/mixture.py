"""The mixture: every adapted layer has a shared LoRA expert, which is always active, and routed experts.

Shape letters: B utterances (rows) of a batch, T positions, I/O input/output features of a layer, E routed experts,
K experts per utterance, R rank; G groups of rows (1 or B) that share C columns of experts.

LoRA: Hu et al. 2021 (arXiv:2106.09685). Shared expert: Dai et al. 2024, DeepSeekMoE (arXiv:2401.06066).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import DataError
from common.model.lowrank import Columns, compute_dtype, low_rank_delta, low_rank_linear, side_by_side
from common.model.routing import Routing, RoutingSlot

Kernel = Literal["masked", "gathered"]


class LoraStack(nn.Module):
    """E low-rank adapters of one linear layer: delta_e = scaling · B[e] diag(1 + s[e]) A[e].

    The magnitude s of each rank starts at 0 and learns with a rate of its own (`training.rates`).

    Args:
        experts: E, 0 or more.
        rank: R.
        scaling: of every delta (LoRA's alpha / rank).
        magnitude: learn s; otherwise it stays 0.
    """

    def __init__(
        self,
        experts: int,
        rank: int,
        in_features: int,
        out_features: int,
        *,
        scaling: float,
        magnitude: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.rank, self.scaling = experts, rank, scaling
        self.lora_A = nn.Parameter(torch.empty(experts, rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(experts, out_features, rank, device=device, dtype=torch.float32))
        zeros_ER = torch.zeros(experts, rank, device=device, dtype=torch.float32)
        self.magnitude = nn.Parameter(zeros_ER, requires_grad=magnitude)
        for expert_RI in self.lora_A.data:  # as PEFT does: each expert is initialised like a linear layer
            nn.init.kaiming_uniform_(expert_RI, a=math.sqrt(5))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a_ERI, b_EOR) with delta_e = b[e] a[e]: magnitude and scaling are in a."""
        scale_ER1 = ((1 + self.magnitude) * self.scaling).unsqueeze(2)
        return (self.lora_A * scale_ER1).to(dtype), self.lora_B.to(dtype)

    def plain(self, expert: int) -> tuple[Tensor, Tensor]:
        """(A (R, I), B (O, R)) of one expert as plain LoRA: the magnitude is in A, the scaling in neither."""
        return self.lora_A[expert] * (1 + self.magnitude[expert]).unsqueeze(1), self.lora_B[expert]

    def delta_weight(self, expert: int) -> Tensor:
        """The dense weight (O, I) that one expert adds to the base layer's weight."""
        a_RI, b_OR = self.plain(expert)
        return self.scaling * (b_OR @ a_RI)


class AddedTerm(nn.Module):
    """The term of an expert that was added after training, in one layer of an unchanged mixture.

    The term is a sum of up to three parts: routed experts with fixed weights, the shared expert's ranks with the added
    expert's own magnitudes, and a low-rank adapter.

    Args:
        weights: weights of routed experts, by number.
        magnitude_1R: factor of each rank of the shared expert, in addition to the factor 1 of all utterances.
        stack: one adapter.
    """

    def __init__(
        self,
        *,
        weights: Mapping[int, float] | None = None,
        magnitude_1R: Tensor | None = None,
        stack: LoraStack | None = None,
    ) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        self.magnitude = None if magnitude_1R is None else nn.Parameter(magnitude_1R)
        self.stack = stack

    def plain(self, layer: MixtureLinear) -> tuple[Tensor, Tensor]:
        """(A (R, I), B (O, R)) of the whole term as plain LoRA, without the layer's scaling."""
        parts = []
        for expert, weight in self.weights.items():
            a_RI, b_OR = layer.routed.plain(expert)
            parts.append((a_RI * weight, b_OR))
        if self.magnitude is not None:
            assert layer.shared is not None
            a_RI, b_OR = layer.shared.plain(0)
            parts.append((a_RI * self.magnitude.transpose(0, 1), b_OR))
        if self.stack is not None:
            parts.append(self.stack.plain(0))
        if not parts:  # the shared expert alone
            weight_OI = layer.base.weight
            return weight_OI.new_zeros(0, layer.base.in_features), weight_OI.new_zeros(layer.base.out_features, 0)
        return torch.cat([a_RI for a_RI, _ in parts]), torch.cat([b_OR for _, b_OR in parts], 1)

    def columns(self, layer: MixtureLinear, dtype: torch.dtype) -> Columns:
        """The term as one low-rank pair (`common.model.lowrank`)."""
        a_RI, b_OR = self.plain(layer)
        return (a_RI * layer.routed.scaling).to(dtype)[None], b_OR.to(dtype).transpose(0, 1)[None], None


class MixtureLinear(nn.Module):
    """A frozen linear layer, plus the shared expert, plus the weighted sum of its utterance's routed experts.

    y = W x + b + delta_shared x + Σ_k weight_k · delta_{e_k} x

    For rows that use an added expert (`Routing.added`), its term is added. The result of other rows does not change by
    adding an expert, to the last bit.

    Without routed experts, this is dense LoRA; without a shared expert, a mixture of routed experts only. If the
    routing has K = 0 or weights of 0, an utterance uses the shared expert alone.

    Args:
        base: the layer to adapt; its parameters are frozen.
        slot: contains the batch's routing, set by the model.
        num_experts: E, routed experts.
        rank: R of each routed expert.
        alpha: every delta is scaled by alpha / rank, the shared one too.
        shared_rank: rank of the shared expert; 0 for none.
        dropout: probability of zeroing an input feature of the experts, in training.
        magnitude: learn a magnitude per rank (`LoraStack`).
        kernel: how the deltas are computed (`mixture_columns`); `auto` chooses by `pick_kernel`.

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
        shared_rank: int = 0,
        dropout: float = 0.0,
        magnitude: bool = True,
        kernel: Kernel | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.slot, self.kernel = slot, kernel
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        shape = base.in_features, base.out_features
        device, scaling = base.weight.device, alpha / rank
        self.routed = LoraStack(num_experts, rank, *shape, scaling=scaling, magnitude=magnitude, device=device)
        self.shared = (
            LoraStack(1, shared_rank, *shape, scaling=scaling, magnitude=magnitude, device=device)
            if shared_rank
            else None
        )
        self.added = nn.ModuleList()

    @property
    def num_experts(self) -> int:
        """E, routed experts."""
        return self.routed.experts

    def forward(self, x_BTI: Tensor) -> Tensor:
        routing = self.slot.routing
        if routing is None:
            plain_BTO: Tensor = self.base(x_BTI)
            return plain_BTO
        dtype = compute_dtype(x_BTI)
        x_BTI = x_BTI.to(dtype)
        columns = self._columns(x_BTI, routing, dtype)
        if columns is None:
            y_BTO: Tensor = self.base(x_BTI)
        elif self.training and isinstance(self.dropout, nn.Dropout):
            y_BTO = self.base(x_BTI) + low_rank_delta(self.dropout(x_BTI), columns)
        else:
            y_BTO = low_rank_linear(x_BTI, self.base.weight, self.base.bias, columns)
        for number, rows_N in () if routing.all_added else routing.added:
            delta_NTO = low_rank_delta(x_BTI[rows_N], self._added_columns(number, dtype))
            y_BTO = y_BTO.index_add(0, rows_N, delta_NTO)
        return y_BTO

    def _columns(self, x_BTI: Tensor, routing: Routing, dtype: torch.dtype) -> Columns | None:
        """All experts of a batch as one low-rank pair."""
        columns: list[Columns] = []
        if self.shared is not None:
            a_1RI, b_1OR = self.shared.factors(dtype)
            columns.append((a_1RI, b_1OR.transpose(1, 2), None))
        if routing.all_added:
            columns.append(self._added_columns(routing.added[0][0], dtype))
        if self.routed.experts and routing.topk_ids_BK.shape[1] and not routing.unrouted:
            a_ERI, b_EOR = self.routed.factors(dtype)
            kernel = pick_kernel(x_BTI, a_ERI, routing) if self.kernel == "auto" else self.kernel
            columns.append(mixture_columns(a_ERI, b_EOR, routing, kernel))
        return side_by_side(columns) if columns else None

    def _added_columns(self, number: int, dtype: torch.dtype) -> Columns:
        term = self.added[number]
        assert isinstance(term, AddedTerm)
        return term.columns(self, dtype)


def pick_kernel(x_BTI: Tensor, a_ERI: Tensor, routing: Routing) -> Kernel:
    """The kernel that is fastest for a shape, as measured by `bench/kernels.py`."""
    experts, rank, _ = a_ERI.shape
    wanted = routing.topk_ids_BK.shape[1] * rank
    if x_BTI.shape[1] == 1 and not torch.is_grad_enabled():  # decoding step by step: the fewest launches
        return "masked"
    # On a GPU the masked product costs no more time than one launch up to about 128 columns.
    cheap_columns = 128 if x_BTI.is_cuda else wanted
    return "masked" if experts * rank <= cheap_columns else "gathered"


def mixture_columns(a_ERI: Tensor, b_EOR: Tensor, routing: Routing, kernel: Kernel) -> Columns:
    """The routed experts side by side as one low-rank pair: delta = ((x aᵀ) · scale) b, with C columns between.

    Returns:
        (a_GCI, b_GCO, scale_B1C): G is 1 where all rows share the columns and `scale` zeroes those not chosen
        (`masked`, C = E·R), and B where each row has its own, already weighted in `b` (`gathered`, C = K·R, no scale).
    """
    ids_BK, weights_BK = routing.topk_ids_BK, routing.topk_weights_BK.to(a_ERI.dtype)
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


def add_mixture(
    model: nn.Module,
    *,
    targets: Sequence[str],
    num_experts: int,
    rank: int,
    alpha: float,
    shared_rank: int = 0,
    dropout: float = 0.0,
    magnitude: bool = True,
    within: str = "",
) -> RoutingSlot:
    """Replaces the linear layers named in `targets` by mixtures around them, and freezes all other parameters.

    Args:
        model: any module; changed in place.
        targets: last parts of module names, as PEFT's `target_modules` (`q_proj`, `fc1`, …).
        num_experts, rank, alpha, shared_rank, dropout, magnitude: as in `MixtureLinear`.
        within: only layers whose full name contains this text (`encoder.layers` or `decoder.layers`); all layers if
            empty.

    Returns:
        The slot that decides the routing of all replaced layers.

    Raises:
        DataError: one of the targets matches no layer.
    """
    slot = RoutingSlot()
    model.requires_grad_(False)
    for name, layer in linear_layers(model, targets, within):
        mixture = MixtureLinear(
            layer,
            slot,
            num_experts=num_experts,
            rank=rank,
            alpha=alpha,
            shared_rank=shared_rank,
            dropout=dropout,
            magnitude=magnitude,
        )
        replace_layer(model, name, mixture)
    return slot


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` where the module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def untie(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Copies the weights of linear layers that share them with an embedding.

    Whisper's output projection shares its weights with the token embedding: merging into one must not change the other.
    """
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for layer in layers:
        if isinstance(layer, nn.Linear) and id(layer.weight) in shared:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            config: Any = model.config
            config.tie_word_embeddings = False  # otherwise saving or loading would tie them again


def linear_layers(model: nn.Module, targets: Sequence[str], within: str = "") -> list[tuple[str, nn.Linear]]:
    """(name, layer) of the linear layers selected by `targets` and `within`, as in `add_mixture`.

    Raises:
        DataError: one of the targets matches no layer.
    """
    matching = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in targets and within in name
    ]
    missing = sorted({*targets} - {name.rpartition(".")[2] for name, _ in matching})
    if missing or not matching:
        place = f" in its {within}" if within else ""
        raise DataError(f"the model has no linear layer named {', '.join(missing) or '(no targets)'}{place}")
    return matching


def mixture_layers(model: nn.Module) -> Iterator[tuple[str, MixtureLinear]]:
    """(name in the model without mixtures, layer) of every mixture, in module order."""
    for name, layer in model.named_modules():
        if isinstance(layer, MixtureLinear):
            yield name, layer
