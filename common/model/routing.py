"""Routing: the choice of experts from logits, its losses, and statistics of the use of experts.

Shape letters: B utterances (rows) of a batch, N utterances of a set, E routed experts, K experts per utterance.

Load-balance loss: Fedus et al. 2021 (arXiv:2101.03961), eq. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.identities import identity_key

NEVER = -1e4  # logit of an expert that a table does not choose


@dataclass(frozen=True, slots=True)
class Routing:
    """Routed experts and their weights for each utterance. The shared expert is active for every utterance.

    Attributes:
        topk_ids_BK: int64 expert numbers, in 0…E-1; K is 0 without routed experts.
        topk_weights_BK: weights, summing to 1 in each row, or to 0 if the router abstains; the gate's gradient passes
            through them.
        added: (number of an added expert, the rows that use it), for each added expert in use.
        unrouted: all weights are known to be 0, so that layers need not compute the routed experts.
    """

    topk_ids_BK: Tensor
    topk_weights_BK: Tensor
    added: tuple[tuple[int, Tensor], ...] = ()
    unrouted: bool = False

    @property
    def all_added(self) -> bool:
        """Whether all rows use the same added expert."""
        return len(self.added) == 1 and len(self.added[0][1]) == len(self.topk_ids_BK)

    def rows(self, index_N: Tensor) -> Routing:
        """The routing of the utterances `index_N`, in that order."""
        added = [(number, torch.isin(index_N, rows_N).nonzero()[:, 0]) for number, rows_N in self.added]
        kept = tuple((number, rows_N) for number, rows_N in added if len(rows_N))
        return Routing(self.topk_ids_BK[index_N], self.topk_weights_BK[index_N], kept, self.unrouted)


class RoutingSlot:
    """Contains the routing of the current batch; all layers of a model read the same slot.

    `None` disables all experts, including the shared expert: the model is the frozen base.
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None


Choice = tuple[Tensor, Tensor]  # logits_NE, and known_N: false for utterances that use the shared expert alone


def route_to(expert: int | None, rows: int, device: torch.device) -> Routing:
    """Routes all rows to one routed expert with weight 1, or (None) to the shared expert alone."""
    ids_BK = torch.full((rows, 0 if expert is None else 1), expert or 0, dtype=torch.int64, device=device)
    return Routing(ids_BK, torch.ones_like(ids_BK, dtype=torch.float32))


def rows_by_added(added_B: Tensor) -> tuple[tuple[int, Tensor], ...]:
    """`Routing.added` from the number of each row's added expert, -1 for rows without."""
    numbers = sorted(set(added_B.tolist()) - {-1})
    return tuple((number, (added_B == number).nonzero()[:, 0]) for number in numbers)


def route(logits_BE: Tensor, top_k: int, known_B: Tensor | None = None) -> Routing:
    """The K experts of highest probability, with their softmax weights renormalised to sum to 1.

    Args:
        known_B: false for utterances for which the router abstains: their weights are 0, so that they use the shared
            expert alone.
    """
    top_k = min(top_k, logits_BE.shape[1])
    best_BK, ids_BK = logits_BE.float().topk(top_k, dim=1)
    weights_BK = best_BK.softmax(1)
    return Routing(ids_BK, weights_BK if known_B is None else weights_BK * known_B[:, None])


def route_by_table(values: Sequence[str], groups: Sequence[str], device: torch.device | str = "cpu") -> Choice:
    """Fixed logits that route each utterance to the expert of its group.

    Args:
        values: group of each of N utterances, by the corpus.
        groups: the groups that have an expert, in the experts' order.

    Returns:
        (logits_NE, known_N); an utterance of another group is not known, and uses the shared expert alone.
    """
    number_of = {value: group_index(value, groups) for value in set(values)}
    number_N = torch.tensor([number_of[value] for value in values], dtype=torch.int64)
    known_N = number_N >= 0
    logits_NE = torch.full((len(values), len(groups)), NEVER)
    logits_NE[known_N, number_N[known_N]] = 0.0
    return logits_NE.to(device), known_N.to(device)


def group_index(value: str, groups: Sequence[str]) -> int:
    """Number of a group in whatever spelling, since another corpus may write `ataxia` for `Ataxia`; -1 if unknown."""
    keys = [identity_key(group) for group in groups]
    key = identity_key(value)
    return keys.index(key) if key in keys else -1


def draw_rows(row_B: Tensor, draw: Tensor, share: float) -> Tensor:
    """Pseudo-random choice of a share of the rows, which depends on nothing but their numbers and `draw`.

    So the same utterances are chosen however a step's batch is split over accumulation, processes or memory. The
    numbers are mixed as in the finaliser of MurmurHash3.

    Args:
        row_B: int64 numbers of utterances.
        draw: int64 scalar; another one gives another choice.

    Returns:
        chosen_B, true for about `share` of the rows.
    """
    mask = 0xFFFFFFFF
    mixed_B = (row_B * 0x9E3779B1 + draw * 0x7F4A7C15) & mask
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed_B = ((mixed_B ^ (mixed_B >> 16)) * factor) & mask
    return (mixed_B ^ (mixed_B >> 16)) < int(share * 2**32)


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
    """Statistics of the use of experts by a set of utterances.

    Attributes:
        load: share of the total weight of each expert; sums to 1 (0 if the router abstains for all utterances).
        entropy: mean entropy of the router, in nats.
        top1_share: mean weight of the first choice.
        abstained: share of utterances that used the shared expert alone.
        collapsed: one of several experts has over 90% of the weight, or half of the experts have less than a tenth of
            an equal share.
    """

    load: tuple[float, ...]
    entropy: float
    top1_share: float
    abstained: float
    collapsed: bool


def routing_report(logits_NE: Tensor, top_k: int, known_N: Tensor | None = None) -> RoutingReport:
    """Summarises the routing of N utterances."""
    routing = route(logits_NE, top_k, known_N)
    experts = logits_NE.shape[1]
    weights_NK = routing.topk_weights_BK.detach().float().cpu()
    load_E = torch.zeros(experts).scatter_add(0, routing.topk_ids_BK.reshape(-1).cpu(), weights_NK.reshape(-1))
    load_E = load_E / load_E.sum().clamp_min(1e-9)
    idle = int((load_E < 0.1 / experts).sum())
    collapsed = experts > 1 and (float(load_E.max()) > 0.9 or idle * 2 >= experts)
    return RoutingReport(
        load=tuple(load_E.tolist()),
        entropy=float(router_entropy(logits_NE)),
        top1_share=float(weights_NK[:, 0].mean()),
        abstained=float((weights_NK.sum(1) == 0).float().mean()),
        collapsed=collapsed,
    )
