"""Transcribes audio of any length with times: cuts windows at pauses, routes, decodes and aligns each window.

A file of 30 s or less is one window, transcribed exactly as by `moe-asr evaluate`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.data.audio import SAMPLE_RATE, Samples
from common.data.batches import Batch, Example, collate
from common.data.features import context_positions
from common.data.tokens import IGNORED
from common.decoding.alignment import Word, align, words_of
from common.decoding.decode import Decoded, Decoding
from common.decoding.loops import is_loop, kept_items, key_of, shortened
from common.decoding.pauses import OVERLAP, Stretch, Window, find_pauses, is_silent, loudness, plan_windows
from common.inference.choose_experts import given_choice
from common.inference.load_model import OpenedModel, gate_evidence, stacked, transcribe_batch
from common.model.routing import Choice
from common.text import unspaced
from common.whisper_limits import MAX_SECONDS, is_too_long

SEGMENT_GAP = 0.8  # s between two words: a segment of subtitles ends
SEGMENT_SECONDS = 12.0  # longest segment
SEGMENT_CHARACTERS = 84  # two lines of subtitles
SENTENCE_ENDS = (".", "?", "!", "。", "？", "！")
SHORTEST_WINDOW = 10.0  # s: in less there may be no pause to cut at
UNKNOWN_WINDOW = 15.0  # s, of a trained model that does not say how long its utterances were
TOUCH = 0.02  # s: one position of the encoder


@dataclass(frozen=True, slots=True)
class WindowTranscript:
    """The transcript of one window.

    Attributes:
        words: words in the window's own part of the audio, with times in the whole audio.
        experts, weights: routing of the window; empty without a gate.
        loop: the text is a loop (see `decoding.loops.is_loop`).
    """

    window: Window
    words: tuple[Word, ...]
    decoded: Decoded
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    loop: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A few words that are shown together; all values except text, times and words are those of its window."""

    start: float
    end: float
    text: str
    words: tuple[Word, ...]
    experts: tuple[int, ...]
    weights: tuple[float, ...]
    mean_log_probability: float
    no_speech_probability: float | None = None
    temperature: float = 0.0
    loop: bool = False


@dataclass(frozen=True, slots=True)
class _Piece:
    """One window of one audio, before batching."""

    audio: int
    window: Window
    positions: int
    samples: Samples


def transcribe_audio(
    opened: OpenedModel,
    audios: Sequence[Samples],
    decoding: Decoding,
    progress: Callable[[float], object] = lambda seconds: None,
    *,
    longest: float | None = None,
) -> list[list[WindowTranscript]]:
    """Transcribes each audio, window by window, in order; windows of all audios share batches.

    Args:
        audios: mono samples at 16 kHz.
        progress: called with the seconds of audio processed since the last call.
        longest: maximum seconds of a window; by default 30 s for audio up to 30 s, and `usual_window` for longer audio.

    Returns:
        The windows of each audio; empty for silence.
    """
    pauses, pieces = [], []
    for number, samples in enumerate(audios):
        level_N = loudness(samples)
        pauses.append(find_pauses(level_N))
        seconds = len(samples) / SAMPLE_RATE
        seconds = seconds if is_too_long(seconds) else min(seconds, MAX_SECONDS)
        limit = longest or (MAX_SECONDS if seconds <= MAX_SECONDS else usual_window(opened))
        windows = plan_windows(level_N, pauses[-1], seconds, longest=limit, overlap=min(OVERLAP, limit / 4))
        windows = [] if is_silent(level_N) else windows
        progress(seconds - sum(w.ends - w.begins for w in windows))
        for window in windows:
            part = samples[round(window.start * SAMPLE_RATE) : round(window.end * SAMPLE_RATE)]
            length = context_positions(len(part) / SAMPLE_RATE, context=opened.context, margin=opened.margin)
            pieces.append(_Piece(number, window, length, part))
    transcripts: list[list[WindowTranscript]] = [[] for _ in audios]
    groups = list(_batches(pieces, decoding.batch_size))
    choices = _recording_choices(opened, groups)
    for group in groups:
        choice = stacked([choices[piece.audio] for piece in group]) if choices else None
        for piece, transcript in zip(group, _transcribe_pieces(opened, group, pauses, decoding, choice), strict=True):
            transcripts[piece.audio].append(transcript)
            progress(piece.window.ends - piece.window.begins)
    return [sorted(windows, key=lambda transcript: transcript.window.start) for windows in transcripts]


def usual_window(opened: OpenedModel) -> float:
    """Length of window, in seconds, at which a model is most accurate.

    Whisper was trained on 30 s. A model trained on short utterances is most accurate on short windows, also because its
    gate was trained on short utterances only.
    """
    if opened.info is None:
        return MAX_SECONDS
    return min(MAX_SECONDS, max(SHORTEST_WINDOW, opened.info.seconds or UNKNOWN_WINDOW))


