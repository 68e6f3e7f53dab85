"""Windows: at most 30 s, cut in pauses, nothing said is omitted."""

import itertools

import numpy as np
import pytest

from common.decoding.pauses import find_pauses, is_silent, loudness, plan_windows

RATE = 16_000


def speech(pattern, *, noise=0.0, gain=0.3, seed=0):
    """(samples, pauses) of stretches (seconds of voice, seconds of pause)."""
    generator = np.random.default_rng(seed)
    parts, pauses, time = [], [], 0.0
    for voiced, paused in pattern:
        parts += [gain * generator.standard_normal(int(voiced * RATE)), np.zeros(int(paused * RATE))]
        pauses.append((time + voiced, time + voiced + paused))
        time += voiced + paused
    samples = np.concatenate(parts)
    return (samples + noise * generator.standard_normal(len(samples))).astype(np.float32), pauses


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("gain", [0.5, 0.2])
def test_pauses_are_found_whatever_room_and_gain(noise, gain):
    samples, expected = speech([(2.0, 0.5), (1.0, 0.3), (3.0, 0.8)], noise=noise * gain, gain=gain)
    pauses = find_pauses(loudness(samples))
    assert [(p.start, p.end) for p in pauses] == [pytest.approx(pause, abs=0.03) for pause in expected]


def test_what_is_as_loud_all_the_time_has_no_pause():
    samples, _ = speech([(5.0, 0.0)])
    assert find_pauses(loudness(samples)) == []


def test_silence_is_known():
    level_N = loudness(np.zeros(RATE, np.float32))
    assert is_silent(level_N)
    assert find_pauses(level_N)[0].seconds == pytest.approx(1.0)
    assert not is_silent(loudness(speech([(1.0, 0.0)], gain=0.01)[0]))


def plan(samples, **options):
    level_N = loudness(samples)
    return plan_windows(level_N, find_pauses(level_N), len(samples) / RATE, **options)


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_cut_in_pauses_and_leave_nothing_out(seed):
    generator = np.random.default_rng(seed)
    samples, pauses = speech([(generator.uniform(1, 9), generator.uniform(0.2, 1.0)) for _ in range(30)], seed=seed)
    windows = plan(samples)
    assert windows[0].start == 0
    assert windows[-1].end == len(samples) / RATE
    for window, following in itertools.pairwise(windows):
        assert window.end == window.ends == following.start == following.begins
        assert any(start <= window.end <= end for start, end in pauses)
    assert all(0 < window.end - window.start <= 30 for window in windows)


def test_up_to_30_seconds_are_one_window_with_their_silence():
    samples, _ = speech([(2.0, 20.0), (2.0, 5.9)])
    assert [(w.start, w.end) for w in plan(samples)] == [(0, len(samples) / RATE)]


def test_long_silence_is_left_out_of_long_audio():
    samples, _ = speech([(5.0, 100.0), (5.0, 0.0)])
    windows = plan(samples)
    assert sum(w.end - w.start for w in windows) < 40
    assert windows[-1].begins == pytest.approx(104.7, abs=0.1)
    assert plan(np.zeros(60 * RATE, np.float32)) == []


def test_without_a_pause_windows_overlap_and_share_the_work():
    samples, _ = speech([(70.0, 0.0)])
    windows = plan(samples)
    for window, following in itertools.pairwise(windows):
        assert following.start < window.ends == following.begins < window.end
        assert not window.paused
    hard = plan(samples, overlap=0)
    assert [w.start for w in hard[1:]] == [w.end for w in hard[:-1]]
    assert all(w.end - w.start <= 30 for w in windows + hard)
