"""Audio files as blocks of samples: by libsndfile if the header is exact, otherwise by PyAV.

Memory use depends neither on a file's length nor on the length given in its header. Shape letters: N frames, C
channels.
"""

import io
import itertools
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soundfile

from common.data.ogg import MARK, inspect_ogg
from common.errors import DataError

Samples = npt.NDArray[np.float32]
AudioSource = str | Path | bytes | BinaryIO

BLOCK = 65536  # samples of all channels that are decoded at once
RATES = (1_000, 1_000_000)  # Hz: a header with a lower or higher rate is damaged
LONGEST_HOURS = 24  # of audio in one file; longer ones are refused
PREROLL = 10.0  # s before a stretch at which PyAV begins: by then every codec has forgotten where it started
SEEK_ERROR = 60.0  # s: a seek that lands farther away than this landed by wrong timestamps
GAP = 0.1  # s between the timestamps of two frames; less is rounding
LONGEST_GAP = 60.0  # s of silence that replace one gap
# Their headers may lack a length, or estimate it; several files may be joined into one.
ESTIMATED = ("MP3", "MPEG")
CONTINUOUS = ("ogg", "flac", "mp3", "aac", "wav")  # PyAV's names; a gap in their timestamps is lost audio
# What PyAV may take a file for: formats of recordings. Others, such as playlists, would open further files by name.
FORMATS = (
    "3gp,aac,ac3,ac4,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dss,dts,dv,eac3,flac,flv,g729,gsm,latm,loas,matroska,"
    "mov,mp3,mpc,mpc8,mpeg,mpegts,mxf,nistsphere,nut,ogg,qcp,rm,shn,tak,tta,voc,w64,wav,wv,xwma"
)
AV_ERRORS = (av.FFmpegError, ValueError, TypeError, OverflowError, MemoryError)
AV_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}


@dataclass
class Damage:
    """Audio that a file should contain but that cannot be decoded.

    Attributes:
        seconds: length of the damage found so far; it is replaced by silence.
        first: position in the file at which it begins, in seconds.
    """

    seconds: float = 0.0
    first: float = 0.0

    def add(self, seconds: float, at: float) -> None:
        """Adds further damage."""
        self.first = self.first if self.seconds else at
        self.seconds += seconds


@dataclass
class AudioStream:
    """An opened file.

    Attributes:
        rate: Hz.
        channels: C.
        frames: number of frames of the whole file, if its header gives it exactly.
        blocks: the requested stretch, as a sequence of block_NC.
        damage: damage in the part read so far.
    """

    rate: int
    channels: int
    frames: int | None
    blocks: Iterator[Samples]
    damage: Damage = field(default_factory=Damage)


@contextmanager
def open_audio(
    source: AudioSource, label: str, *, offset: float = 0.0, duration: float | None = None
) -> Iterator[AudioStream]:
    """Opens a file for one pass over a stretch of it.

    Args:
        source: a path, the bytes of a file, or an open binary file that can seek.
        label: name in error messages.
        offset, duration: the stretch, in seconds; None is up to the end.

    Raises:
        DataError: the file is missing, empty, not regular, or not audio; while reading, it is too long.
    """
    with ExitStack() as stack:
        sound, problem = _open_sound(source, label, stack)
        if sound is None:
            stream = _open_av(source, label, stack, offset, duration, problem)
        else:
            damage = Damage()

            def resume(frame: int, frames: int) -> Iterator[Samples]:
                rate, given_up = sound.samplerate, "libsndfile gives up in the middle"
                rest = _open_av(source, label, stack, frame / rate, frames / rate, given_up, damage)
                same = (rest.rate, rest.channels) == (rate, sound.channels)
                return rest.blocks if same else iter(())

            blocks = _sound_blocks(sound, offset, duration, damage, resume)
            stream = AudioStream(sound.samplerate, sound.channels, sound.frames, blocks, damage)
        if not RATES[0] <= stream.rate <= RATES[1]:
            raise DataError(f"{label} names {stream.rate:,} samples a second: it is damaged or no audio file")
        stream.blocks = _limited(stream.blocks, stream.rate, label)
        yield stream


