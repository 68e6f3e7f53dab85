"""Synthetic speech in stand-in etiologies: espeak-ng voices and signal effects, for demos and tests without real data.

`synthesize` makes the demonstration, `synthesize_bench` a harder corpus with more conflict (`demo.voices`).
"""

import io
import math
import multiprocessing
import random
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import soundfile

from common.data.audio import SAMPLE_RATE
from common.data.corpus import Corpus, Utterance, read_corpus, write_index
from common.errors import DataError, UsageError
from common.files import explained, new_folder
from common.progress import counted
from demo import effects as effects
from demo.espeak import require_espeak, speak
from demo.sentences import PATTERNS, SHORT_PATTERNS, Lexicon, build_lexicon, make_sentence, training_lexicon
from demo.voices import BENCH, BENCH_ALIKE, STAND_INS, UNSEEN, Range, StandIn, replace_sounds

PEAK = 0.7  # of full scale, of every utterance
PITCHES = (35, 65)  # of espeak-ng's 0 to 99
TRACTS = (0.9, 1.12)  # length of the vocal tract against that of the voice
NOISE_DB = (-28.0, -18.0)  # loudness of the room against the voice's
SEVERITIES = ("mild", "moderate", "severe")
GOLDEN_RATIO = (5**0.5 - 1) / 2
_PARTS = (("test", 1 / 3), ("dev", 1 / 6), ("train", 1 / 2))  # of an etiology's speakers, in the benchmark
_SHORTEST = 0.7  # seconds of a sentence: how many are drawn for a given time


@dataclass(frozen=True, slots=True)
class _Speaker:
    """One speaker's settings and sentences: pairs of utterance id and text, up to a total duration."""

    name: str
    etiology: str
    voice: StandIn
    severity: str
    split: str
    seed: int
    variant: str
    rate: int
    pitch: int
    word_gap: int
    strength: float
    share: float
    tract: float
    noise_db: float
    sentences: tuple[tuple[str, str], ...]
    seconds: float = math.inf


