"""What is printed after the hostile tests; tests/conftest.py takes it in, as xdist's first process reads no other."""

from __future__ import annotations

import os

SEEDS = int(os.environ.get("MOE_ASR_FUZZ_SEEDS", "200"))  # of each fuzzed format; more take longer and find more


def pytest_terminal_summary(terminalreporter) -> None:
    """One line per test function: inputs tried and lost, added up over its parameters."""
    sums: dict[str, list[int]] = {}
    for report in (report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())):
        properties = dict(report.user_properties)
        if report.when == "call" and "tried" in properties:
            total = sums.setdefault(report.nodeid.partition("[")[0], [0, 0])
            total[:] = total[0] + properties["tried"], total[1] + properties["lost"]
    if sums:
        terminalreporter.section("hostile inputs")
        for name, (tried, lost) in sorted(sums.items()):
            terminalreporter.write_line(f"{tried:>7,} tried {lost:>4,} lost  {name}")
