"""Evaluation of each routed expert: loss on dev with the expert, and without it.

Shape letters: N utterances of dev, E experts, K experts per utterance, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.data.batches import epoch_batches
from common.model.mixture import mixture_layers
from common.model.recogniser import Recogniser
from common.model.routing import route

if TYPE_CHECKING:
    from stages.asr.run import Joint

RESAMPLES = 1000


@torch.inference_mode()
def utterance_losses(joint: Joint, numbers: Sequence[int]) -> dict[str, tuple[float, int]]:
    """id → (summed cross-entropy, tokens) of utterances of dev, with the current routing and weights of the model."""
    dev, accelerator = joint.sets["dev"], joint.accelerator
    examples, seconds = [dev.examples[number] for number in numbers], joint.config.runtime.extract_batch_seconds
    batches = epoch_batches(examples, batch_size=1, batch_seconds=seconds, shuffle=False)
    losses: dict[str, tuple[float, int]] = {}
    with accelerator.autocast():
        for batch in dev.loader([[numbers[i] for i in batch] for batch in batches]):
            loss_B, count_B = joint.recogniser.utterance_losses(batch)
            losses |= zip(batch.ids, zip(loss_B.tolist(), count_B.tolist(), strict=True), strict=True)
    return losses


def judge_experts(joint: Joint) -> list[dict[str, Any]]:
    """Evaluates each routed expert on the dev utterances that use it; drops experts that do not lower the loss.

    A dropped expert has no effect any more: its utterances keep the shared expert and their other experts, whose
    weights stay as they are. The experts are evaluated one after the other, without those dropped before, so that the
    last losses are those of the model that is saved. Without a shared expert none is dropped.

    Returns:
        For each expert: its utterances, cross-entropy per token with and without it, the gain with a bootstrap interval
        over speakers, and whether it was dropped.
    """
    recogniser = joint.recogniser.eval()
    joint.point_at("dev")
    logits_NE, known_N = recogniser.all_choices()
    assert logits_NE is not None
    routing = route(logits_NE, recogniser.options.active, known_N)
    used_NK = routing.topk_weights_BK > 0  # a table leaves its second choice without weight
    utterances = joint.sets["dev"].utterances
    losses = utterance_losses(joint, range(len(utterances)))
    may_drop = joint.config.asr.drop_experts and _has_shared(recogniser)
    rows = []
    for expert in range(logits_NE.shape[1]):
        numbers = ((routing.topk_ids_BK == expert) & used_NK).any(1).nonzero()[:, 0].tolist()
        before = drop_expert(recogniser, expert)
        without = utterance_losses(joint, numbers)
        own = [utterances[number] for number in numbers]
        row = _gain([(u.speaker or u.id, *losses[u.id], without[u.id][0]) for u in own])
        dropped = bool(own) and row["gain"] <= 0 and may_drop
        if dropped:
            losses |= without
        else:
            restore_expert(recogniser, expert, before)
        rows.append({"expert": expert, "dropped": dropped, **row})
    return rows


def _gain(losses: list[tuple[str, float, int, float]]) -> dict[str, Any]:
    """Cross-entropy per token with and without an expert, from (speaker, loss with, tokens, loss without)."""
    if not losses:
        return {"utterances": 0, "loss": None, "loss_without": None, "gain": 0.0, "gain_interval": None}
    speakers = sorted({row[0] for row in losses})
    values_N3 = np.array([row[1:] for row in losses], np.float64)
    speaker_N = np.array([speakers.index(row[0]) for row in losses])
    sums_S3 = np.zeros((len(speakers), 3))
    np.add.at(sums_S3, speaker_N, values_N3)
    draws_RS = np.random.default_rng(0).integers(len(speakers), size=(RESAMPLES, len(speakers)))
    drawn_R3 = sums_S3[draws_RS].sum(1)
    gains_R = (drawn_R3[:, 2] - drawn_R3[:, 0]) / drawn_R3[:, 1]
    loss, tokens, without = sums_S3.sum(0).tolist()
    return {
        "utterances": len(losses),
        "loss": loss / tokens,
        "loss_without": without / tokens,
        "gain": (without - loss) / tokens,
        "gain_interval": np.quantile(gains_R, [0.025, 0.975]).tolist() if len(speakers) > 1 else None,
    }


def _has_shared(recogniser: Recogniser) -> bool:
    return all(layer.shared is not None for _, layer in mixture_layers(recogniser))


@torch.no_grad()
def drop_expert(recogniser: Recogniser, expert: int) -> list[Tensor]:
    """Disables the effect of an expert in all layers; returns its matrices B, for `restore_expert`."""
    matrices = [layer.routed.lora_B[expert] for _, layer in mixture_layers(recogniser)]
    before = [b_OR.clone() for b_OR in matrices]
    for b_OR in matrices:
        b_OR.zero_()
    return before


@torch.no_grad()
def restore_expert(recogniser: Recogniser, expert: int, before: Sequence[Tensor]) -> None:
    """Undoes `drop_expert`."""
    for (_, layer), b_OR in zip(mixture_layers(recogniser), before, strict=True):
        layer.routed.lora_B[expert].copy_(b_OR)
