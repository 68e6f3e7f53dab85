"""Makes an expert for a new speaker or group: compares the methods by cross-validation on the enrolment, and fits the
selected method on the whole enrolment.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from common import __version__
from common.config import Config
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import Corpus, Utterance
from common.errors import DataError
from common.evaluation.breakdown import score_of
from common.evaluation.score import decode_set, scored_rows
from common.evaluation.wer import paired_bootstrap, wer
from common.inference.choose_experts import model_choice
from common.inference.load_model import OpenedModel
from common.json_files import Row, write_object
from common.model.added_experts import AddedExpert, Method, Terms, append_terms, prepare, remove_last, save_added
from common.model.routing import Choice
from common.pipeline.attempts import counting
from common.pipeline.stage import Context
from common.training.added_experts import (
    ENOUGH_GROUPS,
    Candidates,
    Enrolment,
    Trial,
    fit,
    folds_of,
    losses,
    simplest_good,
    try_ways,
    ways_for,
    ways_to_try,
)
from common.whisper_limits import is_too_long
from stages.extend.choose import make_enrolment
from stages.extend.enrolment import MOST, audible, groups_of, rotation, warn_of_strange_texts
from stages.settings import decoding_options

log = logging.getLogger(__name__)
FOLDS = 2
CURVE = (5, 10, 20, 50, 100, 200)  # utterances
OTHERS = 8  # utterances of others whose logits are compared
DETAILS = "extension.json"


@dataclass(frozen=True)
class Request:
    """Request for an added expert.

    Attributes:
        name, column, value: as in `AddedExpert`.
        method: a method, or `auto` to choose one by cross-validation.
        curve: measure a learning curve too.
        utterances: utterances of the enrolment.
        parent: digest of the model.
        page: receives data for the report that the store does not contain: the held-out texts.
    """

    name: str
    column: str
    value: str
    method: Method | Literal["auto"]
    curve: bool
    utterances: Sequence[Utterance]
    parent: str
    page: dict[str, Any] = field(default_factory=dict)


def run(
    config: Config, context: Context, *, corpus: Corpus, output: Path, opened: OpenedModel, request: Request, **_: Any
) -> None:
    """Writes the added expert and extension.json, which contains only figures, no audio and no text."""
    utterances = audible(corpus, request.utterances)
    work = _Work(config, context, corpus, opened, utterances, groups_of(utterances))
    enrolment = _enrolment(work)
    candidates = Candidates(enrolment)
    unchanged = losses(enrolment, enrolment.all())
    check_texts(work, enrolment, *unchanged)
    method, details = _decide(work, candidates, request, *unchanged)
    terms: Terms = {}
    if method != "none":
        terms = fit(enrolment, method, enrolment.all(), candidates, f"{request.name}: {method}")
    start = candidates.best(enrolment.all()) if method == "neighbour" else None
    info = _describe(request, work, method, terms, start, details)
    save_added(info, terms, output, base_model=opened.info.base if opened.info else str(opened.base))
    if terms:
        details["others"] = others_unchanged(work, terms, request)
    if request.curve and method != "none" and len(details["folds"]) > 1:
        details["curve"] = _curve(work, candidates, method)
    details |= {"method": method, "utterances": len(utterances), "seconds": info.seconds}
    write_object(output / DETAILS, details)
    context.summary |= {"method": method, "utterances": len(utterances)}


@dataclass
class _Work:
    """Objects shared by the steps of one extension."""

    config: Config
    context: Context
    corpus: Corpus
    opened: OpenedModel
    utterances: list[Utterance]
    groups: list[str]


def _enrolment(work: _Work) -> Enrolment:
    opened, context = work.opened, work.context
    prepare(opened.recogniser)
    opened.recogniser.to(opened.accelerator.device)
    enrolment = make_enrolment(
        opened,
        work.corpus,
        work.utterances,
        partial(_own_choice, opened, work.utterances),
        seed=work.config.seed,
        checkpointer=lambda name: context.checkpointer(re.sub(r"\W+", "-", name)),
        stopping=context.stopping,
        quiet=work.config.runtime.quiet,
    )
    enrolment.route_own()
    return enrolment


def _own_choice(opened: OpenedModel, utterances: Sequence[Utterance], evidence_NF: Tensor | None) -> Choice | None:
    """Routing of the utterances by the unchanged model: by table, speaker or gate; None if the model has no routing.

    Args:
        evidence_NF: of the utterances about their groups; None without a gate.
    """
    info, gate = opened.info, opened.recogniser.gate
    if info is None or (gate is None and info.route_by != "table"):
        return None
    return model_choice(opened, utterances, lambda: cast("Tensor", evidence_NF))


@torch.inference_mode()
def check_texts(work: _Work, enrolment: Enrolment, own_N: np.ndarray, tokens_N: np.ndarray) -> None:
    """Logs a warning for texts that do not seem to belong to their audio, according to the model.

    Args:
        own_N, tokens_N: `losses` of the unchanged model.
    """
    if len(work.utterances) < 2:
        return
    other = rotation(work.utterances)
    swapped = [
        replace(example, inputs=enrolment.examples[n].inputs, labels=enrolment.examples[n].labels)
        for example, n in zip(enrolment.examples, other, strict=True)
    ]
    loader = BatchLoader(swapped, num_workers=0, device=work.opened.accelerator.device)
    other_N, other_tokens_N = losses(replace(enrolment, examples=swapped, loader=loader), enrolment.all())
    wrong_N = np.zeros(len(other))
    counts_N = np.maximum(1, np.bincount(other, minlength=len(other)))
    for number, text in enumerate(other):
        wrong_N[text] += other_N[number] / other_tokens_N[number] / counts_N[text]
    judged = [n for n in enrolment.all() if n in set(other) and other[n] != n]
    gains_N = wrong_N - own_N / tokens_N
    warn_of_strange_texts([work.utterances[n] for n in judged], [float(gains_N[n]) for n in judged])


def _decide(
    work: _Work, candidates: Candidates, request: Request, summed_N: np.ndarray, tokens_N: np.ndarray
) -> tuple[Method, dict[str, Any]]:
    """The selected method, and the results of all methods.

    Args:
        summed_N, tokens_N: `losses` of the unchanged model.
    """
    enrolment = candidates.enrolment
    wanted, allowed = request.method, ways_for(enrolment.recogniser)
    if wanted not in (*allowed, "auto"):
        raise DataError(f"--method {wanted}: model {work.opened.name} allows {', '.join(allowed)}")
    folds = folds_of(work.groups, FOLDS)
    details: dict[str, Any] = {"folds": [len(fold) for fold in folds], "ways": {}, "given_up": []}
    if len(folds) < 2:
        log.warning("with one utterance or session nothing can be held out: the gain cannot be estimated")
        return (wanted if wanted != "auto" else "none"), details
    if len(max(folds, key=len)) > MOST * len(work.utterances):
        log.warning(
            "one speaker or session has %d of %d utterances, and is never divided: the expected gain is unreliable",
            *(len(max(folds, key=len)), len(work.utterances)),
        )
    before_N = summed_N / tokens_N
    tried = ways_to_try(allowed, len(work.utterances)) if wanted == "auto" else [wanted]
    trials = try_ways(enrolment, tried, folds, candidates, work.groups)
    details["given_up"] = [way for way in tried if way not in trials]
    details["ways"] = {"none": float(before_N.mean())} | {w: float(t.loss_N.mean()) for w, t in trials.items()}
    method = simplest_good(before_N, trials, work.groups) if wanted == "auto" else wanted
    shown = method if method != "none" else min(trials, key=lambda way: float(trials[way].loss_N.mean()))
    before, after = _held_out_rows(work, enrolment, trials[shown], folds)
    old, new = ([score_of(row) for row in rows] for rows in (before, after))
    ids = [u.id for u in work.utterances]
    units = work.groups if len(set(work.groups)) >= ENOUGH_GROUPS else ids
    difference = paired_bootstrap(old, new, dict(zip(ids, units, strict=True)))
    details |= {"tried": shown, "wer_before": wer(old), "wer_after": wer(new)}
    details["interval"] = [-difference["high"], -difference["low"]]
    request.page["rows"] = before, after
    return method, details


def _held_out_rows(
    work: _Work, enrolment: Enrolment, trial: Trial, folds: Sequence[Sequence[int]]
) -> tuple[list[Row], list[Row]]:
    """Scored rows of each utterance with the unchanged model, and with the expert that was fitted without the
    utterance.
    """
    before = _decode(work, enrolment, enrolment.all(), "decoding as it is")
    after: dict[str, str] = {}
    for number, (terms, fold) in enumerate(zip(trial.terms, folds, strict=True)):
        with enrolment.using(terms):
            after |= _decode(work, enrolment, fold, f"decoding held-out part {number + 1}")
    score = partial(scored_rows, work.utterances, language=work.opened.language)
    published = decoding_options(work.config).published
    return score(before, {}, published=published), score(after, {}, published=published)


def _decode(work: _Work, enrolment: Enrolment, numbers: Sequence[int], name: str) -> dict[str, str]:
    """id → text of some of the utterances, with the current routing of the model."""
    examples = [enrolment.examples[number] for number in numbers]
    loader = BatchLoader(examples, num_workers=0, device=work.opened.accelerator.device)
    activity, hidden = work.context.attempt.activity, work.config.runtime.quiet
    with counting(activity, len(examples), name, unit="utterances", hidden=hidden) as count:
        return decode_set(
            enrolment.recogniser,
            examples,
            loader,
            work.opened.codec,
            decoding_options(work.config),
            work.opened.accelerator,
            count=count,
            stopping=work.context.stopping,
        )


def _curve(work: _Work, candidates: Candidates, method: Method) -> list[dict[str, float]]:
    """Held-out cross-entropy per token for different numbers of training utterances."""
    folds = folds_of(work.groups, FOLDS)
    smallest = len(work.utterances) - max(len(fold) for fold in folds)
    points = []
    for size in (size for size in CURVE if size <= smallest):
        loss_N = try_ways(candidates.enrolment, [method], folds, candidates, work.groups, size)[method].loss_N
        points.append({"utterances": size, "loss": float(loss_N.mean())})
    return points


@torch.inference_mode()
def others_unchanged(work: _Work, terms: Terms, request: Request) -> int:
    """Checks that the losses of some utterances of other speakers are bit-identical without and with the expert, in a
    batch with an utterance of the enrolment.

    Returns:
        The number of compared utterances; 0 if the corpus has no other speakers.

    Raises:
        AssertionError: a loss changed, which no input can cause.
    """
    others = [
        u
        for u in work.corpus.utterances
        if getattr(u, request.column) != request.value and u.text.strip() and not is_too_long(u.duration)
    ][:OTHERS]
    if not others:
        return 0
    opened = work.opened
    mixed = [*others, work.utterances[0]]
    examples = make_examples(work.corpus, mixed, opened.codec, context=opened.context, margin=opened.margin)
    widest = max(example.positions for example in examples)
    examples = [replace(example, positions=widest) for example in examples]  # one batch
    loader = BatchLoader(examples, num_workers=0, device=opened.accelerator.device)
    recogniser, (batch,) = opened.recogniser, loader([list(range(len(mixed)))])
    logits_NE = torch.zeros(len(mixed), recogniser.num_experts) if recogniser.num_experts > 1 else None
    recogniser.choose_by(logits_NE=logits_NE)
    before_B, _ = recogniser.utterance_losses(batch)
    number = append_terms(recogniser, terms)
    recogniser.choose_by(logits_NE=logits_NE, added_N=torch.tensor([-1] * len(others) + [number]))
    after_B, _ = recogniser.utterance_losses(batch)
    remove_last(recogniser)
    assert torch.equal(before_B[:-1], after_B[:-1]), "somebody else's result changed"
    return len(others)


def _describe(
    request: Request, work: _Work, method: Method, terms: Terms, start: int | None, details: Mapping[str, Any]
) -> AddedExpert:
    term = next(iter(terms.values()), None)
    return AddedExpert(
        name=request.name,
        column=request.column,
        value=request.value,
        method=method,
        rank=term.stack.rank if term and term.stack else 0,
        weights=tuple(term.weights.items()) if term else (),
        start=start,
        utterances=len(work.utterances),
        seconds=round(sum(u.duration for u in work.utterances), 2),
        wer_before=details.get("wer_before"),
        wer_after=details.get("wer_after"),
        interval=tuple(details["interval"]) if "interval" in details else None,
        parent=request.parent,
        version=__version__,
    )
