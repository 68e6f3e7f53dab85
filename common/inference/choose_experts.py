"""The choice of routed experts for utterances of a corpus: by the gate for each of them, by speaker, or by a table."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.clustering.embeddings import speaker_sums
from common.data.corpus import Utterance
from common.data.groups import group_values
from common.inference.load_model import OpenedModel, blank_choice
from common.model.bundle import BundleInfo
from common.model.gate import Gate
from common.model.routing import Choice, group_index, route_by_table

log = logging.getLogger(__name__)


def choose_experts(
    utterances: Sequence[Utterance],
    evidence: Callable[[], Tensor],
    gate: Gate | None,
    *,
    by: Literal["utterance", "speaker", "table"],
    column: str = "",
    groups: Sequence[str] = (),
    device: torch.device,
) -> Choice:
    """The choice of experts for N utterances.

    By a table, utterances that have none of its groups are routed by the gate, once for all utterances of a speaker;
    without a gate they use the shared expert alone.

    Args:
        evidence: gives evidence_NF of the utterances about their groups (`Gate.evidence`); called only if it is needed.
        column, groups: the corpus's column for routing by a table, and its values in the order of the experts.

    Raises:
        DataError: routing by speaker, and no utterance has one.
    """

    def by_gate(gate: Gate, *, together: bool) -> Choice:
        evidence_NF = evidence()
        if together:
            sums_NF = speaker_sums(evidence_NF.cpu().numpy(), utterances)
            evidence_NF = torch.from_numpy(sums_NF).to(evidence_NF.device)
        return gate.decide(evidence_NF)

    if by != "table":
        assert gate is not None
        return by_gate(gate, together=by == "speaker")
    logits_NE, known_N = route_by_table(group_values(utterances, column, groups), groups, device)
    if gate is None or known_N.all():
        return logits_NE, known_N
    gate_NE, near_N = by_gate(gate, together=any(u.speaker for u in utterances))
    return torch.where(known_N[:, None], logits_NE, gate_NE), known_N | near_N


def model_choice(opened: OpenedModel, utterances: Sequence[Utterance], evidence: Callable[[], Tensor]) -> Choice:
    """The choice of a trained mixture for N utterances: the group given for all audio, or `choose_experts`."""
    info, device = opened.info, opened.accelerator.device
    assert info is not None
    if opened.group >= 0:
        return given_choice(opened, len(utterances))
    gate, column, groups = opened.recogniser.gate, info.column, info.groups
    return choose_experts(utterances, evidence, gate, by=info.route_by, column=column, groups=groups, device=device)


def group_number(info: BundleInfo | None, utterance: Utterance) -> int:
    """Number of the utterance's group in a model with routing by a table; -1 if it has none."""
    if info is None or info.route_by != "table":
        return -1
    (value,) = group_values([utterance], info.column, info.groups)
    return group_index(value, info.groups)


def given_choice(opened: OpenedModel, rows: int) -> Choice:
    """The choice of the group that is given for all audio (`OpenedModel.group`)."""
    assert opened.info is not None
    groups = opened.info.groups
    return route_by_table([groups[opened.group]] * rows, groups, opened.accelerator.device)


def warn_without_group(opened: OpenedModel) -> None:
    """Logs a warning if audio whose group is unknown uses the shared expert alone, for lack of a gate."""
    info = opened.info
    if info is None or info.route_by != "table" or info.gate or opened.voice >= 0 or opened.group >= 0:
        return
    if not blank_choice(info, 1, torch.device("cpu"))[1].any():
        log.warning(
            "model %s is routed by %s, which is not known here: all audio uses the shared expert alone, unless "
            "--expert names one of %s",
            opened.name,
            info.column,
            ", ".join(info.groups),
        )