def synthesize(
    out: str | Path,
    *,
    speakers_per_etiology: int,
    utterances_per_speaker: int,
    seed: int,
    etiologies: Sequence[str] | None = None,
    processes: int = 2,
) -> Corpus:
    """Speak random sentences in stand-in etiologies; the same arguments give the same bytes.

    A fifth of each etiology's speakers, at least one, goes to dev and as many to test. No sentence and no pair of
    neighbouring content words of one split occurs in another (`demo.sentences`).

    Args:
        out: the corpus folder to make, not yet there or empty: `index.jsonl` and 16 kHz FLAC files.
        speakers_per_etiology: at least 3, one for each split.
        utterances_per_speaker: of 2 to 6 seconds each.
        seed: random seed of voices and sentences.
        etiologies: names in `STAND_INS`; None uses all.
        processes: number of speakers that are synthesised at a time.

    Raises:
        UsageError: an unknown etiology, too few speakers or utterances, or `out` exists.
        DataError: espeak-ng or the vocabulary is not installed.
        StoreError: `out` cannot be written.
    """
    chosen = _choose(etiologies, STAND_INS)
    if speakers_per_etiology < 3 or utterances_per_speaker < 1:
        raise UsageError(
            f"{speakers_per_etiology} speakers per etiology with {utterances_per_speaker} utterances each: take at "
            "least 3 speakers (one for each of train, dev and test) with 1 utterance"
        )
    require_espeak()
    held_out = max(1, speakers_per_etiology // 5)
    speakers = []
    for name, number in product(chosen, range(speakers_per_etiology)):
        split = "test" if number < held_out else "dev" if number < 2 * held_out else "train"
        drawn = _draw_speaker(
            name, STAND_INS[name], number, split, seed, utterances_per_speaker, build_lexicon(), PATTERNS
        )
        speakers.append(drawn)
    return _make_corpus(out, speakers, processes)


def synthesize_bench(
    out: str | Path,
    *,
    minutes: float = 30,
    held_out_minutes: float | None = None,
    speakers_per_etiology: int = 12,
    etiologies: Sequence[str] | None = None,
    alike: bool = False,
    seed: int,
    processes: int = 2,
) -> Corpus:
    """Speak the benchmark: hard, open, and in conflict; the same arguments give the same bytes.

    Each group except "typical" replaces sounds by other sounds, by rules that contradict those of the other groups
    (`BENCH`), and speaks fast and with its own voice. One group (`UNSEEN`) occurs only in test. Half of the others'
    speakers go to train, a sixth to dev, a third to test. A fifth of the content words are never in train
    (`sentences.held_out`), and no pair of neighbouring content words is in two splits.

    Args:
        out: the corpus folder to make, not yet there or empty.
        minutes: minimum duration of train (each speaker finishes its sentence).
        held_out_minutes: duration of dev and of test, without the group that occurs only in test; by default a tenth of
            train.
        alike: all groups have the same voices and pace, so that they differ only in their sounds (`BENCH_ALIKE`).
        speakers_per_etiology: at least 6.
        etiologies: groups to include; None includes all. A group's speech does not depend on the others.
        seed: random seed of voices and sentences.
        processes: number of speakers that are synthesised at a time.

    Raises:
        UsageError: an unknown group, too few speakers or minutes, or `out` exists.
        DataError: espeak-ng or the vocabulary is not installed.
        StoreError: `out` cannot be written.
    """
    if speakers_per_etiology < 6 or not 0 < minutes < math.inf:
        raise UsageError(
            f"{speakers_per_etiology} speakers per etiology and {minutes:g} minutes: take at least 6 speakers (three "
            "for train, one for dev, two for test) and more than no minutes"
        )
    groups = BENCH_ALIKE if alike else BENCH
    chosen = _choose(etiologies, groups)
    require_espeak()
    speakers = []
    held_out = minutes / 10 if held_out_minutes is None else held_out_minutes
    for name in chosen:
        splits = [split for split, share in _PARTS for _ in range(round(share * speakers_per_etiology))]
        for number, split in enumerate(splits):
            if name == UNSEEN and split != "test":
                continue
            spoken = minutes if split == "train" else held_out
            seconds = spoken * 60 / (len(BENCH) - 1) / splits.count(split)
            lexicon = training_lexicon() if split == "train" else build_lexicon()
            count = math.ceil(seconds / _SHORTEST)
            drawn = _draw_speaker(name, groups[name], number, split, seed, count, lexicon, SHORT_PATTERNS)
            speakers.append(replace(drawn, seconds=seconds))
    return _make_corpus(out, speakers, processes)


def _choose(etiologies: Sequence[str] | None, voices: Collection[str]) -> list[str]:
    """The named stand-in etiologies once each, or all of them.

    Raises:
        UsageError: one of them does not exist, or none is named.
    """
    chosen = list(dict.fromkeys(voices if etiologies is None else etiologies))
    unknown = [name for name in chosen if name not in voices]
    if unknown or not chosen:
        asked = f"unknown stand-in etiology {unknown[0]!r}" if unknown else "no stand-in etiology given"
        raise UsageError(f"{asked}; choose from {', '.join(voices)}")
    return chosen


def _make_corpus(out: str | Path, speakers: Sequence[_Speaker], processes: int) -> Corpus:
    with explained(Path(out)), new_folder(Path(out)) as folder:
        (folder / "audio").mkdir()
        write_index(folder, _speak_all(speakers, folder, processes))
    return read_corpus(out)


def _draw_speaker(
    etiology: str,
    stand_in: StandIn,
    number: int,
    split: str,
    seed: int,
    utterances: int,
    lexicon: Lexicon,
    patterns: Sequence[str],
) -> _Speaker:
    name = f"{etiology}-{number:03d}"
    rng = random.Random(f"{seed}/{name}")
    # Steps of the golden ratio: any few speakers in a row spread evenly from mild to severe.
    level = (random.Random(f"{seed}/{etiology}").random() + number * GOLDEN_RATIO) % 1
    return _Speaker(
        name=name,
        etiology=etiology,
        voice=stand_in,
        severity="" if etiology == "typical" else SEVERITIES[int(level * len(SEVERITIES))],
        split=split,
        seed=rng.getrandbits(31),
        variant=stand_in.variants[number % len(stand_in.variants)],
        rate=round(_between(stand_in.rate, level)),
        pitch=rng.randint(*PITCHES),
        word_gap=stand_in.word_gap,
        strength=_between(stand_in.strength, level),
        share=_between(stand_in.share, level),
        tract=rng.uniform(*TRACTS),
        noise_db=rng.uniform(*NOISE_DB),
        sentences=tuple((f"{name}-{i:05d}", make_sentence(rng, split, lexicon, patterns)) for i in range(utterances)),
    )


def _between(ends: Range, level: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * level


def _speak_all(speakers: Sequence[_Speaker], folder: Path, processes: int) -> list[Utterance]:
    """Synthesises every speaker in a separate process.

    espeak-ng keeps the phase of its oscillators from one utterance to the next, so that equal bytes require an equal
    history: a new process that speaks one speaker's sentences in order.
    """
    fresh = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    fresh.set_forkserver_preload(["__main__", __name__])  # once for all of them
    try:
        with ProcessPoolExecutor(processes, mp_context=fresh, max_tasks_per_child=1) as pool:
            spoken = pool.map(_speak_speaker, speakers, [folder] * len(speakers))
            bar = counted(spoken, len(speakers), "synth", unit="speakers")
            return [utterance for utterances in bar for utterance in utterances]
    except BrokenProcessPool as error:
        raise DataError("espeak-ng's process died while speaking: install espeakng-loader again") from error


def _speak_speaker(speaker: _Speaker, folder: Path) -> list[Utterance]:
    """Write one speaker's audio below `folder` (runs in a process of its own)."""
    voice = speaker.voice
    rng = np.random.default_rng(speaker.seed)
    utterances: list[Utterance] = []
    for number, (name, text) in enumerate(speaker.sentences):
        if sum(u.duration for u in utterances) >= speaker.seconds:
            break
        samples = speak(
            text,
            variant=speaker.variant,
            rate=speaker.rate,
            pitch=speaker.pitch,
            word_gap=speaker.word_gap,
            tract=speaker.tract,
            seed=speaker.seed + number,
            replace=_sounds_of(speaker, number) if voice.sounds else None,
        )
        if voice.effect is not None:
            samples = voice.effect(samples, rng, speaker.strength)
        samples = effects.add_room(samples, rng, speaker.noise_db)
        encoded = io.BytesIO()
        soundfile.write(encoded, samples * (PEAK / np.abs(samples).max()), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        (folder / "audio" / f"{name}.flac").write_bytes(encoded.getbuffer())
        seconds = round(len(samples) / SAMPLE_RATE, 6)
        utterances.append(
            Utterance(
                name,
                f"audio/{name}.flac",
                seconds,
                text,
                speaker.split,
                speaker=speaker.name,
                etiology=speaker.etiology,
                severity=speaker.severity,
            )
        )
    return utterances


def _sounds_of(speaker: _Speaker, number: int) -> Callable[[str], str]:
    """The replacement of the phonemes of a speaker's sentence."""
    rng = random.Random(f"{speaker.seed}/{number}")
    return lambda spoken: replace_sounds(spoken, speaker.voice.sounds, rng, speaker.share)
