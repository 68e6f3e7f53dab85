"""Trains one expert on the utterances that the gate gives to its cluster; embeddings are cached, not computed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from common.clustering.embeddings import EmbeddingTable, read_tables
from common.config import Config
from common.data.batches import BatchLoader
from common.data.corpus import Corpus, Utterance
from common.data.tokens import load_codec
from common.model.adapters import save_expert
from common.model.bundle import load_gate
from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.pipeline.stage import Context
from common.training.rates import adapter_groups
from common.training.speech import mean_loss, read_jsonl_column
from common.training.train import make_accelerator, train
from stages.inputs import evaluation_subset, training_subset
from stages.settings import augmentation, epoch_planner, lora_scope, speech_examples, train_options


def run(
    config: Config,
    context: Context,
    *,
    corpus: Corpus,
    model: Path,
    embeddings: list[Path],
    clusters: list[Path],
    gate: list[Path],
    output: Path,
) -> None:
    """Writes a PEFT adapter, report.json and metrics of expert number `context.shard`."""
    expert = context.shard or 0
    options = config.experts
    mine, dev = _utterances(config, corpus, embeddings, clusters[0], gate[0], expert)
    accelerator = make_accelerator(config.precision, config.runtime.device)
    recogniser = _recogniser(config, model, expert).to(accelerator.device)
    if options.compile:
        recogniser.compile_blocks()
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    train_set = speech_examples(config, corpus, mine, codec, training=True)
    dev_set = speech_examples(config, corpus, dev, codec)
    workers = config.runtime.num_workers
    dev_loader = BatchLoader(dev_set, num_workers=min(workers, 1), device=accelerator.device)

    def evaluate(module: nn.Module, full: bool) -> dict[str, float]:
        seconds = config.runtime.extract_batch_seconds
        return {"loss": mean_loss(module, dev_set, dev_loader, accelerator, seconds)}

    result = train(
        recogniser,
        accelerator=accelerator,
        groups=adapter_groups(
            recogniser,
            routed_rate=1.0,
            magnitude_rate=config.asr.magnitude_rate,
            weight_decay=options.weight_decay,
        ),
        plan_epoch=epoch_planner(train_set, options, config.seed),
        load=BatchLoader(train_set, num_workers=workers, device=accelerator.device),
        evaluate=evaluate,
        options=train_options(options, config),
        checkpointer=context.checkpointer(),
        metrics=context.metrics,
        stopping=context.stopping,
        label=f"expert {expert}",
    )
    save_expert(recogniser.whisper, 0, output, base_model=config.model.name)
    report = {
        "cluster": expert,
        "utterances": len(train_set),
        "etiologies": dict(sorted(Counter(u.etiology for u in mine).items())),
        "steps": result.steps,
        "best_step": result.best_step,
        "best_value": result.value,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    context.summary |= {
        "device": accelerator.device.type,
        "utterances": len(train_set),
        "steps": result.steps,
        "throughput": result.throughput,
    }


def _utterances(
    config: Config, corpus: Corpus, embeddings: Sequence[Path], clusters: Path, gate: Path, expert: int
) -> tuple[list[Utterance], list[Utterance]]:
    """What the expert is trained on, and what of dev it is judged by."""
    table, router = read_tables(embeddings), load_gate(gate).eval()
    mine = assigned(training_subset(config, corpus, "experts"), table, router, expert)
    if not mine:  # a subset smaller than the clustered one may hold none of the cluster: then its founding members
        cluster_of = read_jsonl_column(clusters / "assignments.jsonl", "cluster")
        mine = [u for u in corpus.split("train") if cluster_of.get(u.id) == expert]
    dev = evaluation_subset(config, corpus, "dev")
    return mine, assigned(dev, table, router, expert) or dev


def _recogniser(config: Config, model: Path, expert: int) -> Recogniser:
    """The base model with one new expert."""
    torch.manual_seed(config.seed + expert)
    whisper = load_whisper(model)
    slot = add_mixture(
        whisper,
        targets=config.lora.targets,
        num_experts=1,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        magnitude=config.lora.magnitude,
        within=lora_scope(config.lora.modules),
    )
    return Recogniser(whisper, slot=slot, augmentation=augmentation(config))


def assigned(utterances: Sequence[Utterance], table: EmbeddingTable, gate: Gate, expert: int) -> list[Utterance]:
    """The utterances for which the gate's first choice is `expert`."""
    if not utterances:
        return []
    with torch.no_grad():
        choice_N = gate(torch.from_numpy(table.rows([u.id for u in utterances]))).argmax(1).tolist()
    return [u for u, choice in zip(utterances, choice_N, strict=True) if choice == expert]
