"""The recordings given on a command line: files, folders, pipes and standard input."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.data.audio import SAMPLE_RATE, Samples, read_audio
from common.data.decoders import check_regular
from common.data.headers import header_fault
from common.errors import DataError, UsageError

if TYPE_CHECKING:
    from common.inference.transcribe import WindowTranscript

# Endings of the files that are taken of a folder; a file that is named itself may have any.
ENDINGS = (
    "3gp aac ac3 aif aifc aiff amr ape asf au avi caf dss flac flv m4a m4b m4v mka mkv mov mp2 mp3 mp4 mpeg mpg mpga "
    "nist oga ogg ogv opus ra rf64 rm snd sph spx tta voc w64 wav wave webm wma wmv wv"
)
SUFFIXES = frozenset(f".{ending}" for ending in ENDINGS.split(" "))
STDIN = Path("-")
MOST_SPOOLED = 4 * 2**30  # bytes of a pipe; what is longer should be a file
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording.

    Attributes:
        path: its file; `-` is standard input.
        name: its name for messages, printable for any bytes.
        stem: the path of its transcripts relative to their folder, without suffix.
    """

    path: Path
    name: str
    stem: Path


def printable(path: Path) -> str:
    """A printable form of a path: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_recordings(paths: Iterable[Path]) -> list[Recording]:
    """The recordings given on a command line; those of a folder are sorted by path.

    Raises:
        UsageError: a folder contains no recordings.
    """
    recordings: list[Recording] = []
    for path in paths:
        if path != STDIN and path.is_dir():
            recordings += _in_folder(path)
        elif path == STDIN:
            recordings.append(Recording(path, "standard input", Path("stdin")))
        else:
            recordings.append(Recording(path, printable(path), Path(path.stem)))
    return recordings


def _in_folder(folder: Path) -> list[Recording]:
    recordings = [
        Recording(path, printable(path), path.relative_to(folder).with_suffix(""))
        for path in sorted(_visible_files(folder))
        if path.suffix.lower() in SUFFIXES
    ]
    if not recordings:
        raise UsageError(f"{printable(folder)} contains no recording: name the files themselves, whatever their ending")
    return recordings


def _visible_files(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, without names that begin with a dot, which belong to other programs
    (`._take.wav`).
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file())


def check_recording(recording: Recording) -> None:
    """Refuses a recording that cannot be opened, without opening a pipe.

    Raises:
        DataError: the file is missing, empty or not readable, or is a device or a terminal.
    """
    if recording.path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise DataError("standard input is a terminal: pipe a recording into it")
    elif not _is_pipe(recording.path):
        check_regular(recording.path, recording.name)


@contextmanager
def opened_recording(recording: Recording) -> Iterator[Path | BinaryIO]:
    """A source for decoding: the path of a file, or a temporary copy of a pipe, which can be read only once.

    Raises:
        DataError: a pipe gives no data or too much.
    """
    if recording.path != STDIN and not _is_pipe(recording.path):
        yield recording.path
        return
    with tempfile.TemporaryFile(prefix="moe-asr-") as spooled:
        if recording.path == STDIN:
            _copy(sys.stdin.buffer, spooled, recording.name)
        else:
            with recording.path.open("rb") as pipe:
                _copy(pipe, spooled, recording.name)
        yield spooled


def _is_pipe(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _copy(source: BinaryIO, target: BinaryIO, name: str) -> None:
    left = MOST_SPOOLED
    while block := source.read(min(BLOCK, left + 1)):
        left -= len(block)
        if left < 0:
            raise DataError(f"{name} is larger than {MOST_SPOOLED // 2**30} GiB: save it as a file")
        target.write(block)
    if left == MOST_SPOOLED:
        raise DataError(f"{name} is empty (0 bytes)")
    target.seek(0)


@dataclass
class LoadedRecording:
    """A recording's audio, and messages about it."""

    recording: Recording
    samples: Samples
    notes: list[str] = field(default_factory=list)

    def treated(
        self, windows: Sequence[WindowTranscript], loops: str, no_speech: float | None, language: str
    ) -> list[WindowTranscript]:
        """The windows after treatment of loops and removal of improbable texts of silence; each change is noted.

        Args:
            loops: `cut` leaves one repetition, `drop` drops the window's text, `keep` changes nothing.
            no_speech: probability of no speech above which an improbable text is omitted; None omits nothing.
            language: language of the texts.
        """
        # Imported after the check of paths, since it imports torch.
        from common.inference.transcribe import without_loop

        kept = []
        for window in windows:
            span = f"{window.window.begins:.1f} to {window.window.ends:.1f} s"
            if window.decoded.of_silence(no_speech):
                self.notes.append(f"{span}: probably no speech; its text is omitted")
                continue
            if window.loop:
                done = {"cut": "cut", "drop": "omitted", "keep": "kept"}[loops]
                self.notes.append(f"{span}: a phrase in a loop, {done}")
            if window.loop and loops == "drop":
                continue
            kept.append(without_loop(window, language) if loops == "cut" else window)
        return kept


def load_groups(
    recordings: Iterable[Recording], faults: dict[str, str], seconds: float
) -> Iterator[list[LoadedRecording]]:
    """The recordings' audio, in groups that are large enough to fill batches.

    Args:
        faults: dictionary to which the reason for each unreadable recording is added, by name.
        seconds: seconds of audio after which a group ends.
    """
    group: list[LoadedRecording] = []
    for recording in recordings:
        notes: list[str] = []
        try:
            with opened_recording(recording) as source:
                samples = read_audio(source, name=recording.name, on_damage=notes.append)
                if fault := header_fault(source, recording.name, len(samples) / SAMPLE_RATE):
                    notes.append(fault.detail)
        except DataError as error:
            faults[recording.name] = str(error)
            continue
        group.append(LoadedRecording(recording, samples, notes))
        if sum(len(loaded.samples) for loaded in group) >= seconds * SAMPLE_RATE:
            yield group
            group = []
    if group:
        yield group
