"""The decoders of audio on mutated files: a result within [-1, 1] or one clear error, soon, whatever the bytes are.

MOE_ASR_FUZZ_SEEDS=10000 tries 20,000 files in place of the 400 of a usual run; MOE_ASR_FUZZ_SECONDS bounds their time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from common.data.audio import SAMPLE_RATE, audio_info, measure_audio, read_audio
from common.data.decoders import LONGEST_HOURS
from common.data.headers import header_fault
from common.errors import DataError
from tests.field.audio_files import av_file, bursts, sound_file, with_id3
from tests.hostile.figures import SEEDS

SECONDS = float(os.environ.get("MOE_ASR_FUZZ_SECONDS", "30"))
TOO_SLOW = 10.0  # s of a processor for one file of a few kilobytes
MARKS = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"RIFF", b"OggS", b"fLaC", b"data", b"mdat"]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    samples = bursts(1.5)
    sounds = {
        name: sound_file(samples, container, subtype)
        for name, container, subtype in [
            ("wav", "WAV", None),
            ("float", "WAV", "FLOAT"),
            ("adpcm", "WAV", "IMA_ADPCM"),
            ("gsm", "WAV", "GSM610"),
            ("rf64", "RF64", None),
            ("w64", "W64", None),
            ("aiff", "AIFF", None),
            ("au", "AU", None),
            ("caf", "CAF", None),
            ("nist", "NIST", None),
            ("flac", "FLAC", None),
            ("vorbis", "OGG", "VORBIS"),
            ("opus", "OGG", "OPUS"),
        ]
    }
    coded = {
        name: av_file(samples, container, codec)
        for name, container, codec in [
            ("mp3", "mp3", "libmp3lame"),
            ("aac", "adts", "aac"),
            ("m4a", "mp4", "aac"),
            ("mka", "matroska", "pcm_s16le"),
            ("avi", "avi", "mp2"),
            ("ts", "mpegts", "mp2"),
            ("flv", "flv", "aac"),
            ("webm", "webm", "libopus"),
            ("wv", "wv", "wavpack"),
        ]
    }
    return sounds | coded | {"id3": with_id3(coded["mp3"], 3000), "joined": sounds["opus"] + sounds["vorbis"]}


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with a few changes, most of them where headers are."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(0, min(len(data), 200) if rng.random() < 0.6 else len(data)))
        match rng.integers(0, 6):
            case 0:
                data[place] ^= 1 << int(rng.integers(0, 8))
            case 1:
                size = int(rng.integers(1, 9))
                data[place : place + size] = rng.bytes(size)
            case 2:
                mark = MARKS[rng.integers(0, len(MARKS))]
                data[place : place + len(mark)] = mark
            case 3:
                del data[place : place + int(rng.integers(1, 400))]
            case 4:
                data[place:place] = data[place : place + int(rng.integers(1, 400))]
            case _:
                del data[max(place, 12) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def inputs(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    deadline = time.monotonic() + SECONDS
    names = list(files)
    for seed in range(2 * SEEDS):
        if time.monotonic() > deadline:
            return
        name = names[seed % len(names)]
        yield f"{name}, seed {seed}", mutated(files[name], np.random.default_rng(seed))


def fault_of(content: bytes) -> str | None:
    """What is wrong with the way a file is read; None where it is as it should be."""
    started = time.process_time()
    try:
        for read in (read_stretch, read_whole, read_facts):
            try:
                if problem := read(content):
                    return problem
            except DataError as error:
                if "\n" in str(error) or "fuzzed" not in str(error):
                    return f"an unclear error: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return f"took {seconds:.0f} s" if seconds > TOO_SLOW else None


def read_whole(content: bytes) -> str | None:
    samples = read_audio(content, name="fuzzed", on_damage=lambda note: None)
    return None if sound(samples) else "samples beyond [-1, 1]"


def read_stretch(content: bytes) -> str | None:
    samples = read_audio(content, name="fuzzed", offset=0.4, duration=0.5)
    return None if sound(samples) and len(samples) <= 0.5 * SAMPLE_RATE + 1 else "no stretch"


def read_facts(content: bytes) -> str | None:
    levels = measure_audio(content, name="fuzzed")
    header_fault(content, "fuzzed", levels.seconds)
    info = audio_info(content, name="fuzzed")
    return None if 0 <= info.duration < LONGEST_HOURS * 3600 and info.rate > 0 else f"an odd length: {info}"


def sound(samples: np.ndarray) -> bool:
    return samples.size > 0 and bool(np.isfinite(samples).all()) and float(np.abs(samples).max()) <= 1.0


def test_every_seed_file_is_read(files):
    for name, content in files.items():
        assert read_whole(content) is None, name


def test_mutated_files_are_read_or_refused(files, record_property):
    tried, lost = 0, []
    for name, content in inputs(files):
        tried += 1
        if fault := fault_of(content):
            lost.append(f"{name}: {fault}")
    record_property("tried", tried)
    record_property("lost", len(lost))
    assert tried and not lost, "\n".join(lost[:20])
