"""Joint training of all experts and the gate (or of one adapter, or of all weights), then the held-out error rates."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from common import telemetry
from common.clustering.embeddings import read_tables
from common.config import Config
from common.data.batches import BatchLoader, Example
from common.data.corpus import Corpus, Utterance
from common.data.features import describe_context
from common.data.subsets import stratified_subset
from common.data.tokens import TextCodec, load_codec
from common.errors import Preempted
from common.evaluation.score import (
    by_etiology,
    decode_set,
    prediction_rows,
    rates_of,
    score_set,
    scored_rows,
    summarise,
)
from common.evaluation.wer import cer, wer
from common.json_files import write_object, write_rows
from common.model import adalora
from common.model.bundle import save_recogniser
from common.model.recogniser import Recogniser
from common.model.routing import routing_report
from common.model.whisper import load_whisper
from common.pipeline.attempts import counting
from common.pipeline.stage import Context
from common.storage.artifacts import Key
from common.training.speech import mean_loss
from common.training.train import TrainResult, make_accelerator, train
from stages.asr.ablation import judge_experts
from stages.asr.base import base_key, base_transcripts
from stages.asr.build import build, describe, parameter_groups, rank_plan
from stages.asr.router import Router, gate_groups, table_groups
from stages.inputs import evaluation_subset, training_subset
from stages.settings import decoding_options, epoch_planner, speech_examples, train_options


@dataclass(frozen=True)
class SpeechSet:
    """One split, ready for loading."""

    utterances: list[Utterance]
    examples: list[Example]
    loader: BatchLoader


@dataclass(frozen=True)
class Joint:
    """Objects shared by the steps of joint training, from the first step to the scores of the test set."""

    config: Config
    context: Context
    recogniser: Recogniser
    router: Router
    sets: Mapping[str, SpeechSet]
    base_test: SpeechSet  # the test set as the base model takes it, in 30 s
    corpus_digest: str
    groups: tuple[str, ...]  # names of the routed experts; none where they are clusters
    codec: TextCodec
    accelerator: Accelerator

    def point_at(self, split: str) -> None:
        """Sets the routing of the utterances of a split in the model."""
        self.router.point_at(self.recogniser, self.sets[split].utterances, training=split == "train")


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
    shared: Sequence[Path] = (),
    experts: Sequence[Path] = (),
) -> None:
    """Writes the model, metrics.jsonl, predictions.jsonl, summary.json, report.json and plots."""
    options = config.asr
    accelerator = make_accelerator(config.precision, config.runtime.device, unused_parameters=bool(embeddings))
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    chosen = {
        "train": training_subset(config, corpus, "asr"),
        "dev": evaluation_subset(config, corpus, "dev"),
        "test": evaluation_subset(config, corpus, "test"),
    }
    table = read_tables(embeddings) if embeddings else None
    groups: tuple[str, ...] = ()
    if options.adapt == "lora" and options.route_by == "table":
        count = config.num_experts or 1
        groups = gate_groups(gate) or table_groups(chosen["train"], options.route_column, count=count, seed=config.seed)
    fit = [u.id for u in chosen["train"]]
    recogniser = build(config, model, table, gate, experts, shared=shared, groups=groups, fit=fit).to(
        accelerator.device
    )
    base_test = _speech_set(config, corpus, chosen["test"], codec, accelerator, context="30s")
    joint = Joint(
        config,
        context,
        recogniser,
        Router(options.route_by, table, options.route_column, groups),
        {
            name: _speech_set(config, corpus, own, codec, accelerator, training=name == "train")
            for name, own in chosen.items()
        },
        base_test,
        corpus.digest,
        groups or gate_groups(gate),
        codec,
        accelerator,
    )
    _prepare_gate(joint)
    if options.compile:
        recogniser.compile_blocks()
    result = _train(joint)
    with _training_is_saved():
        _finish(joint, model, result, output)


def _finish(
    joint: Joint,
    model: Path,
    result: TrainResult,
    output: Path,
) -> None:
    """Writes the trained model, then its error rates and the base model's."""
    config, recogniser, accelerator, options = joint.config, joint.recogniser, joint.accelerator, joint.config.asr
    ranks = adalora.to_lora(recogniser.whisper) if options.adapt == "adalora" else {}  # from here on it is LoRA
    judged = judge_experts(joint) if recogniser.num_experts > 1 and options.mixture != "loss" else []
    if accelerator.is_main_process:
        usual = float(np.percentile([u.duration for u in joint.sets["train"].utterances], 95))
        digest = joint.context.sources["model"]
        info = describe(config, recogniser, digest, groups=joint.router.groups, seconds=round(usual, 2))
        save_recogniser(recogniser, info, output)
        if ranks:
            write_object(output / "ranks.json", ranks)
    with joint.context.metrics.live.marked(telemetry.EVALUATING):
        _evaluate(joint, model, result, judged, output)


