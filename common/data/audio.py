"""Reading and writing audio: soundfile first, PyAV for what libsndfile does not know, soxr for the sample rate."""

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from common.errors import DataError, StoreError

SAMPLE_RATE = 16000  # Hz, the only rate that Whisper knows

Samples = npt.NDArray[np.float32]
AudioSource = str | Path | bytes | BinaryIO


class AudioInfo(NamedTuple):
    """What a file's header says: seconds, Hz, number of channels."""

    duration: float
    rate: int
    channels: int


def read_audio(
    source: AudioSource,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    name: str | None = None,
) -> Samples:
    """Decode audio to mono at one rate; channels are averaged, other rates resampled.

    Args:
        source: a path, the bytes of a file, or an open binary file that can seek.
        offset: seconds to skip.
        duration: seconds to read at most; None reads to the end.
        sample_rate: Hz of the result.
        name: how errors call a source that is not a path.

    Returns:
        samples in [-1, 1], float32, shape (T,), T >= 1.

    Raises:
        DataError: a missing, unreadable, empty or undecodable file, or NaN or infinite samples; it names the file.
    """
    label = _label(source, name)
    samples_TC, rate = decode(source, offset=offset, duration=duration, name=name)
    if samples_TC.size == 0:
        where = f" after {offset:g} s" if offset else ""
        raise DataError(f"{label} holds no audio{where}: leave it out or correct its offset")
    if not np.isfinite(samples_TC).all():
        raise DataError(f"{label} holds samples that are not finite (NaN or infinity): export it again, as PCM")
    mono_T = samples_TC[:, 0] if samples_TC.shape[1] == 1 else samples_TC.mean(axis=1)
    if rate != sample_rate:
        mono_T = soxr.resample(mono_T, rate, sample_rate)
        if mono_T.size == 0:
            raise DataError(f"{label} holds no audio: {samples_TC.shape[0]} samples at {rate} Hz are too short")
    return np.ascontiguousarray(mono_T, dtype=np.float32)


def audio_info(source: AudioSource, *, name: str | None = None) -> AudioInfo:
    """Duration, rate and channels without decoding (formats that need PyAV are decoded).

    Raises:
        DataError: a missing or undecodable file; it names the file.
    """
    label = _label(source, name)
    try:
        with _open(source, label) as file:
            return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels)
    except (soundfile.LibsndfileError, TypeError) as error:
        samples_TC, rate = _decode_with_av(source, label, error)
        return AudioInfo(samples_TC.shape[0] / rate, rate, samples_TC.shape[1])


def write_wav(path: str | Path, samples: npt.ArrayLike, rate: int = SAMPLE_RATE) -> None:
    """Write 16-bit PCM WAV, whole or not at all; samples beyond [-1, 1] are clipped.

    Args:
        samples: shape (T,) or (T, channels).
        rate: Hz.

    Raises:
        StoreError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.asarray(samples, np.float32), -1, 1), rate, format="WAV", subtype="PCM_16")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StoreError(f"cannot write {target}: {error.strerror}: free space or change rights") from error


def _label(source: AudioSource, name: str | None) -> str:
    if name is not None:
        return name
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio in memory"))


def _open(source: AudioSource, label: str) -> soundfile.SoundFile:
    if isinstance(source, bytes):
        return soundfile.SoundFile(io.BytesIO(source))
    if isinstance(source, (str, Path)):
        try:
            with Path(source).open("rb") as file:
                if not file.read(1):
                    raise DataError(f"{label} is empty (0 bytes): leave it out or copy it again")
        except OSError as error:
            raise DataError(f"cannot read {label}: {error.strerror}: check the path and its rights") from error
        return soundfile.SoundFile(str(source))
    source.seek(0)
    return soundfile.SoundFile(source)


def decode(
    source: AudioSource, *, offset: float = 0.0, duration: float | None = None, name: str | None = None
) -> tuple[Samples, int]:
    """The wanted stretch as the file has it, unchecked: samples (T, channels), T >= 0, and their rate in Hz.

    Raises:
        DataError: a missing or undecodable file; it names the file.
    """
    label = _label(source, name)
    try:
        with _open(source, label) as file:
            start, frames = _stretch(file.samplerate, offset, duration)
            if start >= file.frames:
                return np.zeros((0, file.channels), np.float32), file.samplerate
            file.seek(start)
            return file.read(frames, dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless format such as .raw
        samples_TC, rate = _decode_with_av(source, label, error)
        start, frames = _stretch(rate, offset, duration)
        return samples_TC[start : None if frames < 0 else start + frames], rate


def _stretch(rate: int, offset: float, duration: float | None) -> tuple[int, int]:
    """The first frame and the number of frames, -1 for all the rest."""
    return round(offset * rate), -1 if duration is None else round(duration * rate)


def _decode_with_av(source: AudioSource, label: str, cause: Exception) -> tuple[Samples, int]:
    """All samples (T, channels) of the first audio stream. PyAV seeks inexactly, so callers cut afterwards."""
    try:
        import av
    except ImportError:
        raise DataError(
            f"{label} cannot be decoded by libsndfile ({cause}): `pip install moe-asr[audio-formats]` reads more "
            "formats, or convert it to WAV or FLAC"
        ) from cause
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, (str, Path)):
        source.seek(0)
    blocks_CT: list[Samples] = []
    try:
        with av.open(str(source) if isinstance(source, Path) else source) as container:
            if not container.streams.audio:
                raise DataError(f"{label} has no audio stream: leave it out")
            rate = int(container.streams.audio[0].rate)
            to_float = av.AudioResampler(format="fltp", rate=rate)
            for frame in container.decode(audio=0):
                blocks_CT.extend(block.to_ndarray() for block in to_float.resample(frame))
            blocks_CT.extend(block.to_ndarray() for block in to_float.resample(None))
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{label} cannot be decoded ({error}): it is damaged or no audio file") from error
    if not blocks_CT:
        return np.zeros((0, 1), np.float32), rate
    return np.concatenate(blocks_CT, axis=1).T.astype(np.float32), rate
