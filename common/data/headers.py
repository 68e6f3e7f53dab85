"""Compares a file's header with its content, to find recordings that were cut short, joined, or not closed."""

import mmap
import os
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import soundfile

from common.data.decoders import AV_ERRORS, AV_OPTIONS, AudioSource, binary_file
from common.data.ogg import MARK, inspect_ogg

TOLERANCE = 0.25  # s by which promised and decoded length may differ: codecs pad
# PyAV's names of formats whose header has a length that is no estimate.
PROMISING = ("wav", "aiff", "au", "flac", "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "tta", "wv", "ape")
UNKNOWN = 0x7FFF0000  # bytes: larger data sizes mean an unknown length, as 0 does
HEAD = 1 << 16  # bytes in which an MP3's first frame is looked for


class HeaderFault(NamedTuple):
    """Description of how a file differs from its header, and whether audio is certainly lost."""

    detail: str
    certain: bool = True


OGG_FAULTS = {
    "damaged": HeaderFault("pages of it are damaged or missing"),
    "unended": HeaderFault("its last page is missing: it may have been cut short", certain=False),
}


def header_fault(source: AudioSource, label: str, seconds: float) -> HeaderFault | None:
    """How a file differs from its header; None if it does not.

    Args:
        source: a file that could be decoded.
        label: name of the file in messages.
        seconds: its length as decoded.
    """
    with ExitStack() as stack:
        file = binary_file(source, label, stack)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(HEAD)
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            return _riff_fault(file, size)
        if head[:4] == b"fLaC" and _occurs_again(file, size, head[:8]):
            return HeaderFault("it is several files joined into one, and the first alone is read")
        if head[:4] == MARK:
            return OGG_FAULTS.get(inspect_ogg(file))
        promised = _mp3_seconds(head) if b"Xing" in head or b"Info" in head else None
        promised = promised or _av_seconds(source, label, stack)
    return _shorter(promised, seconds) if promised else None


def _shorter(promised: float, seconds: float) -> HeaderFault | None:
    if seconds >= promised - max(TOLERANCE, promised / 100):
        return None
    return HeaderFault(f"its header promises {promised:.2f} s, and it ends after {seconds:.2f} s: it was cut short")


def _riff_fault(file: BinaryIO, size: int) -> HeaderFault | None:
    """Compares the `data` chunk of a WAV file with the file's size."""
    place, bytes_per_second, blocks = 12, 0, 1
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"fmt " and length >= 16:
            _, _, _, bytes_per_second, blocks, _ = struct.unpack("<HHIIHH", file.read(16))
        if name == b"data":
            break
        place += 8 + length + length % 2
    else:
        return None
    if not bytes_per_second or length == 0 or length >= UNKNOWN:
        return None
    there = size - place - 8
    if there < length - blocks:
        return _shorter(length / bytes_per_second, there / bytes_per_second)
    rest = there - length - length % 2
    if rest >= bytes_per_second * TOLERANCE and not _chunk_follows(file, place + 8 + length + length % 2, rest):
        return HeaderFault(f"{rest / bytes_per_second:.2f} s follow what its header calls its end, and are not read")
    return None


def _chunk_follows(file: BinaryIO, place: int, rest: int) -> bool:
    file.seek(place)
    name, length = struct.unpack("<4sI", file.read(8))
    return bool(name != b"RIFF" and all(32 <= letter < 127 for letter in name) and length <= rest)


def _occurs_again(file: BinaryIO, size: int, mark: bytes) -> bool:
    """Whether a file's first bytes occur in it again."""
    try:
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
            return content.find(mark, len(mark)) > 0
    except (OSError, ValueError):  # in memory
        file.seek(0)
        return file.read().find(mark, len(mark)) > 0


def _mp3_seconds(head: bytes) -> float | None:
    """Length from the Xing or Info header in an MP3's first frame; joined files are longer, which is not an error."""
    mark = max(head.find(b"Xing"), head.find(b"Info"))
    for depth in (36, 21, 13):  # bytes from the frame's header to the mark: by version and channels
        start = mark - depth
        frame = head[start : start + 4]
        if start < 0 or len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2 or frame[2] & 0x0C == 0x0C:
            continue
        version = frame[1] >> 3 & 3  # 3: MPEG 1; 2: MPEG 2; 0: MPEG 2.5
        rate = (44100, 48000, 32000)[frame[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}.get(version, 0)
        flags, frames = struct.unpack(">II", head[mark + 4 : mark + 12].ljust(8, b"\0"))
        return frames * (1152 if version == 3 else 576) / rate if flags & 1 else None
    return None


def _av_seconds(source: AudioSource, label: str, stack: ExitStack) -> float | None:
    try:
        container = stack.enter_context(av.open(binary_file(source, label, stack), options=AV_OPTIONS))
        if container.format.name not in PROMISING or not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        alone = container.duration is not None and len(container.streams) == 1
        return container.duration / av.time_base if alone else None
    except AV_ERRORS:
        return None


def guess_seconds(path: Path) -> float:
    """A quick estimate of a file's length from its header, for a progress bar; 0 if only decoding gives the length."""
    if not path.is_file():
        return 0.0
    with path.open("rb") as file:
        head = file.read(4)
    if head in (b"RIFF", b"fLaC"):
        with suppress(soundfile.LibsndfileError):
            info = soundfile.info(os.fsencode(path))
            return float(info.frames / info.samplerate) if info.frames < 2**48 else 0.0
    with suppress(*AV_ERRORS), path.open("rb") as file, av.open(file, options=AV_OPTIONS) as container:
        return float(container.duration or 0) / float(av.time_base)
    return 0.0
