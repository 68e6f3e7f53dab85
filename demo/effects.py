"""Signal effects that make plain synthetic speech sound breathy, tremulous, muffled, slurred or halting.

Each takes mono samples (T,) at 16 kHz, a random generator and one strength, and gives mono samples, float32. Shape
letters: T samples, F frames, N frequencies.
"""

import numpy as np

from common.data.audio import SAMPLE_RATE, Samples

_WINDOW, _HOP = 512, 128  # samples, of the short-time spectrum


def add_breath(samples_T: Samples, rng: np.random.Generator, level: float) -> Samples:
    """Noise that follows the voice's loudness, over a quiet noise floor.

    Args:
        level: of the noise against the voice, 1 being as loud.
    """
    noise_T = np.diff(rng.standard_normal(len(samples_T)), prepend=0.0) / np.sqrt(2)  # more of the high frequencies
    floor = 0.1 * np.sqrt(np.mean(samples_T**2))
    return np.asarray(samples_T + noise_T * (level * _loudness(samples_T, 0.06) + floor), np.float32)


def add_tremor(samples_T: Samples, rng: np.random.Generator, strength: float) -> Samples:
    """Loudness and pitch that waver 4 to 7 times a second.

    Args:
        strength: from 1 on it wavers between silence and full loudness.
    """
    seconds_T = np.arange(len(samples_T)) / SAMPLE_RATE
    phase_T = 2 * np.pi * (rng.uniform(4, 7) * seconds_T + rng.uniform())
    delayed_T = np.interp(seconds_T + 0.0008 * strength * np.sin(phase_T), seconds_T, samples_T)
    return (delayed_T * (1 - min(strength, 1) * (0.5 + 0.5 * np.cos(phase_T)))).astype(np.float32)


def add_room(samples_T: Samples, rng: np.random.Generator, level_db: float) -> Samples:
    """The hiss of a room and a cheap microphone: without it, whatever an effect damps could be amplified again.

    Args:
        level_db: of the noise against the voice.
    """
    noise_T = rng.standard_normal(len(samples_T)) * np.sqrt(np.mean(samples_T**2)) * 10 ** (level_db / 20)
    return np.asarray(samples_T + noise_T, np.float32)


def muffle(samples_T: Samples, rng: np.random.Generator, cutoff: float) -> Samples:
    """Low-pass of fourth order.

    Args:
        cutoff: Hz.
    """
    frequencies_N = np.fft.rfftfreq(len(samples_T), 1 / SAMPLE_RATE)
    gains_N = 1 / np.sqrt(1 + (frequencies_N / cutoff) ** 8)
    return np.fft.irfft(np.fft.rfft(samples_T) * gains_N, len(samples_T)).astype(np.float32)


def smear(samples_T: Samples, rng: np.random.Generator, seconds: float) -> Samples:
    """Sounds that run into each other: the short-time spectrum's magnitudes averaged over a time, phases kept.

    Args:
        seconds: the length of the average.
    """
    window = np.hanning(_WINDOW + 1)[:-1]
    padded = np.pad(samples_T, (_WINDOW, 2 * _WINDOW))
    frames_FN = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP] * window)
    magnitudes_FN = np.abs(frames_FN)
    width = max(1, round(seconds * SAMPLE_RATE / _HOP))
    sums_FN = np.cumsum(np.pad(magnitudes_FN, ((width - width // 2, width // 2), (0, 0))), axis=0)
    smooth_FN = (sums_FN[width:] - sums_FN[:-width]) / width
    pieces = np.fft.irfft(frames_FN / np.maximum(magnitudes_FN, 1e-8) * smooth_FN, _WINDOW) * window
    out = np.zeros(len(padded))
    for frame, piece in enumerate(pieces):
        out[frame * _HOP : frame * _HOP + _WINDOW] += piece
    return out[_WINDOW : _WINDOW + len(samples_T)].astype(np.float32)


def repeat_syllables(samples_T: Samples, rng: np.random.Generator, interval: float) -> Samples:
    """Pauses, each after a syllable that is begun once or twice before it is said.

    Args:
        interval: mean seconds of speech between them.
    """
    loudness_T = _loudness(samples_T, 0.02)
    search = round(0.15 * SAMPLE_RATE)
    parts: list[Samples] = []
    position = 0
    while True:
        earliest = position + round(interval * rng.uniform(0.6, 1.4) * SAMPLE_RATE)
        if earliest + search + SAMPLE_RATE // 5 >= len(samples_T):
            return np.concatenate([*parts, samples_T[position:]]).astype(np.float32)
        start = earliest + int(np.argmin(loudness_T[earliest : earliest + search]))
        parts.append(samples_T[position:start])
        begun_T = _fade(samples_T[start : start + round(rng.uniform(0.1, 0.2) * SAMPLE_RATE)])
        for _ in range(rng.integers(1, 3)):
            parts += [begun_T, np.zeros(round(rng.uniform(0.1, 0.3) * SAMPLE_RATE), np.float32)]
        position = start


def _loudness(samples_T: Samples, seconds: float) -> Samples:
    """Root mean square over a sliding window."""
    width = round(seconds * SAMPLE_RATE)
    powers_T = np.convolve(samples_T**2, np.full(width, 1 / width), "same")
    return np.sqrt(np.maximum(powers_T, 0)).astype(np.float32)


def _fade(samples_T: Samples) -> Samples:
    ramp = np.minimum(1, np.arange(len(samples_T)) / 200)
    return (samples_T * ramp * ramp[::-1]).astype(np.float32)