def _speech_set(
    config: Config,
    corpus: Corpus,
    utterances: list[Utterance],
    codec: TextCodec,
    accelerator: Accelerator,
    *,
    training: bool = False,
    context: Literal["dynamic", "30s"] | None = None,
) -> SpeechSet:
    examples = speech_examples(config, corpus, utterances, codec, training=training, context=context)
    loader = BatchLoader(examples, num_workers=config.runtime.num_workers, device=accelerator.device)
    return SpeechSet(utterances, examples, loader)


def _prepare_gate(joint: Joint) -> None:
    """Calibrates on dev the distance beyond which the gate abstains; freezes a pre-trained gate.

    For a pre-trained gate, the load-balance loss of a few utterances is only noise, and AdamW changes the gate at the
    full rate even if its gradient is small (docs/regimes.md has the figures).
    """
    gate, router = joint.recogniser.gate, joint.router
    if gate is None:
        return
    if joint.config.asr.abstain and gate.center_ED.any():
        gate.calibrate(router.embeddings(joint.sets["dev"].utterances).to(gate.mean_D.device))
    if router.by == "speaker" or joint.config.asr.pretrain != "none":
        gate.requires_grad_(False)


def _train(joint: Joint) -> TrainResult:
    config, context, train_set = joint.config, joint.context, joint.sets["train"]
    options = train_options(config.asr, config)
    after_step: Callable[[int, int], None] | None = None
    extra: Mapping[str, torch.Tensor] = {}
    if config.asr.adapt == "adalora":
        options = replace(options, select_from=1 - rank_plan(config).final)  # earlier ones have ranks to be taken away
        after_step = partial(adalora.allocate, joint.recogniser, plan=rank_plan(config))
        extra = adalora.importance_tensors(joint.recogniser)
    elif joint.recogniser.options.routed_dropout:
        draw = joint.recogniser.draw.fill_(config.seed * 1_000_003 % 2**32)
        after_step = partial(_next_draw, draw)
        extra = {"draw": draw}
    joint.point_at("train")
    return train(
        joint.recogniser,
        accelerator=joint.accelerator,
        groups=parameter_groups(joint.recogniser, config),
        plan_epoch=epoch_planner(train_set.examples, config.asr, config.seed),
        load=train_set.loader,
        evaluate=_make_evaluate(joint),
        options=options,
        checkpointer=context.checkpointer(),
        metrics=context.metrics,
        stopping=context.stopping,
        after_step=after_step,
        extra=extra,
        label="asr",
    )


def _next_draw(draw: torch.Tensor, step: int, total: int) -> None:
    """Lets the next step leave other utterances to the shared expert alone."""
    draw.add_(1)


def _make_evaluate(joint: Joint) -> Callable[[nn.Module, bool], dict[str, float]]:
    """The evaluation function for the loop: loss on dev, and WER of a part of dev if checkpoints are selected
    by WER.
    """
    config, dev, live = joint.config, joint.sets["dev"], joint.context.metrics.live
    seconds, decoding = config.runtime.extract_batch_seconds, decoding_options(config)
    count = min(config.asr.select_samples, len(dev.utterances))
    decoded = stratified_subset(dev.utterances, count=count, seed=config.seed)
    wanted = {u.id for u in decoded}
    subset = [example for example in dev.examples if example.id in wanted]
    workers = min(1, config.runtime.num_workers)
    subset_loader = BatchLoader(subset, num_workers=workers, device=joint.accelerator.device)

    def evaluate(module: nn.Module, full: bool) -> dict[str, float]:
        joint.point_at("dev")
        _show_routing(joint)
        scores = {"loss": mean_loss(module, dev.examples, dev.loader, joint.accelerator, seconds)}
        if full and config.asr.select_by == "wer":
            texts = decode_set(joint.recogniser, subset, subset_loader, joint.codec, decoding, joint.accelerator)
            scored = score_set(decoded, texts, config.model.text_language, published=decoding.published)
            scores["wer"] = wer(scored)
            for name, group in by_etiology(decoded, scored).items():
                labels = {"split": "dev", "etiology": name, "model": "after"}
                live.set(telemetry.WER, wer(group), **labels)
                live.set(telemetry.CER, cer(group), **labels)
        joint.point_at("train")
        return scores

    return evaluate


def _show_routing(joint: Joint) -> None:
    """Sets the experts' load on the currently routed split in the live metrics."""
    logits_NE, known_N = joint.recogniser.all_choices()
    if logits_NE is not None:
        report = routing_report(logits_NE, joint.recogniser.options.active, known_N)
        joint.context.metrics.live.routing(report.load, report.entropy)


