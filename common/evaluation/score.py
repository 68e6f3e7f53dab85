"""Decoding a set of utterances and scoring it: predictions.jsonl and summary.json.

Rates are fractions. `wer_*` and `cer_*` clip each utterance at 100%; `*_unclipped` do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.data.batches import Batch, BatchLoader, Example, epoch_batches
from common.data.corpus import Utterance
from common.data.features import log_mel
from common.data.tokens import TextCodec
from common.decoding.decode import Decoding, decode_hidden, decode_texts
from common.evaluation.breakdown import references, scored_row, speakers_of
from common.evaluation.wer import Score, bootstrap_interval, cer, score, wer
from common.model.recogniser import Recogniser
from common.model.whisper import encode


def decode_set(
    recogniser: Recogniser,
    examples: Sequence[Example],
    loader: BatchLoader,
    codec: TextCodec,
    decoding: Decoding,
    accelerator: Accelerator,
    *,
    base: bool = False,
) -> dict[str, str]:
    """id → text of every example, split over the processes and gathered on all of them.

    Args:
        loader: of these examples.
        base: decode with the base model, no expert added.
    """
    was_training = recogniser.training
    recogniser.eval()
    batches = epoch_batches(examples, batch_size=decoding.batch_size, shuffle=False)
    found: list[tuple[str, str]] = []
    with accelerator.autocast():
        for batch in loader(batches[accelerator.process_index :: accelerator.num_processes]):
            texts = (
                _base_texts(recogniser, batch, codec, decoding)
                if base
                else decode_texts(recogniser, batch, codec, decoding=decoding)
            )
            found += zip(batch.ids, texts, strict=True)
    recogniser.train(was_training)
    return dict(gather_object(found) if accelerator.num_processes > 1 else found)


@torch.inference_mode()
def _base_texts(recogniser: Recogniser, batch: Batch, codec: TextCodec, decoding: Decoding) -> list[str]:
    if recogniser.slot is not None:
        recogniser.slot.routing = None
    hidden_BTD = encode(recogniser.whisper, log_mel(batch.audio_BS, recogniser.mel_bands))
    return [one.text for one in decode_hidden(recogniser.whisper, hidden_BTD, codec, decoding)]


def score_set(
    utterances: Sequence[Utterance], texts: Mapping[str, str], language: str, *, published: bool = False
) -> list[Score]:
    """One score per utterance, against the better of its references.

    Args:
        published: compare by Whisper's normaliser alone, as for `common.text.normalise`.
    """
    return [score(u.id, texts[u.id], references(u), language, published=published) for u in utterances]


def speakers_of_set(utterances: Sequence[Utterance]) -> dict[str, str]:
    """Utterance id → speaker, as `breakdown.speakers_of` has it."""
    return speakers_of({"id": u.id, "speaker": u.speaker} for u in utterances)


def by_etiology(utterances: Sequence[Utterance], scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores of each etiology, in alphabetical order; those of none are "unknown" and come first."""
    groups: dict[str, list[Score]] = {}
    for name in sorted({u.etiology for u in utterances}):
        mine = [one for u, one in zip(utterances, scores, strict=True) if u.etiology == name]
        groups.setdefault(name or "unknown", []).extend(mine)
    return groups


def prediction_rows(
    utterances: Sequence[Utterance],
    before: Mapping[str, str],
    after: Mapping[str, str],
    scores_before: Sequence[Score],
    scores_after: Sequence[Score],
    routing: Mapping[str, tuple[list[int], list[float]]],
) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl: what was said, what was heard before and after, by which experts.

    Args:
        before, after: the texts.
        scores_before, scores_after: of these, from `score_set`.
    """
    rows = []
    for u, old, new in zip(utterances, scores_before, scores_after, strict=True):
        row = scored_row(u, after[u.id], new, routing.get(u.id, ((), ())))
        rows.append(row | {"hypothesis_before": before[u.id], "errors_before": old.word_errors})
    return rows


def summarise(utterances: Sequence[Utterance], old: Sequence[Score], new: Sequence[Score]) -> dict[str, Any]:
    """summary.json: overall and by etiology, with bootstrap intervals over speakers.

    Args:
        old, new: scores before and after, from `score_set`.
    """
    speakers = speakers_of_set(utterances)
    old_groups, new_groups = by_etiology(utterances, old), by_etiology(utterances, new)
    return _rates(old, new, speakers) | {
        "wer_before_unclipped": wer(old, clipped=False),
        "wer_after_unclipped": wer(new, clipped=False),
        "loops_before": sum(one.loop for one in old),
        "loops_after": sum(one.loop for one in new),
        "by_etiology": {name: _rates(group, new_groups[name], speakers) for name, group in old_groups.items()},
    }


def _rates(old: Sequence[Score], new: Sequence[Score], speakers: Mapping[str, str]) -> dict[str, Any]:
    return {
        "wer_before": wer(old),
        "wer_after": wer(new),
        "cer_before": cer(old),
        "cer_after": cer(new),
        "wer_interval_before": list(bootstrap_interval(old, speakers, metric="wer")),
        "wer_interval_after": list(bootstrap_interval(new, speakers, metric="wer")),
        "utterances": len(new),
        "speakers": len({speakers[one.id] for one in new}),
    }
