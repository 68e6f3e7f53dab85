"""Reading audio of any format as mono, 16 kHz, within [-1, 1].

Shape letters: T samples of the result, N frames of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soxr

from common.data.decoders import AudioSource, AudioStream, Damage, open_audio
from common.data.decoders import Samples as Samples  # for those that read audio
from common.errors import DataError

if TYPE_CHECKING:
    from common.data.corpus import Corpus, Utterance

SAMPLE_RATE = 16000  # Hz, the only rate that Whisper knows
CANCELLED = 0.1  # of the power that one channel alone would leave in the mean: below, the channels cancel
OVERSHOOT = 2.0  # peaks up to here are clipped, as in a 16-bit file; higher ones are of samples at another scale
TOLERATED_LOSS = 0.25  # s of audio that may be silence because it is damaged


class AudioInfo(NamedTuple):
    """Seconds, Hz, number of channels."""

    duration: float
    rate: int
    channels: int


@dataclass
class Levels:
    """Statistics of a decoded stretch of audio.

    Attributes:
        frames: number of frames, of C channels at `rate` Hz.
        finite: no sample is NaN or infinite.
        power: sums of squares of each channel and of the channels' mean, shape (C + 1,).
        low, high: minimum and maximum of each channel and of their mean, shape (C + 1,).
        damage: the part that could not be decoded.
    """

    rate: int
    channels: int
    damage: Damage
    frames: int = 0
    finite: bool = True
    power: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    low: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    high: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.power = np.zeros(self.channels + 1)
        self.low = np.full(self.channels + 1, np.inf)
        self.high = np.full(self.channels + 1, -np.inf)

    def add(self, block_NC: Samples) -> Samples:
        """Adds a block to the statistics; returns the mean of its channels, shape (N,)."""
        mean_N = block_NC[:, 0] if self.channels == 1 else block_NC.mean(axis=1)
        self.frames += len(block_NC)
        if not np.isfinite(mean_N).all():  # of finite channels, too, when their sum is beyond float32
            self.finite = False
        elif len(block_NC):
            for column, one_N in enumerate([*block_NC.T, mean_N]):
                self.power[column] += np.square(one_N, dtype=np.float64).sum()
                self.low[column] = min(self.low[column], one_N.min())
                self.high[column] = max(self.high[column], one_N.max())
        return mean_N

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.frames / self.rate

    @property
    def channel(self) -> int | None:
        """The loudest channel if the channels cancel in their mean (opposite phase); None if the mean can be used."""
        loudest = int(self.power[:-1].argmax())
        # One channel that speaks while the others are silent leaves this share of its power in the mean.
        least = CANCELLED * self.power[loudest] / self.channels**2
        return loudest if self.power[-1] < least else None

    @property
    def amplitude(self) -> float:
        """Half of the difference between maximum and minimum of the result; a constant offset has no influence."""
        column = -1 if (channel := self.channel) is None else channel
        return float(self.high[column] - self.low[column]) / 2 if self.frames else 0.0

    @property
    def peak(self) -> float:
        """The largest absolute value of the result, before it is limited to [-1, 1]."""
        column = -1 if (channel := self.channel) is None else channel
        return max(-float(self.low[column]), float(self.high[column])) if self.frames else 0.0


def read_utterance(corpus: Corpus, u: Utterance) -> Samples:
    """The samples of an utterance of a corpus at 16 kHz, from its file or its shard.

    Raises:
        DataError: as `read_audio` raises.
    """
    clip = corpus.clip(u)
    source, name = (clip.read(), clip.label) if clip else (corpus.path(u), None)
    return read_audio(source, offset=u.offset, duration=u.duration, name=name)


def read_audio(
    source: AudioSource,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    name: str | None = None,
    on_damage: Callable[[str], object] | None = None,
) -> Samples:
    """Decode audio to mono at 16 kHz, block by block, so that memory holds only the result.

    Channels are averaged; if they cancel (opposite phase), the loudest channel is used. Peaks beyond full scale are
    clipped; samples at another scale (over twice full scale) are scaled down to it.

    Args:
        source: a path, the bytes of a file, or an open binary file that can seek.
        offset: seconds to skip.
        duration: maximum number of seconds to read; None reads to the end.
        name: name in error messages of a source that is not a path.
        on_damage: called with the part that cannot be decoded, which is replaced by silence; by default damage is an
            error.

    Returns:
        samples in [-1, 1], float32, shape (T,), T >= 1.

    Raises:
        DataError: a missing, unreadable, empty, damaged or undecodable file, or NaN or infinite samples; it names the
            file.
    """
    label = label_of(source, name)

    def read(channel: int | None) -> tuple[Samples, Levels]:
        with open_audio(source, label, offset=offset, duration=duration) as stream:
            levels = Levels(stream.rate, stream.channels, stream.damage)
            return _collect(_resampled(_one_channel(stream, levels, channel), stream.rate)), levels

    mono_T, levels = read(None)
    check_levels(levels, label, offset, on_damage)
    if (channel := levels.channel) is not None:
        mono_T, _ = read(channel)
    if mono_T.size == 0:
        raise DataError(f"{label} contains no audio: {levels.frames} samples at {levels.rate} Hz are too short")
    if levels.peak > OVERSHOOT:
        mono_T /= np.abs(mono_T).max()
    return np.clip(mono_T, -1, 1, out=mono_T)


def measure_audio(
    source: AudioSource, *, offset: float = 0.0, duration: float | None = None, name: str | None = None
) -> Levels:
    """Levels of the audio that `read_audio` would read, without keeping its samples.

    Raises:
        DataError: a missing or undecodable file; it names the file.
    """
    with open_audio(source, label_of(source, name), offset=offset, duration=duration) as stream:
        levels = Levels(stream.rate, stream.channels, stream.damage)
        for block_NC in stream.blocks:
            levels.add(block_NC)
        return levels


def check_levels(
    levels: Levels, label: str, offset: float = 0.0, on_damage: Callable[[str], object] | None = None
) -> None:
    """Refuses audio that cannot be used for training: no samples, NaN or infinite samples, a damaged stretch.

    Raises:
        DataError: naming the file.
    """
    if not levels.frames:
        where = f" after {offset:g} s" if offset else ""
        raise DataError(f"{label} contains no audio{where}: omit it or correct its offset")
    if not levels.finite:
        raise DataError(f"{label} contains samples that are not finite (NaN or infinity): export it again, as PCM")
    damage = levels.damage
    if damage.seconds > (TOLERATED_LOSS if on_damage is None else 0):
        lost = f"{label} is damaged: {damage.seconds:.2f} s from {damage.first:.2f} s on cannot be decoded"
        if on_damage is None:
            raise DataError(f"{lost}: copy it again, or omit it")
        on_damage(lost)


def audio_info(source: AudioSource, *, name: str | None = None) -> AudioInfo:
    """Duration, rate and channels: from the header if it is exact (WAV, FLAC and similar formats), otherwise by
    decoding.

    Raises:
        DataError: a missing, damaged or undecodable file; it names the file.
    """
    label = label_of(source, name)
    with open_audio(source, label) as stream:
        if stream.frames is not None:
            return AudioInfo(stream.frames / stream.rate, stream.rate, stream.channels)
    levels = measure_audio(source, name=name)
    if levels.frames:
        check_levels(levels, label)
    return AudioInfo(levels.seconds, levels.rate, levels.channels)


def label_of(source: AudioSource, name: str | None) -> str:
    """Name of a source in error messages."""
    if name is not None:
        return name
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio in memory"))


def _one_channel(stream: AudioStream, levels: Levels, channel: int | None) -> Iterator[Samples]:
    """The mean of the channels, or a single channel; `levels` is updated with all channels."""
    for block_NC in stream.blocks:
        mean_N = levels.add(block_NC)
        yield mean_N if channel is None else block_NC[:, channel]


def _resampled(blocks: Iterator[Samples], rate: int) -> Iterator[Samples]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    resampler: Any = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    for block_N in blocks:
        yield resampler.resample_chunk(np.ascontiguousarray(block_N))
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _collect(blocks: Iterator[Samples]) -> Samples:
    """One array of all blocks, grown in place, so that no samples are held twice."""
    buffer = bytearray()
    for block_N in blocks:
        buffer += np.asarray(block_N, np.float32).tobytes()
    return np.frombuffer(buffer, np.float32)
