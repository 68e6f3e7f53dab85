"""Figures of the hostile inputs, printed at the end of a test run."""

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


def pytest_terminal_summary(terminalreporter) -> None:
    """One line per test of this folder; it works from any process of a parallel run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    figures = [(report.nodeid, dict(report.user_properties)) for report in reports if report.when == "call"]
    rows = [(name, found["tried"], found["lost"]) for name, found in figures if "tried" in found]
    if rows:
        terminalreporter.section("hostile inputs")
        for name, tried, lost in sorted(rows):
            terminalreporter.write_line(f"{tried:>6,} tried {lost:>4,} lost  {name}")
