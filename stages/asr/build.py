"""The initial model of joint training, its parameter groups, and its description for the bundle."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

from common.clustering.embeddings import EmbeddingTable
from common.config import Config
from common.model import adalora
from common.model.adapters import load_expert
from common.model.bundle import BundleInfo, load_gate
from common.model.gate import Gate
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser, RouterOptions
from common.model.whisper import load_whisper
from common.training.parameter_groups import adapter_groups
from stages.settings import augmentation, lora_scope, mixture_options


def build(
    config: Config,
    model: Path,
    table: EmbeddingTable | None,
    gate: Sequence[Path],
    experts: Sequence[Path],
    *,
    shared: Sequence[Path] = (),
    groups: Sequence[str] = (),
    fit: Sequence[str] | None = None,
) -> Recogniser:
    """The model to train, with pre-trained gate and experts if they are given, otherwise with new ones.

    Args:
        experts: experts of the clusters, in order; for a single cluster without a shared expert, one common expert.
        shared: the shared expert, if it was pre-trained.
        table: embeddings of the utterances for which a gate chooses experts.
        groups: values of the corpus's column for routing by a table, one routed expert for each.
        fit: the utterances from which the scale of a random gate is computed; all of the table if None.
    """
    options = config.asr
    torch.manual_seed(config.seed)
    whisper = load_whisper(model)
    checkpointing = options.gradient_checkpointing
    if options.adapt == "full":
        return Recogniser(whisper, gradient_checkpointing=checkpointing, augmentation=augmentation(config))
    if options.adapt == "adalora":
        return _build_adalora(config, whisper)
    count = len(groups) or len(experts) or (load_gate(gate[0]).num_experts if gate else config.num_experts or 1)
    routed, shared_rank = experts_and_shared_rank(config, count, routed=count > 1 or bool(groups))
    slot = add_mixture(whisper, num_experts=routed, shared_rank=shared_rank, **mixture_options(config))
    if not routed and not options.shared_expert:
        shared = experts
    for number, folder in enumerate(experts if routed else ()):
        load_expert(whisper, number, folder)
    if shared:
        load_expert(whisper, None, shared[0])
    return Recogniser(
        whisper,
        slot=slot,
        gate=_gate(config, table, gate, count, fit) if count > 1 and (gate or not groups) else None,
        options=RouterOptions(
            options.mixture,
            options.top_k,
            options.balance_weight,
            options.entropy_weight,
            options.routed_dropout if shared_rank and routed else 0.0,
        ),
        gradient_checkpointing=checkpointing,
        augmentation=augmentation(config),
    )


def experts_and_shared_rank(config: Config, count: int, *, routed: bool) -> tuple[int, int]:
    """(number of routed experts, rank of the shared expert). A single adapter is a shared expert without routed
    experts.
    """
    if routed:
        return count, config.lora.shared_rank if config.asr.shared_expert else 0
    return 0, config.lora.shared_rank if config.asr.shared_expert else config.lora.rank


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
        gradient_checkpointing=config.asr.gradient_checkpointing,
        augmentation=augmentation(config),
        orthogonality=(adalora.orthogonality, config.adalora.orthogonality),
    )


def _gate(
    config: Config, table: EmbeddingTable | None, gate: Sequence[Path], count: int, fit: Sequence[str] | None
) -> Gate:
    if gate:
        return load_gate(gate[0], config.gating.dropout)
    assert table is not None
    random = Gate(table.vectors_ND.shape[1], config.gating.hidden, count, config.gating.dropout)
    random.fit_scale(torch.from_numpy(table.vectors_ND if fit is None else table.rows(fit)))
    return random


def rank_plan(config: Config) -> adalora.RankPlan:
    """AdaLoRA's schedule of ranks; the mean rank is `lora.rank` unless another is set."""
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
    gate = [p for name, p in recogniser.named_parameters() if name.startswith("gate.") and p.requires_grad]
    gate_group = {
        "params": gate,
        "rate": options.gate_learning_rate / options.learning_rate,
        "weight_decay": options.weight_decay,
    }
    if options.adapt == "lora":
        groups = adapter_groups(
            recogniser,
            routed_rate=options.routed_rate,
            magnitude_rate=options.magnitude_rate,
            weight_decay=options.weight_decay,
        )
        return [*groups, *([gate_group] if gate else [])]
    trained = [p for p in recogniser.parameters() if p.requires_grad]
    decay, flat = options.weight_decay, config.adalora.value_rate if options.adapt == "adalora" else 1.0
    return [
        {"params": [p for p in trained if p.ndim > 1], "rate": 1.0, "weight_decay": decay},
        {"params": [p for p in trained if p.ndim == 1], "rate": flat, "weight_decay": 0.0},
    ]


def describe(
    config: Config, recogniser: Recogniser, base_digest: str, *, groups: Sequence[str], seconds: float
) -> BundleInfo:
    """The description that is required to use the trained model.

    Args:
        groups: groups for routing by a table.
        seconds: duration that 19 of 20 training utterances do not exceed.
    """
    layer = next((layer for _, layer in mixture_layers(recogniser)), None)  # none after a full fine-tune
    shared = layer.shared if layer is not None else None
    rank, alpha = config.lora.rank, config.lora.alpha
    if config.asr.adapt == "adalora" and shared is not None:
        rank = shared.rank
        alpha = rank  # the scale is in the weights
    routed = recogniser.num_experts > 1 or bool(groups)
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
        num_experts=recogniser.num_experts,
        shared_rank=shared.rank if shared is not None else 0,
        mixture=config.asr.mixture,
        top_k=config.asr.top_k,
        rank=rank,
        alpha=alpha,
        targets=config.lora.targets,
        within=lora_scope(config.lora.modules),
        gate=recogniser.gate is not None,
        route_by=config.asr.route_by if routed else "utterance",
        column=config.asr.route_column if groups else "",
        groups=tuple(groups),
        seconds=seconds,
    )
