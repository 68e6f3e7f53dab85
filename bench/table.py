"""Tables of measurements, in Markdown: `bench.run` prints one, docs/performance.md has those of bench/results."""

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
    rows = _summary(results)
    rates = {row["regime"]: row["wer"] for row in rows if row["corpus"] == "bench" and row["steps"] == 384}
    return f"WER of LoRA after 384 steps {rates['dense-plain']:.1%} against {rates['peft']:.1%}"


def regime_rows(corpus: str, budgets: Sequence[int], results: Path = RESULTS / "regimes.json") -> list[str]:
    """One line per regime on one corpus with these numbers of steps, in %. Rows of an earlier recipe have no difference
    from regimes of today's.
    """
    rows = _summary(results)
    rows = [row for steps in budgets for row in rows if (row["corpus"], row["steps"]) == (corpus, steps)]
    rows = [row for row in rows if row["regime"] != "base"] + [row for row in rows if row["regime"] == "base"][:1]
    rates = ("dev WER", "test WER", "of seeds", "minus `dense`", "minus `dense-plain`", "worst group", "unseen group")
    return _table(("regime", "steps", "seeds", *rates), map(_regime, rows))


def _regime(row: dict[str, Any]) -> tuple[str, ...]:
    name, _, label = row["regime"].partition(", ")
    note = label or ("the default" if row["default"] else "")
    shown = f"`{name}`, {note}" if note else f"`{name}`"
    base = name == "base"
    minus = () if base or label.startswith("earlier") else (row["minus_dense"], row["minus_dense-plain"])
    unseen = _difference(row["unseen_minus_dense"]) if minus else ""
    return (
        shown,
        "" if base else f"{row['steps']:,}",
        "" if base else str(row["seeds"]),
        _percent(row["wer_dev"]),
        f"{_percent(row['wer'])} ({_percent(row['wer_interval'][0])} to {_percent(row['wer_interval'][1])})",
        ", ".join(map(_percent, row["wer_of_seeds"])),
        *(map(_difference, minus) if minus else ("", "")),
        f"{row['worst_group_name']} {_percent(row['worst_group'])}",
        "; ".join(filter(None, (_percent(row["wer_unseen"]), unseen))),
    )


def extension_rows(new: str, results: Path = RESULTS / "extend.json") -> list[str]:
    """WER of new speech by method and number of utterances, with the difference from tuning all adapter weights."""
    rows = [row for row in _summary(results) if row["new"] == new]
    counts, seeds = sorted({row["utterances"] for row in rows}), {row["rows"] for row in rows}
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(row["way"], {})[row["utterances"]] = _with_difference(row)
    lines = [(WAYS[way], *(cells[way].get(count, "") for count in counts)) for way in WAYS if way in cells]
    return _table((f"method, seeds: {'/'.join(map(str, sorted(seeds)))}", *(f"{count:,}" for count in counts)), lines)


def extension_costs(utterances: int = 36, results: Path = RESULTS / "extend.json") -> list[str]:
    """What each method does to the trained groups, and what it stores, at one number of utterances."""
    rows = {row["way"]: row for row in _summary(results) if row["utterances"] == utterances}
    lines = []
    for way in (way for way in WAYS if way in rows):
        rates = (_percent(rows[way][key]) for key in ("new_wer", "others_before", "others_after"))
        lines.append((WAYS[way], *rates, f"{rows[way]['bytes']:,.0f}", f"{rows[way]['seconds']:.0f}"))
    return _table(("method", "new group", "trained groups before", "after", "bytes stored", "seconds"), lines)


def person_rows(results: Path = RESULTS / "extend.json") -> list[str]:
    """WER of single persons by method, of the unseen group and of trained groups."""
    rows = [row for row in _summary(results) if not row["utterances"]]
    kinds = sorted({row["new"] for row in rows}, reverse=True)
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["way"], {})[row["new"]] = _with_difference(row)
    lines = [(WAYS[way], *(cells[way].get(kind, "") for kind in kinds)) for way in WAYS if way in cells]
    return _table(("method", *kinds), lines)


def group_rows(results: Path = RESULTS / "extend.json") -> list[str]:
    """How many speakers' groups `choose` finds, by model and number of utterances; one figure for each seed."""
    found: dict[str, dict[int, list[str]]] = {}
    for row in json.loads(results.read_text(encoding="utf-8"))["groups"]:
        found.setdefault(row["model"], {}).setdefault(row["utterances"], []).append(str(row["right"]))
    lines = [(model, *(", ".join(counts.get(count, ())) for count in (5, 10))) for model, counts in found.items()]
    return _table(("model", "of 60, from 5 utterances", "from up to 10"), lines)


WAYS = {
    "as it is": "unchanged",
    "choose": "`choose`",
    "gates": "`gates`",
    "expert": "`expert`",
    "neighbour": "`neighbour`",
    "shared": "`shared`",
    "tuned": "all adapter weights tuned, 3e-4",
    "replay": "the same with three times as much old speech",
    "fresh": "a fresh LoRA of rank 48 from Whisper, 1e-3",
    "full": "all weights of Whisper, 1e-4",
}


def _summary(results: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))["summary"]
    return rows


def _with_difference(row: dict[str, Any]) -> str:
    return "; ".join(filter(None, (_percent(row["new_wer"]), _difference(row["minus_tuned"]))))


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


def _difference(minus: dict[str, float] | None) -> str:
    if minus is None:
        return ""
    delta, low, high = (f"{100 * minus[key]:+.1f}".replace("-", "−") for key in ("delta", "low", "high"))
    return f"{delta} ({low} to {high})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None) -> str:
    """Three figures, thousands apart; a dash for nothing."""
    if value is None:
        return "–"
    if value >= 1000:
        return f"{round(value, -(len(str(int(value))) - 3)):,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
