"""A model's error rates on a split of a corpus: routes, decodes and scores every utterance, and writes the files."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace

import torch

from common import __version__
from common.data.audio import read_utterance
from common.data.batches import Batch, BatchLoader, epoch_batches, make_examples
from common.data.corpus import Corpus, Utterance
from common.data.subsets import TEST_SEED, stratified_subset
from common.decoding.decode import Decoding
from common.errors import DataError
from common.evaluation.breakdown import Routing, loops
from common.evaluation.score import decode_batches, rates_of, scored_rows
from common.inference.added_experts import added_number
from common.inference.choose_experts import group_number, model_choice, warn_without_group
from common.inference.load_model import OpenedModel, gate_evidence, stacked, transcribe_batch
from common.inference.transcribe import join_words, transcribe_audio
from common.json_files import Row
from common.model.routing import Choice
from common.progress import progress
from common.whisper_limits import MAX_SECONDS, is_too_long

RESULT, ROWS, TABLE, PAGE = "evaluation.json", "predictions.jsonl", "utterances.csv", "report.html"


def choose_utterances(
    corpus: Corpus, split: str, *, long_audio: str = "error", samples: int | None = None
) -> list[Utterance]:
    """The utterances of a split; with `samples` a stratified part, for test the same as in the asr stage.

    Raises:
        DataError: the split has no utterances.
    """
    utterances = list(corpus.utterances) if split == "all" else corpus.split(split)
    if not utterances:
        names = ", ".join(sorted({u.split for u in corpus.utterances}))
        raise DataError(f"corpus {corpus.url} has no utterances in split {split!r}: it has {names}")
    if long_audio == "drop":
        utterances = [u for u in utterances if not is_too_long(u.duration)]
    if not utterances:
        raise DataError(f"all utterances of split {split!r} last over {MAX_SECONDS:.0f} s")
    return stratified_subset(utterances, count=min(samples or len(utterances), len(utterances)), seed=TEST_SEED)


def decode_corpus(
    opened: OpenedModel,
    corpus: Corpus,
    utterances: Sequence[Utterance],
    decoding: Decoding,
    *,
    windows: bool = False,
    num_workers: int = 0,
    quiet: bool = True,
) -> list[Row]:
    """One row for each utterance (`breakdown.scored_row`), in their order.

    Args:
        windows: transcribe utterances over 30 s in windows, as `moe-asr transcribe` does.

    Raises:
        DataError: audio cannot be read, lasts over 30 s, or has no reference text.
    """
    long = [u for u in utterances if windows and is_too_long(u.duration)]
    apart = {u.id for u in long}
    short = [u for u in utterances if u.id not in apart]
    examples = make_examples(corpus, short, opened.codec, context=opened.context, margin=opened.margin)
    loader = BatchLoader(examples, num_workers=num_workers, device=opened.accelerator.device)
    size = decoding.batch_size
    batches = epoch_batches(examples, batch_size=size, shuffle=False)
    choices = fixed_choices(opened, short, lambda: evidence_of(opened, short, loader(batches)))

    asked_for = opened.voice >= 0 or opened.group >= 0
    added = {u.id: opened.voice if asked_for else added_number(opened.added, u) for u in utterances}

    def transcribe(batch: Batch) -> Iterable[tuple[str, Routing]]:
        choice = stacked([choices[name] for name in batch.ids]) if choices else None
        transcript = transcribe_batch(opened, batch, decoding, choice, [added[name] for name in batch.ids])
        routing = zip(*transcript.routing, strict=True) if transcript.routing else [((), ())] * len(batch)
        return [(result.text, chosen) for result, chosen in zip(transcript.decoded, routing, strict=True)]

    with closing(progress(len(utterances), "evaluate", unit="utterances", hidden=quiet)) as bar:
        decoded = decode_batches(examples, loader, transcribe, opened.accelerator, batch_size=size, count=bar.update)
        for u in long:
            group = opened.group if opened.group >= 0 else group_number(opened.info, u)
            own = replace(opened, voice=added[u.id], group=group)
            decoded[u.id] = _transcribed_in_windows(own, corpus, u, decoding), ((), ())
            bar.update()
    texts = {name: text for name, (text, _) in decoded.items()}
    routing = {name: chosen for name, (_, chosen) in decoded.items()}
    return scored_rows(utterances, texts, routing, opened.language, published=decoding.published)


def _transcribed_in_windows(opened: OpenedModel, corpus: Corpus, u: Utterance, decoding: Decoding) -> str:
    windows = transcribe_audio(opened, [read_utterance(corpus, u)], decoding)[0]
    return join_words([word.text for window in windows for word in window.words], opened.language)


def fixed_choices(
    opened: OpenedModel, utterances: Sequence[Utterance], evidence: Callable[[], torch.Tensor]
) -> dict[str, Choice]:
    """id → choice of experts, if the choice depends on the speaker or on a table instead of the utterance alone.

    Args:
        evidence: gives `evidence_of` the utterances; called only if the gate decides.
    """
    info = opened.info
    if info is None or info.route_by == "utterance" or not utterances:
        return {}
    if all(group_number(info, u) < 0 for u in utterances):
        warn_without_group(opened)
    logits_NE, known_N = model_choice(opened, utterances, evidence)
    return {u.id: (logits_NE[i : i + 1], known_N[i : i + 1]) for i, u in enumerate(utterances)}


def evidence_of(opened: OpenedModel, utterances: Sequence[Utterance], batches: Iterable[Batch]) -> torch.Tensor:
    """evidence_NF of utterances about their groups, by a model with a gate (`Gate.evidence`).

    Args:
        batches: contain all these utterances, in any order.
    """
    evidence: dict[str, torch.Tensor] = {}
    for batch in batches:
        evidence_BF = gate_evidence(opened, batch)
        assert evidence_BF is not None
        evidence |= zip(batch.ids, evidence_BF, strict=True)
    return torch.stack([evidence[u.id] for u in utterances])


def describe_evaluation(
    opened: OpenedModel,
    corpus: Corpus,
    rows: Sequence[Row],
    decoding: Decoding,
    *,
    split: str,
    left_out: int,
    seconds: float,
) -> Row:
    """The object of evaluation.json: what was evaluated and how, and the rates (`breakdown.breakdown`).

    Args:
        left_out: number of utterances over 30 s in the whole split, which were dropped.
        seconds: duration of decoding.
    """
    info, audio = opened.info, sum(row["duration"] for row in rows)
    return {
        "schema": 1,
        "version": __version__,
        "made": time.time(),
        "model": opened.name,
        "base": str(opened.base),
        "mixture": {"experts": info.num_experts, "top_k": info.top_k, "kind": info.mixture} if info else None,
        "corpus": corpus.url,
        "corpus_digest": corpus.digest,
        "split": split,
        "left_out": left_out,
        "language": opened.language,
        "prompt": list(opened.codec.prompt),
        "context": opened.context,
        "margin": opened.margin,
        "precision": str(opened.accelerator.mixed_precision),
        "device": opened.accelerator.device.type,
        "decoding": asdict(decoding),
        "seconds": seconds,
        "audio_seconds": audio,
        "load": expert_load(rows, info.num_experts) if info and info.num_experts > 1 else None,
        "loops": [{key: row[key] for key in ("id", "speaker", "words", "insertions")} for row in loops(rows)],
        **rates_of(rows),
    }


def expert_load(rows: Sequence[Row], experts: int) -> list[float]:
    """Share of the routing weight that each expert got."""
    load = [0.0] * experts
    for row in rows:
        for expert, weight in zip(row["experts"], row["weights"], strict=True):
            load[expert] += weight
    total = sum(load) or 1.0
    return [amount / total for amount in load]
