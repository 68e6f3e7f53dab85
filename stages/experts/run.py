"""Trains one expert on the utterances that the gate assigns to its group, using the stored embeddings.

It is trained alone, or on top of a frozen shared expert.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from common.clustering.embeddings import EmbeddingTable, read_tables
from common.config import Config
from common.data.batches import BatchLoader
from common.data.corpus import Corpus, Utterance
from common.data.tokens import load_codec
from common.json_files import read_object, read_rows, write_object
from common.model.adapters import load_expert, save_expert
from common.model.bundle import load_gate
from common.model.gate import Gate
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.pipeline.stage import Context
from common.training.parameter_groups import adapter_groups
from common.training.speech import mean_loss
from common.training.train import make_accelerator, train
from stages.inputs import evaluation_subset, training_subset
from stages.settings import augmentation, epoch_planner, mixture_options, speech_examples, train_options


def run(
    config: Config,
    context: Context,
    *,
    corpus: Corpus,
    model: Path,
    embeddings: list[Path],
    gate: list[Path],
    output: Path,
    shared: Sequence[Path] = (),
) -> None:
    """Writes a PEFT adapter, report.json and metrics of expert number `context.shard`.

    Args:
        shared: the frozen shared expert on top of which this expert is trained; empty for an expert alone.
    """
    expert = context.shard or 0
    own, dev = _utterances(config, corpus, embeddings, gate[0], expert)
    rank = config.lora.shared_rank if shared else 0
    recogniser = new_adapter(config, model, routed=1, shared_rank=rank, seed=config.seed + expert)
    if shared:
        load_expert(recogniser.whisper, None, shared[0])
        for _, layer in mixture_layers(recogniser):
            assert layer.shared is not None
            layer.shared.requires_grad_(False)
    train_adapter(
        config,
        context,
        recogniser,
        corpus=corpus,
        model=model,
        train_on=own,
        dev=dev,
        max_steps=config.experts.max_steps,
        expert=expert,
        group=read_object(gate[0] / "report.json")["labels"][expert],
        output=output,
    )


def train_adapter(
    config: Config,
    context: Context,
    recogniser: Recogniser,
    *,
    corpus: Corpus,
    model: Path,
    train_on: Sequence[Utterance],
    dev: Sequence[Utterance],
    max_steps: int | None,
    expert: int | None,
    output: Path,
    group: str = "",
) -> None:
    """Trains the trainable parameters of one expert, and writes the expert and its report.

    Args:
        dev: utterances for the selection of weights.
        expert: number of a group, whose expert is the model's only routed one; None for the shared expert.
        group: its name.
    """
    options, name = config.experts, "shared" if expert is None else expert
    accelerator = make_accelerator(config.precision, config.runtime.device)
    recogniser = recogniser.to(accelerator.device)
    if options.compile:
        recogniser.compile_blocks()
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    train_set = speech_examples(config, corpus, train_on, codec, training=True)
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
            routed_rate=config.asr.routed_rate,
            magnitude_rate=config.asr.magnitude_rate,
            weight_decay=options.weight_decay,
        ),
        plan_epoch=epoch_planner(train_set, options, config.seed),
        load=BatchLoader(train_set, num_workers=workers, device=accelerator.device),
        evaluate=evaluate,
        options=replace(train_options(options, config), max_steps=max_steps),
        checkpointer=context.checkpointer(),
        metrics=context.metrics,
        stopping=context.stopping,
        label=f"expert {name}",
    )
    save_expert(recogniser.whisper, None if expert is None else 0, output, base_model=config.model.name)
    report = {
        "cluster": name,
        "group": group,
        "utterances": len(train_set),
        "etiologies": dict(sorted(Counter(u.etiology for u in train_on).items())),
        "steps": result.steps,
        "best_step": result.best_step,
        "best_value": result.value,
    }
    write_object(output / "report.json", report)
    context.summary |= {
        "device": accelerator.device.type,
        "utterances": len(train_set),
        "steps": result.steps,
        "throughput": result.throughput,
    }


def _utterances(
    config: Config, corpus: Corpus, embeddings: Sequence[Path], gate: Path, expert: int
) -> tuple[list[Utterance], list[Utterance]]:
    """The expert's training utterances, and the dev utterances of its evaluation."""
    table, router = read_tables(embeddings), load_gate(gate).eval()
    own = assigned(training_subset(config, corpus, "experts"), table, router, expert)
    if not own:  # a subset smaller than the gate's may hold none of the group: then those that the gate learnt from
        group_of = {row["id"]: row["group"] for row in read_rows(gate / "assignments.jsonl")}
        own = [u for u in corpus.split("train") if group_of.get(u.id) == expert]
    dev = evaluation_subset(config, corpus, "dev")
    return own, assigned(dev, table, router, expert) or dev


def new_adapter(config: Config, model: Path, *, routed: int, shared_rank: int, seed: int) -> Recogniser:
    """The base model with a new routed expert (`routed` 1), a new shared one (`shared_rank` above 0), or both."""
    torch.manual_seed(seed)
    whisper = load_whisper(model)
    slot = add_mixture(whisper, num_experts=routed, shared_rank=shared_rank, **mixture_options(config))
    return Recogniser(whisper, slot=slot, augmentation=augmentation(config))


def assigned(utterances: Sequence[Utterance], table: EmbeddingTable, gate: Gate, expert: int) -> list[Utterance]:
    """The utterances for which the gate's first choice is `expert`."""
    if not utterances:
        return []
    with torch.no_grad():
        choice_N = gate(torch.from_numpy(table.rows([u.id for u in utterances]))).argmax(1).tolist()
    return [u for u, choice in zip(utterances, choice_N, strict=True) if choice == expert]
