"""Choice of weights over existing experts by a few utterances with text, for one command; nothing is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from common import __version__
from common.data.audio import audio_info
from common.data.batches import BatchLoader, Example, epoch_batches, make_examples
from common.data.corpus import INDEX_NAME, Corpus, Utterance, index_digest, read_corpus
from common.errors import DataError, UsageError
from common.evaluation.evaluate import evidence_of
from common.inference.load_model import OpenedModel
from common.inference.recordings import SUFFIXES
from common.model.added_experts import AddedExpert, append_terms
from common.model.mixture import AddedTerm, mixture_layers
from common.training.added_experts import BATCH, Candidates, Enrolment
from stages.extend.enrolment import audible


def read_enrolment(folder: Path) -> Corpus:
    """Reads a corpus, or a folder of recordings with text files of the same names: `take.wav` and `take.txt`.

    Raises:
        DataError: the folder is neither, or a text is missing.
    """
    if (folder / INDEX_NAME).is_file():
        return read_corpus(folder)
    if not folder.is_dir():
        raise DataError(f"--enrol {folder} is not a folder")
    recordings = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not recordings:
        raise DataError(f"--enrol {folder} contains neither {INDEX_NAME} nor recordings with a .txt beside each")
    utterances = tuple(_utterance(path) for path in recordings)
    return Corpus(folder.resolve(), utterances, index_digest(utterances))


def _utterance(path: Path) -> Utterance:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise DataError(f"{path} has no {text.name} beside it with what was said: write it, or remove the recording")
    try:
        said = text.read_text(encoding="utf-8-sig").strip()  # Windows' editors put a mark before it
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return Utterance(path.name, path.name, audio_info(path).duration, said)


def enrolment_evidence(
    opened: OpenedModel, utterances: Sequence[Utterance], examples: Sequence[Example], loader: BatchLoader
) -> Tensor | None:
    """evidence_NF of the utterances about their groups (`Gate.evidence`); None without a gate."""
    if opened.recogniser.gate is None:
        return None
    return evidence_of(opened, utterances, loader(epoch_batches(examples, batch_size=BATCH, shuffle=False)))


def gate_log_probs(opened: OpenedModel, evidence_NF: Tensor | None) -> np.ndarray | None:
    """log_prob_NE: log-probability of each expert's group by the gate, plus log E so that a uniform guess is 0.

    They are 0 for utterances that are unlike all groups. None without a gate.

    Args:
        evidence_NF: of the utterances (`enrolment_evidence`).
    """
    gate = opened.recogniser.gate
    if gate is None or evidence_NF is None:
        return None
    log_probs_NE, known_N = gate.decide(evidence_NF)
    log_prob_NE: np.ndarray = ((log_probs_NE + math.log(gate.num_experts)) * known_N[:, None]).cpu().numpy()
    return log_prob_NE


def chosen_by(opened: OpenedModel, folder: Path) -> OpenedModel:
    """The model with weights over its experts for all audio, chosen by texts and audio of a folder.

    Raises:
        UsageError: the model has no experts to choose from.
        DataError: the folder contains no speech with text.
    """
    if opened.recogniser.num_experts < 2:
        raise UsageError(f"--enrol: model {opened.name} has no experts to choose from; `moe-asr extend` adds one")
    corpus = read_enrolment(folder)
    utterances = audible(corpus, corpus.utterances)
    examples = make_examples(corpus, utterances, opened.codec, context=opened.context, margin=opened.margin)
    loader = BatchLoader(examples, num_workers=0, device=opened.accelerator.device)
    log_prob_NE = gate_log_probs(opened, enrolment_evidence(opened, utterances, examples, loader))
    enrolment = Enrolment(opened.recogniser, examples, loader, opened.accelerator, None, log_prob_NE)
    weights = Candidates(enrolment).weights(enrolment.all())
    terms = {name: AddedTerm(weights=weights) for name, _ in mixture_layers(opened.recogniser.whisper)}
    number = append_terms(opened.recogniser, terms)
    info = AddedExpert(
        name="enrolled",
        column="speaker",
        value="",
        method="choose",
        rank=0,
        weights=tuple(weights.items()),
        start=None,
        utterances=len(utterances),
        seconds=sum(u.duration for u in utterances),
        wer_before=None,
        wer_after=None,
        interval=None,
        parent="",
        version=__version__,
    )
    return replace(opened, added=(*opened.added, info), voice=number)
