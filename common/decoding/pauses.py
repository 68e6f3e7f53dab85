"""Finds pauses by loudness, and windows of at most 30 s that are cut at pauses.

Shape letters: S samples, N frames of 10 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.audio import SAMPLE_RATE, Samples
from common.whisper_limits import MAX_SECONDS

FRAME = SAMPLE_RATE // 100  # samples: 10 ms
BLOCK = 6000 * FRAME  # samples that are processed at once: one minute
EMPHASIS = 0.97  # of the sample before, that is subtracted
SMOOTH = 3  # frames whose power is averaged
QUIET_SHARE = 0.3  # of the way from the room's loudness to the voice's, in dB: below is a pause
LEAST_RANGE = 6.0  # dB between them: a signal with less is the same everywhere
MOST_RANGE = 60.0  # dB: digital silence counts as a room this quiet
SHORTEST = 0.12  # s: the closure of a plosive is no pause
SILENCE_DB = -70.0  # of full scale: nothing is louder in a silent recording
EARLIEST = 0.4  # of the longest window: where its cut may be at the earliest
LONG_ENOUGH = 0.6  # s of pause: among such, the latest is taken
OVERLAP = 5.0  # s that windows share where no pause is between them
EDGE = 0.3  # s of a skipped silence that are kept next to speech


@dataclass(frozen=True, slots=True)
class Stretch:
    """From `start` to `end`, in seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end - self.start

    @property
    def middle(self) -> float:
        """The middle of the stretch, in seconds."""
        return (self.start + self.end) / 2


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of audio that the model processes at once.

    Attributes:
        start, end: seconds; the window may begin before `begins` and end after `ends` if no pause is near.
        begins, ends: the part whose words are taken from this window; these parts do not overlap.
        paused: it ends in a pause, or with the audio.
    """

    start: float
    end: float
    begins: float
    ends: float
    paused: bool


def loudness(samples: Samples) -> Samples:
    """dB of full scale of each 10 ms, smoothed over 30 ms. level_N.

    Pre-emphasis attenuates hum and rumble, and amplifies fricatives.
    """
    power_N = np.concatenate([_power(samples, start) for start in range(0, max(1, len(samples)), BLOCK)])
    smooth_N = np.convolve(power_N, np.ones(SMOOTH) / SMOOTH, mode="same")
    return np.asarray(10 * np.log10(np.maximum(smooth_N, 1e-12)), np.float32)


def _power(samples: Samples, start: int) -> Samples:
    """Mean squares of the frames of one block; computing a long recording at once would need three times its memory."""
    before = samples[start - 1 : start] if start else np.zeros(1, np.float32)
    block = samples[start : start + BLOCK]
    frames = max(1, -(-len(block) // FRAME))
    padded = np.zeros(frames * FRAME, np.float32)
    padded[: len(block)] = block
    padded[: len(block)] -= EMPHASIS * np.concatenate([before, block[:-1]])[: len(block)]
    return np.asarray(np.square(padded).reshape(frames, FRAME).mean(1), np.float32)


def is_silent(level_N: Samples) -> bool:
    """Whether the audio is silent."""
    return bool(level_N.max() < SILENCE_DB)


def find_pauses(level_N: Samples) -> list[Stretch]:
    """Stretches well below the voice's loudness, in order; those at the ends included.

    The threshold is relative to the loudest and the quietest frames of the recording (5th and 95th percentile of the
    frames that are not digital silence), so that it depends neither on gain nor on the noise of the room.
    """
    if is_silent(level_N):
        return [Stretch(0, len(level_N) / 100)]
    voice = float(np.percentile(level_N[level_N > SILENCE_DB], 95))
    room = max(float(np.percentile(level_N, 5)), voice - MOST_RANGE)
    if voice - room < LEAST_RANGE:
        return []
    quiet_N = np.concatenate([[False], level_N < room + QUIET_SHARE * (voice - room), [False]])
    edges = np.flatnonzero(quiet_N[1:] != quiet_N[:-1]).reshape(-1, 2)
    return [Stretch(first / 100, last / 100) for first, last in edges.tolist() if (last - first) / 100 >= SHORTEST]


def plan_windows(
    level_N: Samples,
    pauses: Sequence[Stretch],
    seconds: float,
    *,
    longest: float = MAX_SECONDS,
    overlap: float = OVERLAP,
) -> list[Window]:
    """Windows of at most `longest` seconds over the whole audio, cut at pauses if possible.

    Args:
        pauses: from `find_pauses`.
        overlap: seconds that two windows share if there is no pause between them; words are then divided at the
            quietest moment of the shared part. 0: the windows are cut at the quietest moment.

    Returns:
        One window if the audio is not longer than `longest`. In longer audio, long silence is omitted.
    """
    if seconds <= longest:
        return [Window(0, seconds, 0, seconds, True)]
    windows: list[Window] = []
    start = begins = 0.0
    while begins < seconds - 0.01:
        silence = next((p for p in pauses if p.start <= begins + 0.01 and p.end > begins + 2 * EDGE), None)
        if silence is not None:  # only silence before its end
            if silence.end >= seconds - 0.01:
                break
            start = begins = max(begins, silence.end - EDGE)
        if seconds - start <= longest:
            windows.append(Window(start, seconds, begins, seconds, True))
            break
        cut = _best_cut(pauses, max(start + EARLIEST * longest, begins + overlap), start + longest)
        if cut is not None:
            windows.append(Window(start, cut, begins, cut, True))
            start = begins = cut
            continue
        end = start + longest
        meeting = _quietest(level_N, end - (overlap or longest / 2), end - overlap / 5)
        windows.append(Window(start, end if overlap else meeting, begins, meeting, False))
        start, begins = (end - overlap if overlap else meeting), meeting
    return windows


def _best_cut(pauses: Sequence[Stretch], earliest: float, latest: float) -> float | None:
    """The middle of the latest long pause, or otherwise of the longest pause, between two times."""
    fitting = [p for p in pauses if earliest <= p.middle <= latest]
    long_ones = [p for p in fitting if p.seconds >= LONG_ENOUGH]
    if long_ones:
        return long_ones[-1].middle
    return max(fitting, key=lambda p: (p.seconds, p.start)).middle if fitting else None


def _quietest(level_N: Samples, start: float, end: float) -> float:
    """The quietest moment between two times, in seconds."""
    first, last = int(start * 100), max(int(start * 100) + 1, int(end * 100))
    return (first + int(level_N[first:last].argmin()) + 0.5) / 100
