"""Trains the gate to predict clusters, keeping a tenth of each cluster aside to measure it honestly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.clustering.embeddings import read_tables
from common.config import Config
from common.evaluation.gate_report import gate_report
from common.json_files import read_rows
from common.model.bundle import save_gate
from common.model.gate import Gate
from common.pipeline.stage import Context
from common.training.train import make_accelerator, train
from stages.settings import train_options

HELD_OUT = 0.1  # of each cluster


@dataclass(frozen=True)
class GateBatch:
    """Embeddings and clusters of B utterances; a row weighs as much as its class."""

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


def run(config: Config, context: Context, *, embeddings: list[Path], clusters: list[Path], output: Path) -> None:
    """Writes the gate, report.json (accuracy, confusion, calibration on held-out utterances), metrics and plots."""
    rows = read_rows(clusters[0] / "assignments.jsonl")
    embedding_ND = torch.from_numpy(read_tables(embeddings).rows([row["id"] for row in rows]))
    label_N = torch.tensor([row["cluster"] for row in rows])
    classes = int(label_N.max()) + 1
    fit_N, held_N = split_held_out(label_N, config.seed)
    torch.manual_seed(config.seed)
    options = config.gating
    gate = Gate(embedding_ND.shape[1], options.hidden, classes, options.dropout)
    gate.fit_scale(embedding_ND[fit_N])
    gate.fit_centers(embedding_ND[fit_N], label_N[fit_N])
    accelerator = make_accelerator("fp32", config.runtime.device)
    device = accelerator.device
    weight_K = class_weights(label_N[fit_N], classes) if options.class_weights else torch.ones(classes)
    table = GateBatch(embedding_ND.to(device), label_N.to(device), weight_K.to(device))

    def load(batches: Sequence[list[int]]) -> Iterator[GateBatch]:
        for numbers in batches:
            index = fit_N[numbers].to(device)
            yield GateBatch(table.embedding_BD[index], table.label_B[index], table.class_weight_K)

    def plan_epoch(epoch: int) -> list[list[int]]:
        order = np.random.default_rng((config.seed, epoch)).permutation(len(fit_N)).tolist()
        return [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]

    def evaluate(model: nn.Module, full: bool) -> dict[str, float]:
        held = GateBatch(table.embedding_BD[held_N], table.label_B[held_N], torch.ones(classes, device=device))
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
    report = _report(gate.cpu().eval(), embedding_ND[held_N], label_N[held_N]) | {"steps": result.steps}
    _write(gate, report, output, plots=config.runtime.plots)
    context.summary |= {"utterances": len(rows), "accuracy": report["accuracy"], "steps": result.steps}


def split_held_out(label_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to fit on and to measure on: a tenth of each cluster, nothing of clusters under four.

    When no cluster is that large, the rows to fit on are measured too (the report says how many it saw).
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
    """Inverse frequency, with mean 1 over utterances: small clusters count as much as large ones."""
    count_K = torch.bincount(label_N, minlength=classes).clamp_min(1).float()
    return len(label_N) / (classes * count_K)


def _report(gate: Gate, embedding_ND: Tensor, label_N: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        probability_NK = gate(embedding_ND).softmax(1).numpy()
    return gate_report(probability_NK, label_N.numpy())


def _write(gate: Gate, report: dict[str, Any], output: Path, *, plots: bool) -> None:
    save_gate(gate, output)
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plots:
        from common.report.plots import plot_gating

        plot_gating(output, output)
