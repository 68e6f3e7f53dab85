"""Counts of hostile inputs, printed after all tests: `tried` and how many were `lost` (no clear error, or too late)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

Report = Callable[[str, int, int], None]
SEEDS = int(os.environ.get("MOE_ASR_FUZZ_SEEDS", "200"))  # of each fuzzed format; more take longer and find more


@pytest.fixture
def figures(record_property) -> Report:
    """A function that notes what was attacked, how many inputs were tried and how many lost; none may be."""

    def note(name: str, tried: int, lost: int) -> None:
        record_property("hostile", (name, tried, lost))
        assert tried and not lost, f"{name}: {lost} of {tried} inputs were lost"

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints what the fixture noted, in this process or in those of xdist, added up by name."""
    sums: dict[str, list[int]] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "call":
            for name, tried, lost in (value for key, value in report.user_properties if key == "hostile"):
                one = sums.setdefault(name, [0, 0])
                one[:] = one[0] + tried, one[1] + lost
    if sums:
        terminalreporter.section("hostile inputs: tried, lost")
        for name, (tried, lost) in sorted(sums.items()):
            terminalreporter.write_line(f"{name:50} {tried:7} {lost:5}")
