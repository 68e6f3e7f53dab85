"""Cuts long utterances into pieces of at most 30 s, each with its part of the transcript.

How a transcript is divided:

1. The whole recording is transcribed in windows that are cut at pauses; each word gets a time from cross-attention.
2. Heard words are matched with the transcript's by edit distance. A word that was heard as it is written is an anchor:
   its time is known. So an error of the recogniser stays local, and nothing drifts over the minutes.
3. Around each cut the transcript between two anchors is given to the decoder as it is, and dynamic time warping over
   its cross-attention says which words begin before the cut and which after it.

Aligning the transcript alone, window by window, would need a guess of how much text each window holds, and a wrong
guess would move all that follows.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from common.data.audio import SAMPLE_RATE, Samples
from common.data.corpus import Utterance
from common.data.features import context_positions
from common.decoding.alignment import Word, align
from common.decoding.decode import Decoding
from common.decoding.loops import key_of
from common.decoding.pauses import Stretch, Window, find_pauses, loudness, plan_windows
from common.inference.load_model import OpenedModel, route_batch
from common.inference.transcribe import join_words, make_batch, snap, transcribe_audio
from common.text import unspaced
from common.whisper_limits import MAX_SECONDS, MAX_TOKENS

REACH = 12.0  # s to each side of a cut that are aligned anew, at most
CLEAR = 1.5  # s from a cut: an anchor nearer than that may be on the other side
AROUND = 3  # minimum words between a cut and its nearest anchors
EARLY = 0.1  # s before a pause: attention may move to the next word while the last one ends
ROUNDS = 4  # each halves the pieces, for texts of too many tokens
DECODING = Decoding(batch_size=16, max_new_tokens=224)


@dataclass(frozen=True, slots=True)
class Division:
    """Result of dividing one long utterance.

    Attributes:
        pieces: utterances `<id>-000`, …; empty if it could not be divided.
        unspoken: seconds that are in no piece, because no text belongs to them.
        matched: share of the transcript's words that were recognised as they are written.
        hard_cuts: number of cuts without a pause nearby.
        problem: the reason why it could not be divided.
    """

    pieces: tuple[Utterance, ...]
    unspoken: float = 0.0
    matched: float = 0.0
    hard_cuts: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Recording:
    """A long utterance and the results for its audio."""

    utterance: Utterance
    samples: Samples
    level_N: Samples
    pauses: list[Stretch]
    heard: list[Word]

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def divide(
    opened: OpenedModel,
    utterances: Sequence[Utterance],
    audios: Sequence[Samples],
    progress: Callable[[float], object] = lambda seconds: None,
) -> list[Division]:
    """Divides long utterances, whose windows share batches.

    Args:
        audios: the samples of each utterance, from its offset.
        progress: called with the seconds of audio processed since the last call.
    """
    divisions = []
    for utterance, samples, windows in zip(
        utterances, audios, transcribe_audio(opened, audios, DECODING, progress), strict=True
    ):
        level_N = loudness(samples)
        words = [word for window in windows for word in window.words]
        divisions.append(_divide(opened, _Recording(utterance, samples, level_N, find_pauses(level_N), words)))
    return divisions


def _divide(opened: OpenedModel, recording: _Recording) -> Division:
    utterance = recording.utterance
    texts = [utterance.text, *([utterance.text_alt] if utterance.text_alt else [])]
    words = [split_words(text, opened.language) for text in texts]
    for rounds in range(ROUNDS):
        longest = (MAX_SECONDS if recording.seconds > MAX_SECONDS else recording.seconds / 1.5) / 2**rounds
        windows = plan_windows(recording.level_N, recording.pauses, recording.seconds, longest=longest, overlap=0)
        cuts = [window.ends for window in windows[:-1]]
        parts = [_parts(opened, recording, own, cuts) for own in words]
        if not windows:
            return Division((), problem="no speech in its audio")
        if all(opened.codec.length(text) <= MAX_TOKENS for part in parts for text in part):
            return _division(recording, windows, parts, _matched(words[0], recording.heard))
    return Division((), problem=f"its text has over {MAX_TOKENS} tokens in each {longest:.1f} s")


def _division(
    recording: _Recording, windows: Sequence[Window], parts: Sequence[Sequence[str]], matched: float
) -> Division:
    """Pieces of the windows that contain speech."""
    utterance = recording.utterance
    pieces: list[Utterance] = []
    for number, window in enumerate(windows):
        texts = [part[number] for part in parts]
        if not texts[0]:
            continue
        pieces.append(
            replace(
                utterance,
                id=f"{utterance.id}-{len(pieces):03d}",
                offset=round(utterance.offset + window.start, 4),
                duration=round(min(window.end, recording.seconds) - window.start, 4),
                text=texts[0],
                text_alt=texts[1] if len(texts) > 1 and texts[1] else None,
            )
        )
    if not pieces:
        return Division((), matched=matched, problem="its text is empty")
    spoken = sum(piece.duration for piece in pieces)
    hard = sum(not window.paused for window in windows[:-1])
    return Division(tuple(pieces), recording.seconds - spoken, matched, hard)


def split_words(text: str, language: str) -> list[str]:
    """The words of a transcript as written; in languages without spaces its characters, each with a preceding space if
    any.
    """
    return re.findall(r" ?\S", " ".join(text.split())) if unspaced(language) else text.split()


def _matched(written: Sequence[str], heard: Sequence[Word]) -> float:
    return len(anchors(written, heard)) / max(1, len(written))


def anchors(written: Sequence[str], heard: Sequence[Word]) -> list[tuple[int, Word]]:
    """(number of the written word, recognised word) of words that were recognised as written, in order."""
    blocks = Levenshtein.opcodes([key_of(word) for word in written], [key_of(word.text) for word in heard])
    return [
        (block.src_start + step, heard[block.dest_start + step])
        for block in blocks
        if block.tag == "equal"
        for step in range(block.src_end - block.src_start)
    ]


def _parts(opened: OpenedModel, recording: _Recording, written: Sequence[str], cuts: Sequence[float]) -> list[str]:
    """The text of each piece."""
    starts_U = estimate_starts(written, anchors(written, recording.heard), recording.seconds)
    borders = [0]
    for cut in cuts:
        first, last = _uncertain(written, recording.heard, starts_U, cut)
        border = first + _words_before(opened, recording, written[first:last], starts_U[first:last], cut)
        borders.append(max(border, borders[-1]))
    ends = [*borders[1:], len(written)]
    return [join_words(written[first:last], opened.language) for first, last in zip(borders, ends, strict=True)]


def estimate_starts(written: Sequence[str], known: Sequence[tuple[int, Word]], seconds: float) -> NDArray[np.float64]:
    """Start of each written word: from the recognised word at anchors, interpolated by letters between anchors."""
    letters_U = np.cumsum([0, *(len(word) + 1 for word in written)]).astype(float)
    places = [-1.0, *(letters_U[number] for number, _ in known), letters_U[-1]]
    times = [0.0, *(word.start for _, word in known), seconds]
    return np.maximum.accumulate(np.interp(letters_U[:-1], places, times))


def _uncertain(
    written: Sequence[str], heard: Sequence[Word], starts_U: NDArray[np.float64], cut: float
) -> tuple[int, int]:
    """The words that may be on either side of a cut: those between the two nearest anchors clearly before and
    after it.
    """
    known = anchors(written, heard)
    middle = bisect_left(starts_U.tolist(), cut)
    first = bisect_left(starts_U.tolist(), cut - REACH)
    last = bisect_right(starts_U.tolist(), cut + REACH)
    for number, word in known:
        if word.end < cut - CLEAR and number <= middle - AROUND:
            first = max(first, number)
        if word.start > cut + CLEAR and number >= middle + AROUND:
            last = min(last, number + 1)
    return first, max(first, last)


@torch.inference_mode()
def _words_before(
    opened: OpenedModel, recording: _Recording, words: Sequence[str], starts_U: NDArray[np.float64], cut: float
) -> int:
    """Number of the given words around a cut that begin before it, by the model's attention to the audio around it."""
    if not words:
        return 0
    space = "" if unspaced(opened.language) else " "
    tokens = [opened.codec.tokenizer.encode(space + word, add_special_tokens=False).ids for word in words]
    start = max(0.0, min(float(starts_U[0]), cut - CLEAR) - 0.3)
    end = min(recording.seconds, max(float(starts_U[-1]) + 1.0, cut + CLEAR), start + MAX_SECONDS)
    if sum(len(word_tokens) for word_tokens in tokens) > MAX_TOKENS - 8:  # more text than can be spoken in this time
        return int((starts_U < cut).sum())
    samples = recording.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    length = context_positions(len(samples) / SAMPLE_RATE, context=opened.context, margin=opened.margin)
    batch = make_batch(opened, [(samples, length)])
    route_batch(opened, batch)
    with opened.accelerator.autocast():
        own_rows = replace(batch, row_B=torch.zeros_like(batch.row_B))
        hidden_BTD = opened.recogniser.encode_batch(own_rows)
        flat = [token for word_tokens in tokens for token in word_tokens]
        times_U = align(opened.recogniser.whisper, hidden_BTD, batch.valid_B.tolist(), opened.codec, [flat])[0] + start
    ends = np.cumsum([len(word_tokens) for word_tokens in tokens])
    aligned = [
        Word(word, float(times_U[last - len(own)]), float(times_U[last]))
        for word, own, last in zip(words, tokens, ends.tolist(), strict=True)
    ]
    pause = next((p for p in recording.pauses if p.start <= cut <= p.end), None)
    edge = cut if pause is None else pause.start - EARLY
    return sum(word.start < edge for word in snap(aligned, recording.pauses))
