"""What is wrong with a corpus before anything is trained on it."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.data.audio import SAMPLE_RATE, decode
from common.data.corpus import Corpus, Utterance, shared_speakers
from common.data.shards import check_shard
from common.errors import DataError
from common.limits import MAX_SECONDS, MAX_TOKENS, is_too_long
from common.progress import counted
from common.text import odd_forms

DURATION_TOLERANCE = 0.1  # s between what the index says and what the file holds
SILENCE_PEAK = 1e-4  # of full scale: about one step of 14 bits
MAX_CHARACTERS_PER_SECOND = 40  # twice what a fast speaker says
PLACEHOLDERS = frozenset({"nan", "null", "none", "n/a", "<na>"})  # in small letters; some are words, too


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. An error stops or spoils training; a warning is handled, or needs a look."""

    kind: str
    utterance_id: str
    detail: str
    severity: Literal["error", "warning"]


def audit(
    corpus: Corpus, *, token_count: Callable[[str], int] | None = None, threads: int | None = None
) -> list[Finding]:
    """Read every audio file and compare it with the index.

    Args:
        corpus: what to look at.
        token_count: tokens that a text takes in the decoder, special tokens included; None skips that check.
        threads: how many files are decoded at a time; None takes one for each processor.

    Returns:
        Findings, errors first, then by kind and utterance. Kinds of error: `unreadable-audio` (missing, empty or
        damaged), `not-finite`, `silent-audio` (a text without audio), `empty-text`, `too-long` (over 30 s),
        `too-many-tokens`, `duplicate-id`, `duplicate-across-splits`, `shared-speaker`, `bad-shard`. Kinds of
        warning: `resampled`, `mixed-down`, `duration-differs`, `text-too-fast`, `duplicate-audio`, `placeholder-text`;
        and of the corpus as a whole, with its first such utterance, `odd-forms` and `no-speakers`.
    """
    findings = [*_text_findings(corpus.utterances, token_count), *_shared_speakers(corpus.utterances)]
    findings += [*_odd_forms(corpus.utterances), *_no_speakers(corpus.utterances)]
    findings += _bad_shards(corpus)
    by_file: dict[str, list[Utterance]] = defaultdict(list)
    for u in corpus.utterances:
        by_file[u.audio_filepath].append(u)
    by_content: dict[tuple[str, float], list[Utterance]] = defaultdict(list)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        results = pool.map(lambda group: _inspect_file(corpus, group), by_file.values())
        for group, (digest, found) in zip(
            by_file.values(), counted(results, len(by_file), "audit", unit="files"), strict=True
        ):
            findings.extend(found)
            for u in group if digest else ():
                by_content[digest, u.offset].append(u)
    findings.extend(_duplicates(by_content.values()))
    return sorted(findings, key=lambda f: (f.severity, f.kind, f.utterance_id, f.detail))


def _text_findings(utterances: Iterable[Utterance], token_count: Callable[[str], int] | None) -> Iterator[Finding]:
    """What the index alone gives away."""
    seen: set[str] = set()
    for u in utterances:
        if u.id in seen:
            yield Finding("duplicate-id", u.id, "another utterance has this id", "error")
        seen.add(u.id)
        if not u.text.strip():
            yield Finding("empty-text", u.id, "there is nothing to learn from an empty text", "error")
        if is_too_long(u.duration):
            yield Finding("too-long", u.id, f"{u.duration:.2f} s; Whisper hears {MAX_SECONDS:g} s", "error")
        if token_count is not None and (tokens := token_count(u.text)) > MAX_TOKENS:
            yield Finding("too-many-tokens", u.id, f"{tokens} tokens; the decoder takes {MAX_TOKENS}", "error")
        if u.duration > 0 and len(u.text) / u.duration > MAX_CHARACTERS_PER_SECOND:
            yield Finding("text-too-fast", u.id, f"{len(u.text)} characters in {u.duration:.2f} s", "warning")
        if u.text.strip().lower() in PLACEHOLDERS:
            yield Finding("placeholder-text", u.id, f"{u.text!r} may stand for a missing text", "warning")


