"""Decodes and scores a set of utterances: predictions.jsonl and summary.json.

Rates are fractions. `wer_*` and `cer_*` clip each utterance at 100%; `*_unclipped` do not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.data.batches import Batch, BatchLoader, Example, epoch_batches
from common.data.corpus import Utterance
from common.data.tokens import TextCodec
from common.decoding.decode import Decoding, decode_hidden
from common.errors import Preempted
from common.evaluation.breakdown import Routing, breakdown, references, score_of, scored_row
from common.evaluation.wer import Score, score
from common.json_files import Row
from common.model.recogniser import Recogniser


def decode_set(
    recogniser: Recogniser,
    examples: Sequence[Example],
    loader: BatchLoader,
    codec: TextCodec,
    decoding: Decoding,
    accelerator: Accelerator,
    *,
    base: bool = False,
    count: Callable[[int], object] = lambda units: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, str]:
    """id → text of every example; the work is divided over the processes, and the result gathered on all of them.

    Args:
        loader: of these examples.
        base: decode with the base model, no expert added.
        count: counts the examples.
        stopping: asked at every batch.

    Raises:
        Preempted: `stopping` became true.
    """

    @torch.inference_mode()
    def transcribe(batch: Batch) -> Iterable[tuple[str, Routing]]:
        hidden_BTD = recogniser.encode_batch(batch, base=base)
        decoded = decode_hidden(recogniser.whisper, hidden_BTD, codec, decoding, recogniser.slot)
        return [(result.text, ((), ())) for result in decoded]

    was_training = recogniser.training
    recogniser.eval()
    with accelerator.autocast():
        decoded = decode_batches(
            examples, loader, transcribe, accelerator, batch_size=decoding.batch_size, count=count, stopping=stopping
        )
    recogniser.train(was_training)
    return {name: text for name, (text, _) in decoded.items()}


def decode_batches(
    examples: Sequence[Example],
    loader: BatchLoader,
    transcribe: Callable[[Batch], Iterable[tuple[str, Routing]]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    count: Callable[[int], object] = lambda units: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, tuple[str, Routing]]:
    """id → text and routing of every example; the work is divided over the processes, and the result gathered on all.

    Args:
        loader: of these examples.
        transcribe: a batch → text and routing of each of its utterances.
        count: counts the examples; those of other processes are estimated.
        stopping: asked at every batch.

    Raises:
        Preempted: `stopping` became true.
    """
    world, left = accelerator.num_processes, len(examples)
    batches = epoch_batches(examples, batch_size=batch_size, shuffle=False)
    decoded: list[tuple[str, tuple[str, Routing]]] = []
    for batch in loader(batches[accelerator.process_index :: world]):
        decoded += zip(batch.ids, transcribe(batch), strict=True)
        counted = min(left, len(batch) * world)
        left -= counted
        count(counted)
        if stopping():
            raise Preempted("stopped by a signal while texts were decoded")
    count(left)
    return dict(gather_object(decoded) if world > 1 else decoded)


def score_set(
    utterances: Sequence[Utterance], texts: Mapping[str, str], language: str, *, published: bool = False
) -> list[Score]:
    """One score per utterance, against the better of its references.

    Args:
        published: compare by Whisper's normaliser alone, as for `common.text.normalise`.
    """
    return [score(u.id, texts[u.id], references(u), language, published=published) for u in utterances]


def by_etiology(utterances: Sequence[Utterance], scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores of each etiology, in alphabetical order; utterances without an etiology are "unknown" and come
    first.
    """
    groups: dict[str, list[Score]] = {}
    for name in sorted({u.etiology for u in utterances}):
        members = [score for u, score in zip(utterances, scores, strict=True) if u.etiology == name]
        groups.setdefault(name or "unknown", []).extend(members)
    return groups


def scored_rows(
    utterances: Sequence[Utterance],
    texts: Mapping[str, str],
    routing: Mapping[str, Routing],
    language: str,
    *,
    published: bool = False,
) -> list[Row]:
    """Rows of a model's texts, each scored against the better of its references (`breakdown.scored_row`).

    Args:
        texts: by utterance id.
        routing: routing by utterance id, if the utterance was routed.
        published: as in `score_set`.
    """
    scores = score_set(utterances, texts, language, published=published)
    return [
        scored_row(u, texts[u.id], score, routing.get(u.id, ((), ())))
        for u, score in zip(utterances, scores, strict=True)
    ]


def rates_of(rows: Sequence[Row]) -> Row:
    """Error rates of scored rows, overall and by groups, as written by the asr stage and by `moe-asr evaluate`."""
    return breakdown(rows, [score_of(row) for row in rows])


def prediction_rows(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """Rows of predictions.jsonl: rows of the trained model, extended by text and errors of the base model."""
    return [
        new | {"hypothesis_before": old["hypothesis"], "errors_before": old["errors"]}
        for old, new in zip(before, after, strict=True)
    ]


def summarise(before: Row, after: Row) -> dict[str, Any]:
    """The object of summary.json: `rates_of` before and after training, overall and by etiology."""
    old, new = before["overall"], after["overall"]
    return _beside(old, new) | {
        "wer_before_unclipped": old["wer_unclipped"],
        "wer_after_unclipped": new["wer_unclipped"],
        "loops_before": old["loops"],
        "loops_after": new["loops"],
        "by_etiology": {
            name: _beside(before["by_etiology"][name], rates) for name, rates in after["by_etiology"].items()
        },
    }


def _beside(old: Row, new: Row) -> dict[str, Any]:
    return {
        "wer_before": old["wer"],
        "wer_after": new["wer"],
        "cer_before": old["cer"],
        "cer_after": new["cer"],
        "wer_interval_before": old["ci"],
        "wer_interval_after": new["ci"],
        "utterances": new["utterances"],
        "speakers": new["speakers"],
    }
