"""The choice of experts for each split's utterances: by the gate per utterance or per speaker, or by a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from common.clustering.embeddings import EmbeddingTable
from common.data.corpus import Utterance
from common.data.groups import SHUFFLED, group_values, shuffled_names
from common.errors import DataError
from common.inference.choose_experts import choose_experts
from common.json_files import read_object
from common.model.gate import Gate
from common.model.recogniser import Recogniser


@dataclass(frozen=True)
class Router:
    """The router of a run.

    Attributes:
        by: `utterance`, `speaker` or `table`.
        table: pooled embeddings of all splits; None without a gate.
        column: column of the corpus for routing by a table.
        groups: values of the column that have an expert, for routing by a table.
    """

    by: Literal["utterance", "speaker", "table"]
    table: EmbeddingTable | None
    column: str = ""
    groups: tuple[str, ...] = ()

    def embeddings(self, utterances: Sequence[Utterance]) -> Tensor:
        """embedding_ND of utterances, in their order."""
        assert self.table is not None
        return torch.from_numpy(self.table.rows([u.id for u in utterances]))

    def point_at(self, recogniser: Recogniser, utterances: Sequence[Utterance], *, training: bool = False) -> None:
        """Sets the routing of a split in the model: the rows of a batch are positions in the split.

        In training every utterance belongs to a group of the gate, since the groups were computed from the training
        utterances.
        """
        gate = recogniser.gate
        if gate is None and not self.groups:
            return
        embedding_ND = self.embeddings(utterances).to(gate.mean_D.device) if gate is not None else None
        logits_NE, known_N = choose_experts(
            utterances,
            lambda: _evidence(gate, embedding_ND),
            gate,
            by=self.by,
            column=self.column,
            groups=self.groups,
            device=recogniser.whisper.device,
        )
        known = None if training and self.by != "table" else known_N
        if gate is not None and any(p.requires_grad for p in gate.parameters()):
            recogniser.choose_by(embeddings_ND=embedding_ND, known_N=known)
        else:
            recogniser.choose_by(logits_NE=logits_NE, known_N=known)


@torch.no_grad()
def _evidence(gate: Gate | None, embedding_ND: Tensor | None) -> Tensor:
    """evidence_NF of utterances about their groups, without the gate's dropout."""
    assert gate is not None and embedding_ND is not None
    was_training = gate.training
    evidence_NF = gate.eval().evidence(embedding_ND)
    gate.train(was_training)
    return evidence_NF


def gate_groups(gate: Sequence[Path]) -> tuple[str, ...]:
    """The names of the routed experts: the groups on which the gate was trained; empty for clusters or without
    a gate.
    """
    report = read_object(gate[0] / "report.json") if gate else {}
    return tuple(report["labels"]) if report.get("target", "cluster") != "cluster" else ()


def table_groups(utterances: Sequence[Utterance], column: str, *, count: int, seed: int) -> tuple[str, ...]:
    """The groups of a table, one routed expert for each: the values of a column in training, or those of a control.

    Args:
        count: number of randomly drawn groups.
        seed: random seed of the groups.

    Raises:
        DataError: there are no groups.
    """
    names = shuffled_names(count, seed) if column == SHUFFLED else ()
    groups = names or tuple(sorted(set(group_values(utterances, column)) - {""}))
    if not groups:
        raise DataError(
            f"asr.route_by=table routes by the corpus's column {column!r}, which is empty in train: "
            "give another column (asr.route_column) or route by utterance or speaker"
        )
    return groups
