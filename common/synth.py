"""Synthetic speech in stand-in etiologies: espeak-ng voices and signal effects, for demos and tests without real data.

The names say how the speech sounds and stand for no diagnosis. Each was chosen by measurement: Whisper tiny.en gets it
clearly more wrong than plain speech (`moe-asr corpus stats` shows by how much).
"""

import ctypes
import io
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from tqdm import tqdm

from common import synth_effects as effects
from common.audio import SAMPLE_RATE, Samples
from common.corpus import Corpus, Utterance, new_corpus_folder, read_corpus, write_index
from common.errors import DataError, UsageError
from common.synth_sentences import build_lexicon, make_sentence

ESPEAK_RATE = 22050  # Hz, of all of espeak-ng's voices
PEAK = 0.7  # of full scale, of every utterance
PITCHES = (35, 65)  # of espeak-ng's 0 to 99
TRACTS = (0.9, 1.12)  # length of the vocal tract against that of the voice
NOISE_DB = (-28.0, -18.0)  # loudness of the room against the voice's
SEVERITIES = ("mild", "moderate", "severe")
GOLDEN_RATIO = (5**0.5 - 1) / 2

# Numbers of espeak-ng's C interface (speak_lib.h).
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT_ON_ERROR = 0x8000
_CHARS_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE, _WORD_GAP = 1, 3, 4, 7

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_callbacks: list[Any] = []  # kept alive here: the library calls them as long as it lives

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class StandIn:
    """How the speakers of one stand-in etiology sound, from the mildest to the most severe.

    Args:
        variants: espeak-ng voice variants of en-us; the speakers take turns.
        rate: words per minute.
        word_gap: pause between words, in espeak-ng's units of about 10 ms.
        effect: what is done to the signal, and how strongly.
    """

    variants: tuple[str, ...]
    rate: Range
    word_gap: int = 1
    effect: Callable[[Samples, np.random.Generator, float], Samples] | None = None
    strength: Range = (0, 0)


_PLAIN = ("m3", "m1", "m7", "Mike")
STAND_INS = {
    "typical": StandIn(_PLAIN, rate=(140, 160)),
    "breathy": StandIn(_PLAIN, rate=(145, 155), effect=effects.add_breath, strength=(0.5, 1.4)),
    "halting": StandIn(_PLAIN, rate=(150, 160), effect=effects.repeat_syllables, strength=(1.2, 0.6)),
    "muffled": StandIn(_PLAIN, rate=(145, 155), effect=effects.muffle, strength=(1500, 700)),
    "rushed": StandIn(_PLAIN, rate=(230, 330), word_gap=0),
    "slurred": StandIn(_PLAIN, rate=(130, 150), effect=effects.smear, strength=(0.1, 0.2)),
    "tremulous": StandIn(_PLAIN, rate=(145, 160), effect=effects.add_tremor, strength=(0.8, 1.2)),
    "whispered": StandIn(("whisper", "whisperf"), rate=(160, 240), word_gap=0),
}


