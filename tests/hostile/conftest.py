"""Figures of the hostile inputs; `tests/hostile/figures.py` prints them at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def tally(record_property) -> Callable[[int, int], None]:
    """Notes how many inputs a test tried and how many of them did harm; a test that has lost one fails."""

    def note(tried: int, lost: int = 0) -> None:
        record_property("tried", tried)
        record_property("lost", lost)
        assert tried and not lost, f"{lost} of {tried} lost"

    return note
