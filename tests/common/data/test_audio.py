"""Decoding: what comes out has one channel and one rate whatever went in; what cannot be used is named."""

import io

import av
import numpy as np
import pytest
import soundfile

from common.data.audio import SAMPLE_RATE, audio_info, measure_audio, read_audio
from common.errors import DataError
from tests.factories import write_wav


def tone(seconds: float, rate: int, hertz: float = 300.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def loudest_hertz(samples: np.ndarray, rate: int = SAMPLE_RATE) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_number_of_channels_comes_out_as_16_khz_mono(tmp_path, suffix, rate, channels):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(0.5, rate)] * channels, axis=1), rate)
    samples = read_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1 and samples.flags.c_contiguous
    assert abs(len(samples) - 8000) <= 1
    assert abs(loudest_hertz(samples) - 300) < 4
    assert 0.35 < np.abs(samples).max() < 0.45
    assert audio_info(path) == (0.5, rate, channels)


def test_16_khz_pcm_comes_back_exactly(tmp_path):
    samples = (np.random.default_rng(0).integers(-32768, 32768, 1000) / 32768).astype(np.float32)
    write_wav(tmp_path / "new" / "a.wav", samples, 16000)
    assert np.array_equal(read_audio(tmp_path / "new" / "a.wav"), samples)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.wav"]


def test_channels_are_averaged(tmp_path):
    left, right = np.full(800, 0.5, np.float32), np.full(800, -0.25, np.float32)
    write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000)
    assert np.allclose(read_audio(tmp_path / "a.wav"), 0.125, atol=1e-4)


def test_a_stretch_is_the_same_part_of_the_whole(tmp_path):
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 16000), 16000)
    whole = read_audio(tmp_path / "a.wav")
    assert np.array_equal(read_audio(tmp_path / "a.wav", offset=0.25, duration=0.5), whole[4000:12000])
    assert np.array_equal(read_audio(tmp_path / "a.wav", offset=0.75, duration=9.0), whole[12000:])
    with pytest.raises(DataError, match=r"a\.wav contains no audio after 1 s"):
        read_audio(tmp_path / "a.wav", offset=1.0)


def test_bytes_and_open_files_read_like_paths(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.2, 8000), 8000)
    expected, content = read_audio(tmp_path / "a.wav"), (tmp_path / "a.wav").read_bytes()
    assert np.array_equal(read_audio(content), expected)
    assert np.array_equal(read_audio(io.BytesIO(content)), expected)
    assert np.array_equal(read_audio(str(tmp_path / "a.wav")), expected)
    with (tmp_path / "a.wav").open("rb") as file:
        assert np.array_equal(read_audio(file, offset=0.1), read_audio(content, offset=0.1))
        assert audio_info(file) == audio_info(content)


def write_m4a(path, samples: np.ndarray, rate: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def test_what_libsndfile_cannot_read_goes_through_pyav(tmp_path):
    write_m4a(tmp_path / "a.m4a", tone(1.0, 44100), 44100)
    samples = read_audio(tmp_path / "a.m4a")
    assert abs(len(samples) - 16000) < 2000  # AAC pads
    assert abs(loudest_hertz(samples) - 300) < 4
    info = audio_info(tmp_path / "a.m4a")
    assert (info.rate, info.channels) == (44100, 1)
    stretch = read_audio((tmp_path / "a.m4a").read_bytes(), offset=0.5, duration=0.25)
    assert len(stretch) == 4000


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.raw", "a"])
@pytest.mark.parametrize("content", [b"", b"no audio at all, only text " * 20], ids=["empty", "text"])
def test_files_that_hold_no_audio_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for read in (read_audio, audio_info, measure_audio):
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "missing.wav", tmp_path):
        with pytest.raises(DataError, match=f"cannot read {path}"):
            read_audio(path)


def test_a_file_without_samples_is_refused(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros(0), 16000)
    with pytest.raises(DataError, match=r"a\.wav contains no audio"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, value):
    samples = tone(0.1, 16000)
    samples[7] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"a\.wav.*not finite"):
        read_audio(tmp_path / "a.wav")


def test_errors_about_bytes_carry_the_given_name():
    with pytest.raises(DataError, match="shard-3: clip 12"):
        read_audio(b"nothing that decodes", name="shard-3: clip 12")
