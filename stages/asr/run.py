"""Joint training of gate and experts (or of one expert, or of all weights), then the held-out word error rates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import WhisperForConditionalGeneration

from common import telemetry
from common.clustering.embeddings import EmbeddingTable, read_tables, speaker_means
from common.config import Config
from common.data.batches import BatchLoader, Example
from common.data.corpus import Corpus, Utterance, stratified_subset
from common.data.tokens import TextCodec, load_codec
from common.evaluation.score import by_etiology, decode_set, prediction_rows, score_set, summarise
from common.evaluation.wer import cer, wer
from common.model import adalora
from common.model.adapters import copy_experts
from common.model.bundle import BundleInfo, load_gate, save_recogniser
from common.model.moe import Gate, add_mixture, mixture_layers, part_after, route, routing_report, start_as_one
from common.model.recogniser import Recogniser, RouterOptions
from common.model.whisper import load_whisper
from common.pipeline.stage import Context
from common.training.speech import mean_loss
from common.training.train import TrainResult, make_accelerator, train
from stages.inputs import base_digest, evaluation_subset, training_subset
from stages.settings import augmentation, decoding_options, epoch_planner, lora_scope, speech_examples, train_options


@dataclass(frozen=True)
class SpeechSet:
    """One split, ready to be loaded."""

    utterances: list[Utterance]
    examples: list[Example]
    loader: BatchLoader

    def some(self, count: int, seed: int) -> list[Utterance]:
        """A stratified part of at most `count` utterances."""
        return stratified_subset(self.utterances, count=min(count, len(self.utterances)), seed=seed)


def run(
    config: Config,
    context: Context,
    *,
    corpus: Corpus,
    model: Path,
    output: Path,
    embeddings: Sequence[Path] = (),
    clusters: Sequence[Path] = (),
    gate: Sequence[Path] = (),
    experts: Sequence[Path] = (),
) -> None:
    """Writes the model, metrics.jsonl, predictions.jsonl, summary.json, report.json and plots."""
    accelerator = make_accelerator(config.precision, config.runtime.device, unused_parameters=bool(embeddings))
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    table = read_tables(embeddings) if embeddings else None
    sets = {
        "train": _speech_set(config, corpus, training_subset(config, corpus, "asr"), codec, accelerator, training=True),
        "dev": _speech_set(config, corpus, evaluation_subset(config, corpus, "dev"), codec, accelerator),
        "test": _speech_set(config, corpus, evaluation_subset(config, corpus, "test"), codec, accelerator),
    }
    if table is not None and config.asr.route_by == "speaker":
        table = speaker_means(table, [u for which in sets.values() for u in which.utterances])
    heard = [u.id for u in sets["train"].utterances]
    recogniser = build(config, model, table, gate, experts, fit=heard).to(accelerator.device)
    if config.asr.compile:
        recogniser.compile_blocks()
    result = _train(config, context, recogniser, sets, table, codec, accelerator)
    ranks = adalora.to_lora(recogniser.whisper) if config.asr.adapt == "adalora" else {}  # from here on it is LoRA
    if accelerator.is_main_process:
        usual = float(np.percentile([u.duration for u in sets["train"].utterances], 95))
        info = describe(config, recogniser, base_digest(config, context.scratch), seconds=round(usual, 2))
        save_recogniser(recogniser, info, output)
        if ranks:
            _write_json(output / "ranks.json", ranks)
    base = Recogniser(load_whisper(model)).to(accelerator.device) if config.asr.adapt == "full" else None
    with context.metrics.live.marked(telemetry.EVALUATING):
        _evaluate(config, context, recogniser, base, sets["test"], table, codec, accelerator, result, output)


def _speech_set(
    config: Config,
    data: Corpus,
    utterances: list[Utterance],
    codec: TextCodec,
    accelerator: Accelerator,
    *,
    training: bool = False,
) -> SpeechSet:
    examples = speech_examples(config, data, utterances, codec, training=training)
    loader = BatchLoader(examples, num_workers=config.runtime.num_workers, device=accelerator.device)
    return SpeechSet(utterances, examples, loader)


def build(
    config: Config,
    model: Path,
    table: EmbeddingTable | None,
    gate: Sequence[Path],
    experts: Sequence[Path],
    *,
    fit: Sequence[str] | None = None,
) -> Recogniser:
    """The model to train: pre-trained gate and experts where they are given, random ones otherwise.

    Args:
        table: embeddings of the utterances that a gate chooses experts for.
        fit: the utterances that a random gate takes its scale from; all of the table when None.
    """
    options = config.asr
    torch.manual_seed(config.seed)
    whisper = load_whisper(model)
    if options.adapt == "full":
        return Recogniser(whisper, remat=options.gradient_checkpointing, augmentation=augmentation(config))
    if options.adapt == "adalora":
        return _build_adalora(config, whisper)
    count = len(experts) or (load_gate(gate[0]).num_experts if gate else config.num_experts or 1)
    slot = add_mixture(
        whisper,
        targets=config.lora.targets,
        num_experts=count,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        shared=options.shared_expert,
        within=lora_scope(config.lora.modules),
    )
    copy_experts(experts, whisper)
    if options.common_share:
        start_as_one(whisper)
    router = RouterOptions(options.mixture, options.top_k, options.balance_weight, options.entropy_weight)
    return Recogniser(
        whisper,
        slot=slot,
        gate=_gate(config, table, gate, count, fit),
        options=router,
        remat=options.gradient_checkpointing,
        augmentation=augmentation(config),
    )


def _build_adalora(config: Config, whisper: WhisperForConditionalGeneration) -> Recogniser:
    slot = adalora.add_adalora(
        whisper,
        targets=config.lora.targets,
        rank=rank_plan(config).init_rank,
        scaling=config.lora.alpha / config.lora.rank,
        dropout=config.lora.dropout,
        within=lora_scope(config.lora.modules),
    )
    return Recogniser(
        whisper,
        slot=slot,
        remat=config.asr.gradient_checkpointing,
        augmentation=augmentation(config),
        orthogonality=(adalora.orthogonality, config.adalora.orthogonality),
    )


def _gate(
    config: Config, table: EmbeddingTable | None, gate: Sequence[Path], count: int, fit: Sequence[str] | None
) -> Gate | None:
    if count == 1:
        return None
    if gate:
        return load_gate(gate[0], config.gating.dropout)
    assert table is not None
    random = Gate(table.vectors_ND.shape[1], config.gating.hidden, count, config.gating.dropout)
    random.fit_scale(torch.from_numpy(table.vectors_ND if fit is None else table.rows(fit)))
    return random


def rank_plan(config: Config) -> adalora.RankPlan:
    """AdaLoRA's numbers; a mean rank of `lora.rank` unless another is wished."""
    options = config.adalora
    target = options.target_rank or config.lora.rank
    first = options.init_rank or math.ceil(1.5 * target)
    return adalora.RankPlan(first, target, options.warmup, options.final, options.interval)