def _evaluate(joint: Joint, model: Path, result: TrainResult, judged: list[dict[str, Any]], output: Path) -> None:
    config, context, test = joint.config, joint.context, joint.sets["test"]
    routing, report = _routing(joint)
    started, language = time.monotonic(), config.model.text_language
    after = _decode(joint, "scoring the trained model", joint.recogniser, test)
    before, decoded = _base_texts(joint, model)
    if not joint.accelerator.is_main_process:
        return
    audio = (2 if decoded else 1) * sum(u.duration for u in test.utterances)
    context.summary["scoring"] = {"audio_seconds": audio, "seconds": time.monotonic() - started}
    score = partial(scored_rows, test.utterances, language=language, published=decoding_options(config).published)
    old, new = score(before, {}), score(after, routing)
    rates = {"before": rates_of(old), "after": rates_of(new)}
    rows, summary = prediction_rows(old, new), summarise(**rates)
    in_train = {u.speaker for u in joint.sets["train"].utterances} - {""}
    summary["speakers_in_train"] = len({u.speaker for u in test.utterances} & in_train)
    after_context = describe_context(config.audio.context, config.audio.margin)
    summary["audio_context"] = {"before": describe_context("30s", 0), "after": after_context}
    report |= {
        "mixture": config.asr.mixture if config.asr.adapt == "lora" else "none",
        "trained_parameters": result.parameters,
        "steps": result.steps,
        "best_step": result.best_step,
        "averaged": result.averaged,
        "experts_judged": judged,
    }
    context.metrics.live.error_rates(summary, split="test")
    write_object(output / "summary.json", summary)
    write_object(output / "rates.json", rates)
    write_object(output / "report.json", report)
    write_object(output / "throughput.json", result.throughput)
    write_rows(output / "predictions.jsonl", rows)
    if config.runtime.plots:
        from common.report.plots import plot_asr

        plot_asr(output, output)
    context.summary |= {key: summary[key] for key in ("wer_before", "wer_after", "cer_before", "cer_after")}
    context.summary |= {"device": joint.accelerator.device.type, "steps": result.steps, "throughput": result.throughput}


def _base_texts(joint: Joint, model: Path) -> tuple[dict[str, str], bool]:
    """id → text of the base model for every test utterance, and whether it was decoded now."""
    config, utterances, accelerator = joint.config, joint.base_test.utterances, joint.accelerator

    def key() -> Key:
        digest = joint.context.sources["model"]
        return base_key(config, joint.corpus_digest, utterances, digest, accelerator.mixed_precision)

    def decode() -> dict[str, str]:
        # The base of a mixture is the mixture without experts; after a full fine-tune it is a separate model.
        own = Recogniser(load_whisper(model)).to(accelerator.device) if config.asr.adapt == "full" else None
        name = "scoring the base model"
        return _decode(joint, name, own or joint.recogniser, joint.base_test, base=own is None)

    return base_transcripts(joint.context.results, key, utterances, decode, accelerator)


def _decode(joint: Joint, name: str, recogniser: Recogniser, part: SpeechSet, *, base: bool = False) -> dict[str, str]:
    """id → text of every utterance of a set, with a progress bar of this name."""
    hidden = joint.config.runtime.quiet or not joint.accelerator.is_main_process
    activity, total = joint.context.attempt.activity, len(part.examples)
    with counting(activity, total, name, unit="utterances", hidden=hidden) as count:
        return decode_set(
            recogniser,
            part.examples,
            part.loader,
            joint.codec,
            decoding_options(joint.config),
            joint.accelerator,
            base=base,
            count=count,
            stopping=joint.context.stopping,
        )


@contextmanager
def _training_is_saved() -> Iterator[None]:
    """Logs what is saved if the work after training is interrupted."""
    try:
        yield
    except Preempted:
        message = "asr: stopped by a signal while scoring: training is saved; scoring will start again"
        raise Preempted(message) from None


def _routing(joint: Joint) -> tuple[dict[str, tuple[list[int], list[float]]], dict[str, Any]]:
    """Experts and weights of each test utterance, and their summary; sets the routing of the test set in the model."""
    joint.point_at("test")
    logits_NE, known_N = joint.recogniser.all_choices()
    if logits_NE is None:
        return {}, {"experts": 1 if joint.recogniser.slot else 0, "top_k": 1}
    top_k, examples = joint.recogniser.options.active, joint.sets["test"].examples
    chosen = joint.recogniser.set_routing(logits_NE, len(examples), known_N)
    ids, weights = chosen.topk_ids_BK.tolist(), chosen.topk_weights_BK.tolist()
    report = routing_report(logits_NE, top_k, known_N)
    return {example.id: (i, w) for example, i, w in zip(examples, ids, weights, strict=True)}, {
        "experts": logits_NE.shape[1],
        "top_k": top_k,
        "groups": list(joint.groups),
        "load": list(report.load),
        "router_entropy": report.entropy,
        "top1_share": report.top1_share,
        "abstained": report.abstained,
        "collapsed": report.collapsed,
    }
