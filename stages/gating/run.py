"""Trains the gate to predict groups, and measures it on a held-out tenth of each group."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.clustering.embeddings import read_tables
from common.clustering.report import shared_information
from common.config import Config
from common.data.corpus import Corpus, Utterance
from common.errors import DataError
from common.evaluation.gate_report import gate_report, new_speakers_report
from common.json_files import Row, read_rows, write_object, write_rows
from common.model.bundle import save_gate
from common.model.gate import Gate
from common.pipeline.stage import Context
from common.training.train import make_accelerator, train
from stages.settings import train_options

HELD_OUT = 0.1  # of each group
ASSIGNMENTS = "assignments.jsonl"


@dataclass(frozen=True)
class Groups:
    """Utterances with the group of each.

    Attributes:
        numbers: number of each utterance's group.
        names: names of the groups, by number.
    """

    utterances: tuple[Utterance, ...]
    numbers: tuple[int, ...]
    names: tuple[str, ...]


def clustered_groups(train: Sequence[Utterance], assignments: Sequence[Row]) -> Groups:
    """The clusters.

    Args:
        assignments: rows of the cluster stage.
    """
    utterance_of = {u.id: u for u in train}
    numbers = tuple(int(row["cluster"]) for row in assignments)
    names = tuple(f"cluster {number}" for number in range(max(numbers) + 1))
    return Groups(tuple(utterance_of[row["id"]] for row in assignments), numbers, names)


def labelled_groups(train: Sequence[Utterance], embedded: Collection[str], column: str) -> Groups:
    """The values of a column, for all embedded training utterances with a value, not only for clustered utterances.

    Raises:
        DataError: no utterance has a value.
    """
    known = set(embedded)
    utterances = tuple(u for u in train if u.id in known and getattr(u, column))
    if not utterances:
        raise DataError(
            f"gating.target: the corpus's column {column!r} is empty in train: name another column, or train the gate "
            "on clusters (gating.target=cluster)"
        )
    names = tuple(sorted({str(getattr(u, column)) for u in utterances}))
    number_of = {name: number for number, name in enumerate(names)}
    return Groups(utterances, tuple(number_of[getattr(u, column)] for u in utterances), names)


@dataclass(frozen=True)
class GateBatch:
    """Embeddings and groups of B utterances; a row weighs as much as its class."""

    embedding_BD: Tensor
    label_B: Tensor
    class_weight_K: Tensor
    seconds: float = 0.0
    padding: float = 0.0

    @property
    def weight(self) -> Tensor:
        """Sum of the rows' class weights."""
        return self.class_weight_K[self.label_B].sum()

    def part(self, start: int, stop: int) -> GateBatch:
        """Rows start…stop-1."""
        return GateBatch(self.embedding_BD[start:stop], self.label_B[start:stop], self.class_weight_K)

    def __len__(self) -> int:
        return len(self.label_B)


class GateTraining(nn.Module):
    """The gate with its loss: class-weighted cross-entropy, summed."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, batch: GateBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, nothing more to log)."""
        logits_BK = self.gate(batch.embedding_BD)
        return F.cross_entropy(logits_BK, batch.label_B, weight=batch.class_weight_K, reduction="sum"), {}