def _batches(pieces: Sequence[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Batches of pieces with equal encoder length, the longest first."""
    buckets: dict[int, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        buckets[piece.positions].append(piece)
    for _, bucket in sorted(buckets.items(), reverse=True):
        yield from (bucket[i : i + size] for i in range(0, len(bucket), size))


def make_batch(opened: OpenedModel, parts: Sequence[tuple[Samples, int]]) -> Batch:
    """A batch without texts, padded like the batches of corpora.

    Args:
        parts: samples and encoder length of each row; the lengths are equal.
    """
    prompt = opened.codec.prompt
    labels = (*[IGNORED] * (len(prompt) - 1), opened.codec.end)
    batch = collate(
        [
            (Example(str(row), Path(), 0.0, len(samples) / SAMPLE_RATE, length, prompt, labels, row), samples)
            for row, (samples, length) in enumerate(parts)
        ]
    )
    assert isinstance(batch, Batch)
    return batch.to(opened.accelerator.device)


def _recording_choices(opened: OpenedModel, groups: Sequence[Sequence[_Piece]]) -> dict[int, Choice]:
    """The choice of experts for each recording: that of the given group, or the gate's by all of its windows, where a
    recording is treated as one speaker. Empty for routing by utterance.
    """
    info = opened.info
    if info is None or info.route_by == "utterance":
        return {}
    if opened.group >= 0:
        choice = given_choice(opened, 1)
        return {piece.audio: choice for group in groups for piece in group}
    evidence: dict[int, list[torch.Tensor]] = defaultdict(list)
    for group in groups:
        evidence_BF = gate_evidence(opened, make_batch(opened, [(piece.samples, piece.positions) for piece in group]))
        if evidence_BF is None:
            return {}
        for piece, evidence_F in zip(group, evidence_BF, strict=True):
            evidence[piece.audio].append(evidence_F)
    gate = opened.recogniser.gate
    assert gate is not None
    return {audio: gate.decide(torch.stack(own).sum(0, keepdim=True)) for audio, own in evidence.items()}


@torch.inference_mode()
def _transcribe_pieces(
    opened: OpenedModel,
    pieces: Sequence[_Piece],
    pauses: Sequence[Sequence[Stretch]],
    decoding: Decoding,
    choice: Choice | None,
) -> Iterator[WindowTranscript]:
    batch = make_batch(opened, [(piece.samples, piece.positions) for piece in pieces])
    transcript = transcribe_batch(opened, batch, decoding, choice)
    texts = [[token for token in result.tokens if token < opened.codec.end] for result in transcript.decoded]
    with opened.accelerator.autocast():
        times = align(opened.recogniser.whisper, transcript.hidden_BTD, batch.valid_B.tolist(), opened.codec, texts)
    for row, piece in enumerate(pieces):
        window = piece.window
        words = words_of(opened.codec, texts[row], times[row] + window.start, opened.language)
        words = snap(words, pauses[piece.audio])
        if window.start < window.begins or window.end > window.ends:  # the rest belongs to the neighbouring window
            words = [word for word in words if window.begins <= word.start < window.ends]
        routing = transcript.routing
        experts, weights = ([], []) if routing is None else (routing[0][row], routing[1][row])
        decoded = transcript.decoded[row]
        loop = is_loop(decoded.text, window.end - window.start, spaced=not unspaced(opened.language))
        yield WindowTranscript(window, tuple(words), decoded, tuple(experts), tuple(weights), loop)


def without_loop(transcript: WindowTranscript, language: str) -> WindowTranscript:
    """The transcript with each looped phrase once; a transcript without loops is unchanged."""
    if not transcript.loop:
        return transcript
    words = [replace(word, text=shortened(word.text)) for word in transcript.words]
    kept = kept_items([key_of(word.text) for word in words], spaced=not unspaced(language))
    return replace(transcript, words=tuple(words[number] for number in kept))


def snap(words: Sequence[Word], pauses: Sequence[Stretch]) -> list[Word]:
    """The words without the pauses at their ends: attention alone often includes silence in a word."""
    starts = np.array([pause.start for pause in pauses])
    snapped = []
    for word in words:
        first = max(0, int(np.searchsorted(starts, word.start)) - 1)
        for pause in pauses[first:]:
            if pause.start >= word.end:
                break
            if pause.end <= word.start:
                continue
            before, after = pause.start - word.start, word.end - pause.end
            if after > max(before, TOUCH):
                word = replace(word, start=pause.end)
            elif before > TOUCH:
                word = replace(word, end=pause.start)
        snapped.append(word)
    return snapped


def join_words(words: Sequence[str], language: str) -> str:
    """A text from its words; in languages without spaces, a word contains the space before it, if there is one."""
    return "".join(words).strip() if unspaced(language) else " ".join(words)


def segments_of(windows: Sequence[WindowTranscript], language: str) -> list[Segment]:
    """Groups words into segments: a segment ends at a pause, at the end of a sentence or window, or when it is long."""
    segments = []
    for window in windows:
        for words in _grouped(window.words):
            segments.append(
                Segment(
                    start=words[0].start,
                    end=max(words[-1].end, words[0].start + TOUCH),
                    text=join_words([word.text for word in words], language),
                    words=tuple(words),
                    experts=window.experts,
                    weights=window.weights,
                    mean_log_probability=window.decoded.mean_log_probability,
                    no_speech_probability=window.decoded.no_speech_probability,
                    temperature=window.decoded.temperature,
                    loop=window.loop,
                )
            )
    return segments


def _grouped(words: Sequence[Word]) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group and (
            word.start - group[-1].end >= SEGMENT_GAP
            or word.end - group[0].start > SEGMENT_SECONDS
            or sum(len(earlier.text) + 1 for earlier in group) + len(word.text) > SEGMENT_CHARACTERS
            or group[-1].text.endswith(SENTENCE_ENDS)
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group
