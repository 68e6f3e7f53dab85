"""What training hears of a recording: one channel that is not silence, within [-1, 1], in memory that is bounded."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from common.data.audio import audio_info, read_audio
from common.errors import DataError
from tests.field.audio_files import RATE, av_file, sound_file, tone, with_bytes, with_total_samples
from tests.field.test_lengths import kinds


def test_channels_in_opposite_phase_do_not_become_silence(tmp_path):
    """m-bain/whisperX#750: the mean of both channels is nothing."""
    left = tone(4)
    content = sound_file(np.stack([left, -0.9 * left], 1))
    samples = read_audio(content)
    assert np.abs(samples - left).max() < 1e-3, "the louder channel"
    assert np.abs(read_audio(content, offset=1, duration=1) - left[RATE : 2 * RATE]).max() < 1e-3
    assert kinds(tmp_path, content) == ["opposite-phase"]


def test_a_channel_that_is_silent_does_not_change_what_is_read(tmp_path):
    """Kind: a speaker on one channel of two or of six; the mean holds all of it."""
    samples = np.zeros((4 * RATE, 6), np.float32)
    samples[:, 4] = tone(4)
    assert np.abs(read_audio(sound_file(samples)) - samples.mean(1)).max() < 1e-3
    assert kinds(tmp_path, sound_file(samples)) == ["mixed-down"]


@pytest.mark.parametrize("level", [32768.0, 3.0, 1e30])
def test_samples_at_another_scale_come_within_range(tmp_path, level):
    """Kind: integers that were written as floating-point numbers without being scaled."""
    content = sound_file((level * tone(4)).astype(np.float32), "WAV", "FLOAT")
    samples = read_audio(content)
    assert np.abs(samples).max() == 1.0
    assert np.corrcoef(samples, tone(4))[0, 1] > 0.99
    assert kinds(tmp_path, content) == (["out-of-range"] if level * 0.4 > 2 else [])


def test_peaks_beyond_full_scale_are_clipped():
    """Kind: decoders of lossy formats, and resamplers, overshoot."""
    samples = read_audio(sound_file(tone(1, level=1.3), "WAV", "FLOAT"))
    assert np.array_equal(samples, np.clip(tone(1, level=1.3), -1, 1))


@pytest.mark.parametrize(
    "samples",
    [np.zeros(4 * RATE), np.full(4 * RATE, 0.3), np.append(1e-5 * tone(4)[1:], 3e8)],
    ids=["silence", "a constant", "one spike"],
)
def test_what_is_silent_to_training_is_found(tmp_path, samples):
    """Kind: the file's peak is not what the encoder gets."""
    problems = kinds(tmp_path, sound_file(samples.astype(np.float32), "WAV", "FLOAT"))
    assert problems[:1] == ["silent-audio"] or (problems == ["out-of-range"] and samples[-1] > 1)


@pytest.mark.parametrize("rate", [1, 533_373_312])
def test_a_rate_that_no_recorder_has_is_refused(rate):
    """Kind: a damaged header; resampling from such a rate takes seconds, or makes a day of one second."""
    content = with_bytes(sound_file(tone(1)), 24, rate.to_bytes(4, "little"))
    with pytest.raises(DataError, match="samples a second"):
        read_audio(content)


MEASURE = """
import resource, sys
from common.data.audio import audio_info, measure_audio, read_audio
from common.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print({"read": lambda path: len(read_audio(path)), "measure": lambda path: measure_audio(path).frames,
           "info": lambda path: audio_info(path).duration}[sys.argv[1]](sys.argv[2]), end=" ")
except DataError as error:
    print(type(error).__name__, end=" ")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def megabytes(how: str, path) -> tuple[str, int]:
    """(result, memory that reading it took) of a process of its own, which may not have more than 3 GB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how, str(path)], capture_output=True, text=True, preexec_fn=limit, timeout=120
    )
    result, used = done.stdout.split() if done.stdout else (done.stderr[-300:], 10**6)
    return result, int(used)


def test_memory_is_that_of_the_result(tmp_path):
    """SYSTRAN/faster-whisper#249, m-bain/whisperX#1455: long recordings filled the memory. Ten minutes are 38 MB."""
    (tmp_path / "a.m4a").write_bytes(av_file(tone(600), "mp4", "aac"))
    samples, used = megabytes("read", tmp_path / "a.m4a")
    assert abs(int(samples) - 600 * RATE) < RATE and used < 90
    _, used = megabytes("measure", tmp_path / "a.m4a")
    assert used < 40


def test_a_header_that_asks_for_256_gib_gets_nothing(tmp_path):
    """Kind: libsndfile/libsndfile#1038; memory was taken by what FLAC's header says."""
    content = with_total_samples(sound_file(tone(4), "FLAC"), 2**36 - 1)
    (tmp_path / "a.flac").write_bytes(content)
    assert megabytes("read", tmp_path / "a.flac")[1] < 60
    assert megabytes("info", tmp_path / "a.flac")[0] == "4.0"
    assert kinds(tmp_path, content) == ["cut-short"]


@pytest.mark.parametrize(
    "content", [b"\0", b"R", b"\xff", b"RIFF", b"OggS", b"fLaC", b"ID3", b"\x1a\x45\xdf\xa3"], ids=repr
)
def test_a_few_bytes_are_a_finding(tmp_path, content):
    assert kinds(tmp_path, content) == ["unreadable-audio"]


def test_what_is_no_file_is_a_finding(tmp_path):
    """Kind: a pipe hangs whoever opens it, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "b")
    for path in ("b", "/dev/zero", "."):
        with pytest.raises(DataError, match=r"pipe or a device|folder"):
            audio_info(tmp_path / path)
    (tmp_path / "index.jsonl").write_text(
        '{"id": "b", "audio_filepath": "b", "duration": 1, "text": "x"}\n'
        '{"id": "z", "audio_filepath": "/dev/zero", "duration": 1e300, "text": "x"}\n'
    )
    from common.data.audit import audit
    from common.data.corpus import read_corpus

    problems = {(f.utterance_id, f.kind) for f in audit(read_corpus(tmp_path))}
    assert {("b", "unreadable-audio"), ("z", "unreadable-audio")} <= problems