def run(
    config: Config, context: Context, *, corpus: Corpus, embeddings: list[Path], clusters: list[Path], output: Path
) -> None:
    """Writes the gate, the groups that it learnt from, report.json (accuracy, confusion, calibration on held-out
    utterances; accuracy on held-out speakers), metrics and plots.
    """
    table, rows = read_tables(embeddings), read_rows(clusters[0] / "assignments.jsonl")
    target, train_split = config.gating.target, corpus.split("train")
    groups = clustered_groups(train_split, rows)
    if target != "cluster":
        groups = labelled_groups(train_split, table.ids, target)
    embedding_ND = torch.from_numpy(table.rows([u.id for u in groups.utterances]))
    label_N = torch.tensor(groups.numbers)
    classes = len(groups.names)
    fit_N, held_N = split_held_out(label_N, config.seed)
    torch.manual_seed(config.seed)
    options = config.gating
    gate = Gate(embedding_ND.shape[1], options.hidden, classes, options.dropout)
    gate.fit_scale(embedding_ND[fit_N])
    gate.fit_centers(embedding_ND[fit_N], label_N[fit_N])
    accelerator = make_accelerator("fp32", config.runtime.device)
    device = accelerator.device
    weight_K = class_weights(label_N[fit_N], classes) if options.class_weights else torch.ones(classes)
    whole = GateBatch(embedding_ND.to(device), label_N.to(device), weight_K.to(device))

    def load(batches: Sequence[list[int]]) -> Iterator[GateBatch]:
        for numbers in batches:
            index = fit_N[numbers].to(device)
            yield GateBatch(whole.embedding_BD[index], whole.label_B[index], whole.class_weight_K)

    def plan_epoch(epoch: int) -> list[list[int]]:
        order = np.random.default_rng((config.seed, epoch)).permutation(len(fit_N)).tolist()
        return [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]

    def evaluate(model: nn.Module, full: bool) -> dict[str, float]:
        held = GateBatch(whole.embedding_BD[held_N], whole.label_B[held_N], torch.ones(classes, device=device))
        loss, _ = model(held)
        return {"loss": float(loss) / len(held)}

    result = train(
        GateTraining(gate).to(device),
        accelerator=accelerator,
        groups=[{"params": list(gate.parameters()), "rate": 1.0, "weight_decay": options.weight_decay}],
        plan_epoch=plan_epoch,
        load=load,
        evaluate=evaluate,
        options=train_options(options, config),
        checkpointer=context.checkpointer(),
        metrics=context.metrics,
        stopping=context.stopping,
        label="gating",
    )
    gate.cpu().eval()
    with torch.no_grad():
        probability_NK = gate(embedding_ND[held_N]).softmax(1).numpy()
    report = gate_report(probability_NK, label_N[held_N].numpy(), groups.names)
    report |= {"steps": result.steps, "target": target}
    report["against_clusters"] = None if target == "cluster" else _against_clusters(groups, rows)
    report["held_out_speakers"] = _held_out_speakers(groups, embedding_ND.numpy(), target, config.seed)
    _write(gate, groups, report, output, plots=config.runtime.plots)
    context.summary |= {"utterances": len(label_N), "accuracy": report["accuracy"], "steps": result.steps}
    context.summary["groups"] = classes


def split_held_out(label_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for training and for measurement: a tenth of each group is held out, none of groups with under four
    rows.

    If all groups are smaller, the training rows are measured (the report gives the number of rows that were trained
    on).
    """
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for label in range(int(label_N.max()) + 1):
        members = (label_N == label).nonzero()[:, 0].numpy()
        if len(members) >= 4:
            held += generator.permutation(members)[: max(1, round(HELD_OUT * len(members)))].tolist()
    kept = sorted(set(range(len(label_N))) - set(held))
    return torch.tensor(kept), torch.tensor(sorted(held) or kept)


def class_weights(label_N: Tensor, classes: int) -> Tensor:
    """Inverse frequency, with mean 1 over utterances: small groups count as much as large ones."""
    count_K = torch.bincount(label_N, minlength=classes).clamp_min(1).float()
    return len(label_N) / (classes * count_K)


def _against_clusters(groups: Groups, assignments: Sequence[Row]) -> dict[str, float]:
    """Agreement of the corpus's groups and the clusters, on the utterances that have both."""
    cluster_of = {row["id"]: int(row["cluster"]) for row in assignments}
    both = [(n, cluster_of[u.id]) for u, n in zip(groups.utterances, groups.numbers, strict=True) if u.id in cluster_of]
    return shared_information([groups.names[n] for n, _ in both], np.array([c for _, c in both], np.int64))


def _held_out_speakers(groups: Groups, vectors_ND: np.ndarray, target: str, seed: int) -> dict[str, Any] | None:
    """Accuracy of predicting the groups of new speakers: for the target, or for the etiologies if the target is
    clusters.
    """
    column, numbers = target, list(groups.numbers)
    etiologies = sorted({u.etiology for u in groups.utterances})
    if target == "cluster" and len(etiologies) > 1 and "" not in etiologies:
        column, numbers = "etiology", [etiologies.index(u.etiology) for u in groups.utterances]
    speakers = [u.speaker for u in groups.utterances]
    report = new_speakers_report(vectors_ND, np.array(numbers), speakers, seed=seed)
    return None if report is None else {"groups": column, **report}


def _write(gate: Gate, groups: Groups, report: dict[str, Any], output: Path, *, plots: bool) -> None:
    save_gate(gate, output)
    rows = zip(groups.utterances, groups.numbers, strict=True)
    write_rows(output / ASSIGNMENTS, ({"id": u.id, "group": number} for u, number in rows))
    write_object(output / "report.json", report)
    if plots:
        from common.report.plots import plot_gating

        plot_gating(output, output)
