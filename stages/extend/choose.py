"""Choice of weights over existing experts by a few utterances with text, for one command; nothing is stored."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common import __version__
from common.data.audio import audio_info
from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.corpus import INDEX_NAME, Corpus, Utterance, index_digest, read_corpus
from common.errors import DataError, UsageError
from common.evaluation.evaluate import evidence_of
from common.inference.load_model import OpenedModel
from common.inference.recordings import SUFFIXES
from common.model.added_experts import AddedExpert, append_terms
from common.model.mixture import AddedTerm, mixture_layers
from common.model.routing import Choice
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


def make_enrolment(
    opened: OpenedModel,
    corpus: Corpus,
    utterances: Sequence[Utterance],
    choose: Callable[[Tensor | None], Choice | None] = lambda evidence_NF: None,
    **options: Any,
) -> Enrolment:
    """Utterances ready for choosing, fitting and measuring.

    Args:
        choose: their routing by the unchanged model, from evidence_NF about their groups (`Gate.evidence`; None without
            a gate).
        options: further attributes of the enrolment.
    """
    examples = make_examples(corpus, utterances, opened.codec, context=opened.context, margin=opened.margin)
    loader, evidence_NF = BatchLoader(examples, num_workers=0, device=opened.accelerator.device), None
    if opened.recogniser.gate is not None:
        batches = epoch_batches(examples, batch_size=BATCH, shuffle=False)
        evidence_NF = evidence_of(opened, utterances, loader(batches))
    own, log_prob_NE = choose(evidence_NF), gate_log_probs(opened, evidence_NF)
    return Enrolment(opened.recogniser, examples, loader, opened.accelerator, own, log_prob_NE, **options)


def gate_log_probs(opened: OpenedModel, evidence_NF: Tensor | None) -> np.ndarray | None:
    """log_prob_NE: log-probability of each expert's group by the gate, plus log E so that a uniform guess is 0.

    They are 0 for utterances that are unlike all groups. None without a gate.

    Args:
        evidence_NF: of the utterances about their groups.
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
    enrolment = make_enrolment(opened, corpus, utterances)
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
