"""Progress where there is no terminal: few lines, with how much, how fast and how long still."""

import pytest

from common.progress import EVERY, FIRST, Lines, clock, counted, progress


class Clock:
    """A clock that goes on by hand."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def test_a_line_says_how_much_how_fast_and_how_long_still(capsys):
    now = Clock()
    bar = Lines(400, 100, "asr", "steps", now=now)
    now.time = 20.0
    bar.set_postfix(refresh=False, loss="1.500")
    bar.update(40)
    assert capsys.readouterr().err == "asr: 140 of 400 steps (35%), 2/s, 2 min 10 s left, loss 1.500\n"


def test_lines_come_seldom_whatever_the_number_of_updates(capsys):
    now = Clock()
    bar = Lines(10_000, 0, "asr", "", now=now)
    for _ in range(10_000):
        now.time += 0.1
        bar.update()
    bar.close()
    seconds = 10_000 * 0.1
    assert 2 <= len(capsys.readouterr().err.splitlines()) <= 2 + (seconds - FIRST) / EVERY + 1


def test_what_is_soon_done_says_nothing(capsys):
    assert list(counted([1, 2, 3], 3, "quick")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_hidden_progress_says_nothing(capsys):
    bar = progress(3, "hidden", hidden=True)
    bar.update()
    bar.set_postfix(loss=1)
    bar.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.4, "59 s"), (131, "2 min 11 s"), (7_300, "2 h 1 min"), (90_000, "1 d 1 h")],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, text):
    assert clock(seconds) == text
