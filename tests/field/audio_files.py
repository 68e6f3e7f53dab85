"""Recordings as people have them, made of tones: bytes of every format, and what happens to files on their way."""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float, rate: int = RATE, hertz: float = 300.0, level: float = 0.4) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def bursts(seconds: float, rate: int = RATE) -> np.ndarray:
    """Noise and silence by turns: what makes variable bit rates vary."""
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
    samples[np.arange(len(samples)) // rate % 2 == 1] = 0
    return samples


def sound_file(samples: np.ndarray, container: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    """A file by libsndfile; samples (N,) or (N, C)."""
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", rate, 1 if samples.ndim == 1 else samples.shape[1], subtype, None, container
    ) as f:
        for start in range(0, len(samples), rate):  # its Vorbis encoder overflows the stack when it gets all at once
            f.write(samples[start : start + rate])
    return file.getvalue()


def av_file(samples: np.ndarray, container: str, codec: str, rate: int = RATE, **options: str) -> bytes:
    """A mono file by FFmpeg; `options` are the container's."""
    path = Path(tempfile.mkdtemp()) / "a"  # a muxer may read what it has written
    with av.open(path, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts = None
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    content = path.read_bytes()
    shutil.rmtree(path.parent)
    return content


def with_bytes(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


def with_data_size(wav: bytes, size: int) -> bytes:
    """A WAV file whose header says that its audio has so many bytes."""
    return with_bytes(wav, wav.index(b"data") + 4, struct.pack("<I", size))


def with_total_samples(flac: bytes, total: int) -> bytes:
    """A FLAC file whose header says that it has so many samples; 0 is unknown, 36 bits are the most."""
    return with_bytes(flac, 21, bytes([flac[21] & 0xF0 | total >> 32]) + struct.pack(">I", total & 0xFFFFFFFF))


def hurt(content: bytes, size: int = 300) -> bytes:
    """A file in whose middle some bytes are noise."""
    return with_bytes(content, len(content) // 2, np.random.default_rng(1).bytes(size))


def with_id3(mp3: bytes, size: int) -> bytes:
    """An MP3 behind a tag with a picture of so many bytes."""
    length = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    return b"ID3\x03\0\0" + length + (b"APIC" + b"\xff\xd8\xff" * size)[:size] + mp3