@dataclass(frozen=True, slots=True)
class _Speaker:
    """One speaker's own values, and what it says: pairs of utterance id and text."""

    name: str
    etiology: str
    severity: str
    split: str
    seed: int
    variant: str
    rate: int
    pitch: int
    word_gap: int
    strength: float
    tract: float
    noise_db: float
    sentences: tuple[tuple[str, str], ...]


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
    neighbouring content words of one split occurs in another (`common.synth_sentences`).

    Args:
        out: the corpus folder to make, not yet there or empty: `index.jsonl` and 16 kHz FLAC files.
        speakers_per_etiology: at least 3, one for each split.
        utterances_per_speaker: of 2 to 6 seconds each.
        seed: of voices and sentences.
        etiologies: names in `STAND_INS`; None takes all.
        processes: how many speak at a time.

    Raises:
        UsageError: an unknown etiology, too few speakers or utterances, or `out` exists.
        DataError: espeak-ng or the vocabulary is not installed.
        StoreError: `out` cannot be written.
    """
    chosen = list(dict.fromkeys(STAND_INS if etiologies is None else etiologies))
    unknown = [name for name in chosen if name not in STAND_INS]
    if unknown or not chosen:
        asked = f"no stand-in etiology {unknown[0]!r}" if unknown else "no stand-in etiology chosen"
        raise UsageError(f"{asked}: there are {', '.join(STAND_INS)}")
    if speakers_per_etiology < 3 or utterances_per_speaker < 1:
        raise UsageError(
            f"{speakers_per_etiology} speakers per etiology with {utterances_per_speaker} utterances each: take at "
            "least 3 speakers (one for each of train, dev and test) with 1 utterance"
        )
    _require_espeak()
    speakers = [
        _draw_speaker(name, number, speakers_per_etiology, utterances_per_speaker, seed)
        for name in chosen
        for number in range(speakers_per_etiology)
    ]
    with new_corpus_folder(Path(out)) as folder:
        (folder / "audio").mkdir()
        write_index(folder, _speak_all(speakers, folder, processes))
    return read_corpus(out)


def _draw_speaker(etiology: str, number: int, speakers: int, utterances: int, seed: int) -> _Speaker:
    stand_in, name = STAND_INS[etiology], f"{etiology}-{number:03d}"
    held_out = max(1, speakers // 5)
    split = "test" if number < held_out else "dev" if number < 2 * held_out else "train"
    rng = random.Random(f"{seed}/{name}")
    lexicon = build_lexicon()
    # Steps of the golden ratio: any few speakers in a row spread evenly from mild to severe.
    level = (random.Random(f"{seed}/{etiology}").random() + number * GOLDEN_RATIO) % 1
    return _Speaker(
        name=name,
        etiology=etiology,
        severity="" if etiology == "typical" else SEVERITIES[int(level * len(SEVERITIES))],
        split=split,
        seed=rng.getrandbits(31),
        variant=stand_in.variants[number % len(stand_in.variants)],
        rate=round(_between(stand_in.rate, level)),
        pitch=rng.randint(*PITCHES),
        word_gap=stand_in.word_gap,
        strength=_between(stand_in.strength, level),
        tract=rng.uniform(*TRACTS),
        noise_db=rng.uniform(*NOISE_DB),
        sentences=tuple((f"{name}-{i:05d}", make_sentence(rng, split, lexicon)) for i in range(utterances)),
    )


def _between(ends: Range, level: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * level


def _speak_all(speakers: Sequence[_Speaker], folder: Path, processes: int) -> list[Utterance]:
    """Every speaker in a process of its own.

    espeak-ng keeps the phase of its oscillators from one utterance to the next, so that equal bytes need an equal
    history: that of a fresh process which speaks one speaker's sentences in order.
    """
    fresh = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    fresh.set_forkserver_preload(["__main__", __name__])  # once for all of them
    try:
        with ProcessPoolExecutor(processes, mp_context=fresh, max_tasks_per_child=1) as pool:
            spoken = pool.map(_speak_speaker, speakers, [folder] * len(speakers))
            bar = tqdm(spoken, "synth", total=len(speakers), unit="speaker", disable=None)
            return [utterance for utterances in bar for utterance in utterances]
    except BrokenProcessPool as error:
        raise DataError("espeak-ng's process died while speaking: install espeakng-loader again") from error


def _speak_speaker(speaker: _Speaker, folder: Path) -> list[Utterance]:
    """Write one speaker's audio below `folder` (runs in a process of its own)."""
    effect = STAND_INS[speaker.etiology].effect
    rng = np.random.default_rng(speaker.seed)
    utterances = []
    for number, (name, text) in enumerate(speaker.sentences):
        samples = speak(
            text,
            variant=speaker.variant,
            rate=speaker.rate,
            pitch=speaker.pitch,
            word_gap=speaker.word_gap,
            tract=speaker.tract,
            seed=speaker.seed + number,
        )
        if effect is not None:
            samples = effect(samples, rng, speaker.strength)
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


def speak(text: str, *, variant: str, rate: int, pitch: int, word_gap: int, seed: int, tract: float = 1.0) -> Samples:
    """Say a text with one of espeak-ng's American voices.

    Args:
        variant: of the voice, as in `espeak-ng --voices=variant`; empty for the plain voice.
        rate: words per minute, 80 to 450.
        pitch: 0 to 99.
        word_gap: pause between words, in units of about 10 ms.
        seed: of the voice's noise.
        tract: length of the vocal tract against that of the voice; a longer one has lower formants.

    Returns:
        samples (T,) at 16 kHz, in [-1, 1].

    Raises:
        DataError: espeak-ng is not installed, or has no such voice.
    """
    library, blocks = _load_espeak()
    # espeak-ng itself takes an unknown variant for the plain voice, without a word.
    known = not variant or (_voice_data() / "voices" / "!v" / variant).is_file()
    if not known or library.espeak_SetVoiceByName(f"en-us+{variant}".rstrip("+").encode()) != 0:
        raise DataError(f"espeak-ng has no voice variant {variant!r}: choose another")
    for parameter, value in ((_RATE, round(rate * tract)), (_PITCH, pitch), (_PITCH_RANGE, 50), (_WORD_GAP, word_gap)):
        library.espeak_SetParameter(parameter, value, 0)
    library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    blocks.clear()
    content = text.encode()
    library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, _CHARS_UTF8, 0, _CHARS_UTF8, None, None)
    if not blocks:
        raise DataError(f"espeak-ng says nothing for {text!r}: give it words")
    samples = np.concatenate(blocks).astype(np.float32) / 32768
    return np.asarray(soxr.resample(samples, ESPEAK_RATE / tract, SAMPLE_RATE), np.float32)


def _require_espeak() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise DataError("synthesis needs espeak-ng: `pip install moe-asr[demo]`") from error
    return cast(ModuleType, espeakng_loader)


def _voice_data() -> Path:
    return Path(_require_espeak().get_data_path())


@cache
def _load_espeak() -> tuple[ctypes.CDLL, list[NDArray[np.int16]]]:
    """The initialised library, and the list to which it appends what it speaks."""
    blocks: list[NDArray[np.int16]] = []

    def collect(samples: Any, count: int, _events: int | None) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library = ctypes.CDLL(str(_require_espeak().get_library_path()))
    data = str(_voice_data()).encode()
    if library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _DONT_EXIT_ON_ERROR) != ESPEAK_RATE:
        raise DataError(f"espeak-ng does not start with the voices in {_voice_data()}: install espeakng-loader again")
    _callbacks.append(_Callback(collect))
    library.espeak_SetSynthCallback(_callbacks[-1])
    return library, blocks