def _odd_forms(utterances: Iterable[Utterance]) -> Iterator[Finding]:
    """How many texts hold what Whisper writes otherwise: a model would learn to write it so."""
    counts: Counter[str] = Counter()
    first = ""
    for u in utterances:
        if forms := odd_forms(u.text):
            counts.update(forms)
            first = first or u.id
    if counts:
        kinds = "texts with " + ", ".join(f"{form}: {count}" for form, count in counts.most_common())
        yield Finding("odd-forms", first, f"{kinds} (`moe-asr corpus import --mend-text` mends them)", "warning")


def _no_speakers(utterances: Sequence[Utterance]) -> Iterator[Finding]:
    if utterances and not any(u.speaker for u in utterances):
        detail = "no speaker is known: a voice may be in several splits, and rates have no intervals over speakers"
        yield Finding("no-speakers", utterances[0].id, detail, "warning")


def _shared_speakers(utterances: Iterable[Utterance]) -> Iterator[Finding]:
    for speaker, splits in shared_speakers(utterances).items():
        detail = f"speaker {speaker!r} is in {' and '.join(sorted(splits))}: results would flatter the model"
        yield Finding("shared-speaker", splits[min(splits)], detail, "error")


def _bad_shards(corpus: Corpus) -> Iterator[Finding]:
    """Tar shards on this machine that are not what the index says; of remote ones the audio alone is looked at."""
    by_shard: dict[str, list[Utterance]] = defaultdict(list)
    for u in corpus.utterances if corpus.remote is None else ():
        if place := corpus.places.get(u.audio_filepath):
            by_shard[place.shard].append(u)
    for shard, group in by_shard.items():
        try:
            check_shard(corpus.root / shard, [corpus.places[u.audio_filepath] for u in group])
        except DataError as error:
            yield Finding("bad-shard", group[0].id, str(error), "error")


def _inspect_file(corpus: Corpus, utterances: list[Utterance]) -> tuple[str, list[Finding]]:
    """The sha256 of one audio file (empty when it cannot be read), and what is wrong with its utterances."""
    try:
        content = corpus.audio(utterances[0])
    except DataError as error:
        return "", [Finding("unreadable-audio", u.id, str(error), "error") for u in utterances]
    found = [finding for u in utterances for finding in _inspect_stretch(content, u, whole=len(utterances) == 1)]
    return hashlib.sha256(content).hexdigest(), found


def _inspect_stretch(content: bytes, u: Utterance, *, whole: bool) -> Iterator[Finding]:
    """Decode one utterance. `whole`: it has its file to itself, so both must be equally long."""
    whole = whole and u.offset == 0
    try:
        samples_TC, rate = decode(
            content, offset=u.offset, duration=None if whole else u.duration, name=u.audio_filepath
        )
    except DataError as error:
        yield Finding("unreadable-audio", u.id, str(error), "error")
        return
    if samples_TC.size == 0:
        yield Finding("unreadable-audio", u.id, f"{u.audio_filepath} holds no audio after {u.offset:g} s", "error")
        return
    if not np.isfinite(samples_TC).all():
        yield Finding("not-finite", u.id, f"{u.audio_filepath} holds NaN or infinite samples", "error")
    elif np.abs(samples_TC).max() < SILENCE_PEAK:
        yield Finding("silent-audio", u.id, f"{u.audio_filepath} is silent: a text without audio", "error")
    seconds = len(samples_TC) / rate
    if abs(seconds - u.duration) > DURATION_TOLERANCE:
        detail = f"the index says {u.duration:.2f} s, {u.audio_filepath} holds {seconds:.2f} s"
        yield Finding("duration-differs", u.id, detail, "warning")
    if rate != SAMPLE_RATE:
        yield Finding("resampled", u.id, f"{rate} Hz is resampled to {SAMPLE_RATE} Hz while reading", "warning")
    if samples_TC.shape[1] > 1:
        yield Finding("mixed-down", u.id, f"{samples_TC.shape[1]} channels are averaged while reading", "warning")


def _duplicates(groups: Iterable[list[Utterance]]) -> Iterator[Finding]:
    for group in groups:
        for u in group[1:]:
            first = group[0]
            if u.split == first.split:
                yield Finding("duplicate-audio", u.id, f"the same audio as {first.id!r}", "warning")
            else:
                detail = f"the same audio as {first.id!r}, which is in {first.split!r}: results would flatter the model"
                yield Finding("duplicate-across-splits", u.id, detail, "error")
