"""Checks a corpus for problems before training."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.data.audio import OVERSHOOT, SAMPLE_RATE, Levels, check_levels, measure_audio
from common.data.corpus import Corpus, Utterance, shared_speakers
from common.data.decoders import check_regular
from common.data.headers import header_fault
from common.data.shards import check_shard
from common.errors import DataError
from common.files import MAX_FILE, file_hash
from common.progress import counted
from common.text import MAX_CHARACTERS_PER_SECOND, odd_forms
from common.whisper_limits import MAX_SECONDS, MAX_TOKENS, is_too_long

DURATION_TOLERANCE = 0.1  # s between the index's duration and the file's
SILENCE_PEAK = 1e-4  # of full scale: about one step of 14 bits
PLACEHOLDERS = frozenset({"nan", "null", "none", "n/a", "<na>"})  # in small letters; some are words, too


Severity = Literal["error", "warning"]
ERROR: Severity = "error"
WARNING: Severity = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a corpus. An error prevents or degrades training; a warning is handled automatically or should be
    checked.
    """

    kind: str
    utterance_id: str
    detail: str
    severity: Severity


def audit(corpus: Corpus, *, token_count: Callable[[str], int] | None = None) -> list[Finding]:
    """Read every audio file and compare it with the index.

    Args:
        corpus: the corpus to check.
        token_count: number of tokens of a text in the decoder, including special tokens; None skips this check.

    Returns:
        Findings, errors first, then by kind and utterance. Kinds of error: `unreadable-audio` (missing, empty, no
        file, or damaged), `not-finite`, `silent-audio` (a text without audio), `past-the-end` (the index wants more
        than the file holds), `cut-short` (the file's own header promises more), `empty-text`, `too-long` (over 30 s),
        `too-many-tokens`, `duplicate-id`, `duplicate-across-splits`, `shared-speaker`, `bad-shard`. Kinds of
        warning: `damaged-audio` (a moment that is read as silence), `unended-audio` (an Ogg file without its last
        page), `out-of-range`, `opposite-phase`, `resampled`, `mixed-down`, `duration-differs`, `text-too-fast`,
        `duplicate-audio`, `placeholder-text`; and of the corpus as a whole, with its first such utterance, `odd-forms`
        and `no-speakers`.
    """
    findings = [*_text_findings(corpus.utterances, token_count), *_shared_speakers(corpus.utterances)]
    findings += [*_odd_forms(corpus.utterances), *_no_speakers(corpus.utterances)]
    findings += _bad_shards(corpus)
    by_file: dict[str, list[Utterance]] = defaultdict(list)
    for u in corpus.utterances:
        by_file[u.audio_filepath].append(u)
    by_content: dict[tuple[str, float], list[Utterance]] = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda group: _inspect_file(corpus, group), by_file.values())
        for group, (digest, file_findings) in zip(
            by_file.values(), counted(results, len(by_file), "audit", unit="files"), strict=True
        ):
            findings.extend(file_findings)
            for u in group if digest else ():
                by_content[digest, u.offset].append(u)
    findings.extend(_duplicates(by_content.values()))
    return sorted(findings, key=lambda f: (f.severity, f.kind, f.utterance_id, f.detail))


def _text_findings(utterances: Iterable[Utterance], token_count: Callable[[str], int] | None) -> Iterator[Finding]:
    """Problems that can be found from the index without reading audio."""
    seen: set[str] = set()
    for u in utterances:
        if u.id in seen:
            yield Finding("duplicate-id", u.id, "another utterance has this id", "error")
        seen.add(u.id)
        if not u.text.strip():
            yield Finding("empty-text", u.id, "there is nothing to learn from an empty text", "error")
        if is_too_long(u.duration):
            yield Finding("too-long", u.id, f"{u.duration:,.6g} s; Whisper processes {MAX_SECONDS:g} s", "error")
        if token_count is not None and (tokens := token_count(u.text)) > MAX_TOKENS:
            yield Finding("too-many-tokens", u.id, f"{tokens} tokens; the decoder takes {MAX_TOKENS}", "error")
        if u.duration > 0 and len(u.text) / u.duration > MAX_CHARACTERS_PER_SECOND:
            yield Finding("text-too-fast", u.id, f"{len(u.text)} characters in {u.duration:.2f} s", "warning")
        if u.text.strip().lower() in PLACEHOLDERS:
            yield Finding("placeholder-text", u.id, f"{u.text!r} may stand for a missing text", "warning")


def _odd_forms(utterances: Iterable[Utterance]) -> Iterator[Finding]:
    """Number of texts with characters that Whisper writes differently, which a model would learn to write."""
    counts: Counter[str] = Counter()
    first = ""
    for u in utterances:
        if forms := odd_forms(u.text):
            counts.update(forms)
            first = first or u.id
    if counts:
        kinds = "texts with " + ", ".join(f"{form}: {count}" for form, count in counts.most_common())
        yield Finding(
            "odd-forms", first, f"{kinds} (`moe-asr corpus import --normalise-characters` converts them)", "warning"
        )


def _no_speakers(utterances: Sequence[Utterance]) -> Iterator[Finding]:
    if utterances and not any(u.speaker for u in utterances):
        detail = "no speaker is known: a voice may be in several splits, and rates have no intervals over speakers"
        yield Finding("no-speakers", utterances[0].id, detail, "warning")