def check_regular(path: Path, label: str) -> int:
    """The size in bytes of a file, after checks that it may be opened.

    Raises:
        DataError: the file is missing or empty, or is a pipe, a device or a folder.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            with path.open("rb"):
                pass
    except OSError as error:
        raise DataError(f"cannot read {label}: {error.strerror}: check the path and its rights") from error
    except ValueError:  # a NUL, or a surrogate that no file system's name holds
        raise DataError(f"cannot read {label!r}: no file can have this name: check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"cannot read {label}: it is a folder: name an audio file")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"cannot read {label}: it is a pipe or a device, not a file: copy its audio to a file")
    if not status.st_size:
        raise DataError(f"{label} is empty (0 bytes): omit it or copy it again")
    return status.st_size


def binary_file(source: AudioSource, label: str, stack: ExitStack) -> BinaryIO:
    """A source as an open file at its beginning; a file that is opened here is closed with the stack."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, Path)):
        check_regular(Path(source), label)
        return stack.enter_context(Path(source).open("rb"))
    source.seek(0)
    return source


class _Forgiving:
    """A file for libsndfile that ignores seeks to before its beginning, which libsndfile attempts in damaged files."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.tell, self.file = file.read, file.tell, file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io."""
        with suppress(ValueError, OSError):  # of bytes in memory, of a file
            self.file.seek(offset, whence)
        return self.file.tell()


def _open_sound(source: AudioSource, label: str, stack: ExitStack) -> tuple[soundfile.SoundFile | None, str]:
    """The file opened by libsndfile, or None if libsndfile does not know its length exactly, with the reason."""
    file = binary_file(source, label, stack)
    head = file.read(4)
    file.seek(0)
    if head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return None, "it begins as MP3 does"
    if head == MARK:
        if inspect_ogg(file) != "whole":
            return None, "it is no Ogg file of one undamaged stream"
        file.seek(0)
    # By its name where it has one: libsndfile then reads without Python.
    target = os.fsencode(source) if isinstance(source, (str, Path)) else _Forgiving(file)
    try:
        sound = stack.enter_context(soundfile.SoundFile(target))
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a headerless format such as .raw
        return None, str(getattr(error, "error_string", error))
    exact = sound.format not in ESTIMATED and not sound.subtype.startswith("MPEG")
    # A header without a length gives 0 frames; FLAC's, which nothing bounds, may name any length.
    longest = LONGEST_HOURS * 3600 * sound.samplerate if sound.format == "FLAC" else math.inf
    return (sound, "") if exact and 0 < sound.frames <= longest else (None, "its header contains no length")


