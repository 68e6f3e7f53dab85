"""Evaluation of each routed expert: loss on dev with the expert, and with the shared expert alone.

Shape letters: E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.data.batches import epoch_batches
from common.model.mixture import mixture_layers
from common.model.recogniser import Recogniser

if TYPE_CHECKING:
    from stages.asr.run import Joint

RESAMPLES = 1000


@torch.inference_mode()
def utterance_losses(joint: Joint) -> dict[str, tuple[float, int]]:
    """id → (summed cross-entropy, tokens) of each utterance of dev, with the current routing of the model."""
    dev, accelerator = joint.sets["dev"], joint.accelerator
    batches = epoch_batches(
        dev.examples, batch_size=1, batch_seconds=joint.config.runtime.extract_batch_seconds, shuffle=False
    )
    losses: dict[str, tuple[float, int]] = {}
    with accelerator.autocast():
        for batch in dev.loader(batches):
            loss_B, count_B = joint.recogniser.utterance_losses(batch)
            losses |= zip(batch.ids, zip(loss_B.tolist(), count_B.tolist(), strict=True), strict=True)
    return losses


def judge_experts(joint: Joint) -> list[dict[str, Any]]:
    """Evaluates each routed expert on the dev utterances that choose it first; drops experts that do not lower the
    loss.

    A dropped expert has no effect any more: its utterances use the shared expert alone. Without a shared expert the
    experts are compared with the base model, and none is dropped.

    Returns:
        For each expert: its utterances, cross-entropy per token with and without it, the gain with a bootstrap interval
        over speakers, and whether it was dropped.
    """
    recogniser = joint.recogniser.eval()
    joint.point_at("dev")
    logits_NE, known_N = recogniser.all_choices()
    assert logits_NE is not None
    first_N = logits_NE.argmax(1).tolist()
    known = [True] * len(first_N) if known_N is None else known_N.tolist()
    with_experts = utterance_losses(joint)
    nothing_N = torch.zeros(len(first_N), dtype=torch.bool, device=logits_NE.device)
    recogniser.choose_by(logits_NE=logits_NE, known_N=nothing_N)
    without = utterance_losses(joint)
    utterances = joint.sets["dev"].utterances
    rows = []
    for expert in range(logits_NE.shape[1]):
        own = [u for u, e, k in zip(utterances, first_N, known, strict=True) if e == expert and k]
        row = _gain([(u.speaker or u.id, *with_experts[u.id], without[u.id][0]) for u in own])
        dropped = bool(own) and row["gain"] <= 0 and joint.config.asr.drop_experts and _has_shared(recogniser)
        if dropped:
            drop_expert(recogniser, expert)
        rows.append({"expert": expert, "dropped": dropped, **row})
    joint.point_at("dev")
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
    loss, tokens, without = sums_S3.sum(0)
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
def drop_expert(recogniser: Recogniser, expert: int) -> None:
    """Disables the effect of an expert in all layers."""
    for _, layer in mixture_layers(recogniser):
        layer.routed.lora_B[expert].zero_()
