"""Tables of measurements, in Markdown: `bench.run` prints one, docs/performance.md has those of bench/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def full_table() -> list[str]:
    """One line per row of every file in bench/results: ours, the other, how many times better, wanted, settings."""
    return _by_device(rows_table, lambda group: group != "options")


def options_table() -> list[str]:
    """What each option of training does to a step."""
    return _by_device(_options, lambda group: group == "options")


def rows_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per row: ours, the other, how many times better, wanted, settings."""
    header = ("measured", "ours", "the other", "unit", "better by", "wanted", "settings")
    return _table(header, map(_full, rows))


def _options(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ("option", "with it", "without", "unit", "ratio", "settings")
    return _table(header, ((*_short(row), _settings(row)) for row in rows))


def _by_device(
    table: Callable[[Sequence[dict[str, Any]]], list[str]], wanted: Callable[[str | None], bool]
) -> list[str]:
    """A table for each file of results, with the rows of the groups that are wanted."""
    lines = []
    for file in sorted(RESULTS.glob("*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        if not {"rows", "versions"} <= results.keys():  # rows without a comparison with a peer are on a separate page
            continue
        rows = [row for row in results["rows"] if wanted(row.get("group"))]
        if not rows:
            continue
        versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        lines += [f"On {results['device']} ({versions}):", "", *table(rows), ""]
    return lines[:-1]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, rows)]


def _short(row: dict[str, Any]) -> tuple[str, ...]:
    return row["row"], number(row["ours"]), number(row["peer"]), row["unit"], f"{number(row['ratio'])}×"


def _full(row: dict[str, Any]) -> tuple[str, ...]:
    wanted = f"{number(row['target'])}×" if row["target"] else ""
    return *_short(row), wanted, _settings(row)


def _settings(row: dict[str, Any]) -> str:
    """The row's note, and the word error rates that its two audio contexts lead to."""
    return f"{row['note']}; {context_rates()}" if row.get("trains_short") else str(row["note"])


def context_rates(results: Path = RESULTS / "regimes.json") -> str:
    """Error rates of plain LoRA trained and used with the dynamic audio context, and with 30 s by the peer."""
    rows = json.loads(results.read_text(encoding="utf-8"))["summary"]
    rates = {row["regime"]: row["wer"] for row in rows if row["corpus"] == "bench" and row["steps"] == 384}
    return f"WER of LoRA after 384 steps {rates['dense-plain']:.1%} against {rates['peft']:.1%}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None) -> str:
    """Three figures, thousands apart; a dash for nothing."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{round(value, -(len(str(int(value))) - 3)):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