def _shared_speakers(utterances: Iterable[Utterance]) -> Iterator[Finding]:
    for speaker, splits in shared_speakers(utterances).items():
        detail = f"speaker {speaker!r} is in {' and '.join(sorted(splits))}: error rates would be too optimistic"
        yield Finding("shared-speaker", splits[min(splits)], detail, "error")


def _bad_shards(corpus: Corpus) -> Iterator[Finding]:
    """Tar shards on this machine that differ from the index; of remote shards only the audio is checked."""
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
    """The sha256 of one audio file (empty when it cannot be read), and the problems of its utterances."""
    try:
        source, digest = _source(corpus, utterances[0])
    except DataError as error:
        return "", [Finding("unreadable-audio", u.id, str(error), "error") for u in utterances]
    whole = len(utterances) == 1 and utterances[0].offset == 0
    return digest, [finding for u in utterances for finding in _inspect_stretch(source, u, whole=whole)]


def _source(corpus: Corpus, utterance: Utterance) -> tuple[bytes | Path, str]:
    """An audio file and its sha256: the bytes of one in a shard or store, the path of any other.

    Raises:
        DataError: it does not exist, is not a file, or is damaged.
    """
    if (clip := corpus.clip(utterance)) is not None:
        content = clip.read()
        return content, hashlib.sha256(content).hexdigest()
    path = corpus.path(utterance)
    if (size := check_regular(path, utterance.audio_filepath)) > MAX_FILE:
        raise DataError(f"{utterance.audio_filepath} has {size:,} bytes, over {MAX_FILE:,}: cut it into utterances")
    return path, file_hash(path)


def _inspect_stretch(source: bytes | Path, u: Utterance, *, whole: bool) -> Iterator[Finding]:
    """Decode one utterance as training does. `whole`: no other utterance uses the file, so both must have the same
    length.
    """
    name = u.audio_filepath
    try:
        levels = measure_audio(source, offset=u.offset, duration=None if whole else u.duration, name=name)
        if not levels.finite:
            yield Finding("not-finite", u.id, f"{name} contains NaN or infinite samples", "error")
            return
        check_levels(levels, name, u.offset)
    except DataError as error:
        yield Finding("unreadable-audio", u.id, str(error), "error")
        return
    yield from _length_findings(source, levels, u, whole=whole)
    yield from _sound_findings(levels, u)


def _length_findings(source: bytes | Path, levels: Levels, u: Utterance, *, whole: bool) -> Iterator[Finding]:
    """Compares the length of an utterance with the index and with the header of its file."""
    missing = u.duration - levels.seconds
    if abs(missing) > DURATION_TOLERANCE:
        start = f" from {u.offset:g} s on" if u.offset else ""
        detail = f"the index says {u.duration:.6g} s{start}, {u.audio_filepath} holds {levels.seconds:.2f} s"
        kind, severity = ("past-the-end", ERROR) if missing > 0 else ("duration-differs", WARNING)
        yield Finding(kind, u.id, detail, severity)
    if whole and (fault := header_fault(source, u.audio_filepath, levels.seconds)):
        kind, severity = ("cut-short", ERROR) if fault.certain else ("unended-audio", WARNING)
        yield Finding(kind, u.id, f"{u.audio_filepath}: {fault.detail}", severity)


def _sound_findings(levels: Levels, u: Utterance) -> Iterator[Finding]:
    """Problems of the samples that the encoder receives, and of their conversion from the file's samples."""
    name, damage = u.audio_filepath, levels.damage
    loudest = min(levels.amplitude, levels.amplitude / levels.peak if levels.peak > OVERSHOOT else 1.0)
    if loudest < SILENCE_PEAK:
        yield Finding("silent-audio", u.id, f"{name} is silent: a text without audio", "error")
    if damage.seconds:
        detail = f"{damage.seconds:.2f} s from {damage.first:.2f} s on cannot be decoded, and are read as silence"
        yield Finding("damaged-audio", u.id, f"{name}: {detail}", "warning")
    if levels.peak > OVERSHOOT:
        yield Finding("out-of-range", u.id, f"{name} peaks at {levels.peak:.4g}, and is scaled to 1", "warning")
    if levels.channel is not None:
        detail = f"the channels of {name} cancel each other; the loudest alone is read"
        yield Finding("opposite-phase", u.id, detail, "warning")
    elif levels.channels > 1:
        yield Finding("mixed-down", u.id, f"{levels.channels} channels are averaged while reading", "warning")
    if levels.rate != SAMPLE_RATE:
        yield Finding("resampled", u.id, f"{levels.rate} Hz is resampled to {SAMPLE_RATE} Hz while reading", "warning")


def _duplicates(groups: Iterable[list[Utterance]]) -> Iterator[Finding]:
    for group in groups:
        for u in group[1:]:
            first = group[0]
            if u.split == first.split:
                yield Finding("duplicate-audio", u.id, f"the same audio as {first.id!r}", "warning")
            else:
                detail = (
                    f"the same audio as {first.id!r}, which is in {first.split!r}: error rates would be too optimistic"
                )
                yield Finding("duplicate-across-splits", u.id, detail, "error")