def _sound_blocks(
    sound: soundfile.SoundFile,
    offset: float,
    duration: float | None,
    damage: Damage,
    resume: Callable[[int, int], Iterator[Samples]],
) -> Iterator[Samples]:
    """Blocks decoded by libsndfile; if it fails, `resume` decodes the rest (given its first frame and number of
    frames).
    """
    rate = sound.samplerate
    place = min(round(offset * rate), sound.frames)
    end = sound.frames if duration is None else min(sound.frames, place + round(duration * rate))
    try:
        if place < end:
            sound.seek(place)
        most = max(1, BLOCK // sound.channels)
        while place < end and len(block_NC := sound.read(min(most, end - place), dtype="float32", always_2d=True)):
            place += len(block_NC)
            yield block_NC
    except soundfile.LibsndfileError:
        for block_NC in resume(place, end - place):
            place += len(block_NC)
            yield block_NC
    if place < end:
        damage.add((end - place) / rate, place / rate)


def _limited(blocks: Iterator[Samples], rate: int, label: str) -> Iterator[Samples]:
    left = LONGEST_HOURS * 3600 * rate
    for block_NC in blocks:
        left -= len(block_NC)
        if left < 0:
            raise DataError(f"{label} lasts over {LONGEST_HOURS} hours: cut it into shorter files")
        yield block_NC


def _open_av(
    source: AudioSource,
    label: str,
    stack: ExitStack,
    offset: float,
    duration: float | None,
    problem: str,
    damage: Damage | None = None,
    *,
    may_seek: bool = True,
) -> AudioStream:
    """The stretch decoded by PyAV. `problem`: libsndfile's message about the file."""
    damage = Damage() if damage is None else damage
    seek = may_seek and offset > 2 * PREROLL
    unusable = DataError(f"{label} cannot be decoded ({problem}): it is damaged or no audio file")
    try:
        container = stack.enter_context(av.open(binary_file(source, label, stack), options=AV_OPTIONS))
        if not container.streams.audio:
            raise DataError(f"{label} has no audio stream: omit it")
        stream = container.streams.audio[0]
        if stream.codec_context is None:  # a codec that FFmpeg does not know
            raise unusable
        origin = float((stream.start_time or 0) * stream.time_base)
        if seek:
            container.seek(int((origin + offset - PREROLL) / stream.time_base), stream=stream)
        frames = _decoded(container, damage, offset + origin)
        first = next(frames, None)
    except AV_ERRORS:
        raise unusable from None
    if seek:
        position = -math.inf if first is None or first[0].pts is None else _time(first[0]) - origin
        if not offset - SEEK_ERROR <= position <= offset:
            return _open_av(source, label, stack, offset, duration, problem, damage, may_seek=False)
    else:
        position = 0.0
    if first is None:
        if not stream.rate or damage.seconds:
            raise unusable
        return AudioStream(int(stream.rate), 1, None, iter(()), damage)
    rate, channels = first[0].sample_rate, len(first[0].layout.channels)
    if not rate or not channels:
        raise unusable
    blocks = _av_blocks(itertools.chain([first], frames), rate, first[0].layout, channels)
    wanted = None if duration is None else round(duration * rate)
    blocks = _cut(_guarded(blocks, unusable), round((offset - position) * rate), wanted)
    return AudioStream(rate, channels, None, blocks, damage)


def _guarded(blocks: Iterator[Samples], unusable: DataError) -> Iterator[Samples]:
    try:
        yield from blocks
    except AV_ERRORS:
        raise unusable from None


def _time(frame: Any) -> float:
    return float(frame.pts * frame.time_base)


def _decoded(container: Any, damage: Damage, since: float) -> Iterator[tuple[Any, float]]:
    """Each frame of the first audio stream, and the seconds that are missing before it.

    Args:
        since: the time from which missing audio counts as damage.
    """
    stream = container.streams.audio[0]
    continuous = container.format.name in CONTINUOUS
    expected: float | None = None  # time of the next frame
    failed = False  # something could not be decoded since the last frame
    for packet in _packets(container, stream):
        try:
            frames = [] if packet is None else packet.decode()
        except AV_ERRORS:
            frames = []
            failed = True
        for frame in frames:
            if not frame.samples:
                continue
            time = expected if frame.pts is None else _time(frame)
            gap = 0.0 if expected is None or time is None else time - expected
            gap = min(gap, LONGEST_GAP) if gap > (0.0 if failed else GAP) else 0.0
            if gap and (failed or continuous) and time is not None and time >= since:
                damage.add(gap, time - gap)
            failed = False
            yield frame, gap
            expected = None if time is None else time + frame.samples / frame.sample_rate


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream up to its end, or up to the point at which the container is damaged."""
    packets = container.demux(stream)
    while True:
        try:
            yield next(packets)
        except StopIteration:
            return
        except AV_ERRORS:
            return


def _av_blocks(frames: Iterable[tuple[Any, float]], rate: int, layout: Any, channels: int) -> Iterator[Samples]:
    """Frames converted to samples of one rate and layout, with silence in place of missing frames."""
    resampler: Any = None
    form = None
    for frame, gap in frames:
        if form != (frame.format.name, frame.layout.name, frame.sample_rate):
            if resampler is not None:
                yield from _flushed(resampler)
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if gap:
            yield np.zeros((round(gap * rate), channels), np.float32)
        frame.pts = None  # otherwise the resampler fills gaps too
        for block in resampler.resample(frame):
            yield block.to_ndarray().T
    if resampler is not None:
        yield from _flushed(resampler)


def _flushed(resampler: Any) -> Iterator[Samples]:
    for block in resampler.resample(None):
        yield block.to_ndarray().T


def _cut(blocks: Iterable[Samples], skip: int, wanted: int | None) -> Iterator[Samples]:
    """The blocks without the first `skip` frames, up to `wanted` frames."""
    for block_NC in blocks:
        if skip >= len(block_NC):
            skip -= len(block_NC)
            continue
        block_NC, skip = block_NC[skip:][:wanted], 0
        if wanted is not None:
            wanted -= len(block_NC)
        yield block_NC
        if wanted == 0:
            return