def parameter_groups(recogniser: Recogniser, config: Config) -> list[dict[str, Any]]:
    """Experts (or all weights) and gate, each with its learning rate; biases, norms and values are not decayed."""
    options = config.asr
    if options.adapt == "full":
        recogniser.requires_grad_(True)
        recogniser.whisper.model.encoder.embed_positions.requires_grad_(False)  # sinusoids
    gate = [p for name, p in recogniser.named_parameters() if name.startswith("gate.")]
    rest = [p for name, p in recogniser.named_parameters() if not name.startswith("gate.") and p.requires_grad]
    flat_rate = options.learning_rate * (config.adalora.value_rate if options.adapt == "adalora" else 1)
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "lr": options.learning_rate, "weight_decay": options.weight_decay},
        {"params": [p for p in rest if p.ndim == 1], "lr": flat_rate, "weight_decay": 0.0},
        {"params": gate, "lr": options.gate_learning_rate, "weight_decay": options.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _train(
    config: Config,
    context: Context,
    recogniser: Recogniser,
    sets: Mapping[str, SpeechSet],
    table: EmbeddingTable | None,
    codec: TextCodec,
    accelerator: Accelerator,
) -> TrainResult:
    options = train_options(config.asr, config)
    if config.asr.adapt == "adalora":
        options = replace(options, select_from=1 - rank_plan(config).final)  # before, it is not the model wished for
    after_step, extra = _after_step(config, recogniser)
    _look_at(recogniser, sets["train"], table)
    return train(
        recogniser,
        accelerator=accelerator,
        groups=parameter_groups(recogniser, config),
        plan_epoch=epoch_planner(sets["train"].examples, config.asr, config.seed),
        load=sets["train"].loader,
        evaluate=_make_evaluate(config, context, recogniser, sets, table, codec, accelerator),
        options=options,
        checkpointer=context.checkpointer(),
        metrics=context.metrics,
        stopping=context.stopping,
        after_step=after_step,
        extra=extra,
        label="asr",
    )


def _after_step(
    config: Config, recogniser: Recogniser
) -> tuple[Callable[[int, int], None] | None, Mapping[str, torch.Tensor]]:
    """What a regime does after each step, and the tensors that it changes."""
    if config.asr.adapt == "adalora":
        return partial(adalora.allocate, recogniser, plan=rank_plan(config)), adalora.importance_tensors(recogniser)
    if recogniser.slot is not None and recogniser.slot.tied is not None:
        return partial(part_after, recogniser.slot, config.asr.common_share), {"tied": recogniser.slot.tied}
    return None, {}


def _look_at(recogniser: Recogniser, which: SpeechSet, table: EmbeddingTable | None) -> None:
    """Points the gate, where there is one, at the embeddings of a split: a batch's rows are places in it."""
    if recogniser.gate is not None and table is not None:
        device = recogniser.whisper.proj_out.weight.device
        recogniser.embeddings_ND = torch.from_numpy(table.rows([e.id for e in which.examples])).to(device)


def _make_evaluate(
    config: Config,
    context: Context,
    recogniser: Recogniser,
    sets: Mapping[str, SpeechSet],
    table: EmbeddingTable | None,
    codec: TextCodec,
    accelerator: Accelerator,
) -> Callable[[nn.Module, bool], dict[str, float]]:
    """A function for the loop: dev's loss, and the WER of a part of it where checkpoints are selected by that."""
    dev, seconds, decoding = sets["dev"], config.runtime.extract_batch_seconds, decoding_options(config)
    decoded = dev.some(config.asr.select_samples, config.seed)
    wanted = {u.id for u in decoded}
    subset = [example for example in dev.examples if example.id in wanted]
    subset_loader = BatchLoader(subset, num_workers=min(1, config.runtime.num_workers), device=accelerator.device)

    def evaluate(module: nn.Module, full: bool) -> dict[str, float]:
        _look_at(recogniser, dev, table)
        _show_routing(recogniser, config, context)
        scores = {"loss": mean_loss(module, dev.examples, dev.loader, accelerator, seconds)}
        if full and config.asr.select_by == "wer":
            texts = decode_set(recogniser, subset, subset_loader, codec, decoding, accelerator)
            scored = score_set(decoded, texts, config.model.text_language, published=decoding.published)
            scores["wer"] = wer(scored)
            for name, group in by_etiology(decoded, scored).items():
                labels = {"split": "dev", "etiology": name, "model": "after"}
                context.metrics.live.set(telemetry.WER, wer(group), **labels)
                context.metrics.live.set(telemetry.CER, cer(group), **labels)
        _look_at(recogniser, sets["train"], table)
        return scores

    return evaluate


def _show_routing(recogniser: Recogniser, config: Config, context: Context) -> None:
    """Puts the experts' load on the utterances whose embeddings are looked at into the live metrics."""
    if recogniser.gate is not None and recogniser.embeddings_ND is not None:
        top_k = config.asr.top_k if config.asr.mixture == "blend" else 1
        found = routing_report(recogniser.gate(recogniser.embeddings_ND), top_k)
        context.metrics.live.routing(found.load, found.entropy)


def describe(config: Config, recogniser: Recogniser, base_digest: str, *, seconds: float) -> BundleInfo:
    """What has to be known to use the trained model.

    Args:
        seconds: what 19 of 20 training utterances do not exceed.
    """
    full, gate = config.asr.adapt == "full", recogniser.gate
    layers = [layer for _, layer in mixture_layers(recogniser)]
    rank, alpha = config.lora.rank, config.lora.alpha
    if config.asr.adapt == "adalora":
        rank = layers[0].rank
        alpha = rank  # the scale is in the weights
    return BundleInfo(
        base=config.model.name,
        base_digest=base_digest,
        language=config.model.language,
        task=config.model.task,
        context=config.audio.context,
        margin=config.audio.margin,
        layer=config.extract.layer,
        pooling=config.extract.pooling,
        adapt=config.asr.adapt,
        num_experts=0 if full else 1 if gate is None else gate.num_experts,
        shared=any(layer.shared for layer in layers),
        mixture=config.asr.mixture,
        top_k=config.asr.top_k,
        rank=rank,
        alpha=alpha,
        targets=config.lora.targets,
        within=lora_scope(config.lora.modules),
        route_by=config.asr.route_by if gate is not None else "utterance",
        seconds=seconds,
    )


def _evaluate(
    config: Config,
    context: Context,
    recogniser: Recogniser,
    base: Recogniser | None,
    test: SpeechSet,
    table: EmbeddingTable | None,
    codec: TextCodec,
    accelerator: Accelerator,
    result: TrainResult,
    output: Path,
) -> None:
    decoding = decoding_options(config)
    routing, report = _routing(config, recogniser, test, table)
    after = decode_set(recogniser, test.examples, test.loader, codec, decoding, accelerator)
    # A mixture's base model is itself without its experts; after a full fine-tune it is a model of its own.
    before = decode_set(base or recogniser, test.examples, test.loader, codec, decoding, accelerator, base=base is None)
    if not accelerator.is_main_process:
        return
    language = config.model.text_language
    published = decoding.published
    old, new = (score_set(test.utterances, texts, language, published=published) for texts in (before, after))
    rows = prediction_rows(test.utterances, before, after, old, new, routing)
    summary = summarise(test.utterances, old, new)
    report |= {
        "mixture": config.asr.mixture if config.asr.adapt == "lora" else "none",
        "trained_parameters": result.parameters,
        "steps": result.steps,
        "best_step": result.best_step,
        "averaged": result.averaged,
    }
    context.metrics.live.error_rates(summary, split="test")
    _write_json(output / "summary.json", summary)
    _write_json(output / "report.json", report)
    _write_json(output / "throughput.json", result.throughput)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "predictions.jsonl").write_text(lines, encoding="utf-8")
    if config.runtime.plots:
        from common.report.plots import plot_asr

        plot_asr(output, output)
    context.summary |= {key: summary[key] for key in ("wer_before", "wer_after", "cer_before", "cer_after")}
    context.summary |= {"steps": result.steps, "throughput": result.throughput}


def _routing(
    config: Config, recogniser: Recogniser, test: SpeechSet, table: EmbeddingTable | None
) -> tuple[dict[str, tuple[list[int], list[float]]], dict[str, Any]]:
    """Experts and weights of each test utterance, and the summary of them; points the model at test's embeddings."""
    if recogniser.gate is None or table is None:
        return {}, {"experts": 1 if recogniser.slot else 0, "top_k": 1}
    _look_at(recogniser, test, table)
    assert recogniser.embeddings_ND is not None
    with torch.no_grad():
        logits_NE = recogniser.gate(recogniser.embeddings_ND)
    top_k = 1 if config.asr.mixture != "blend" else config.asr.top_k
    chosen = route(logits_NE, top_k)
    per_utterance = {
        example.id: (ids, weights)
        for example, ids, weights in zip(
            test.examples, chosen.topk_ids_BK.tolist(), chosen.topk_weights_BK.tolist(), strict=True
        )
    }
    found = routing_report(logits_NE, top_k)
    return per_utterance, {
        "experts": logits_NE.shape[1],
        "top_k": top_k,
        "load": list(found.load),
        "router_entropy": found.entropy,
        "top1_share": found.top1_share,
        "collapsed": found.collapsed,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
