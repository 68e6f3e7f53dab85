"""The parts of a report that come from error rates: the result, its breakdowns, and the worst utterances.

As in `summary.json`, an utterance's errors are counted up to its number of words unless the text says unclipped.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from common.evaluation.breakdown import CELL, GROUPS, scored_reference, speakers_of
from common.evaluation.wer import Score, paired_bootstrap, wer
from common.json_files import Row, read_rows
from common.report.page import is_number, points

WORST = 25
INSERTED_WORDS = 16
TABLE_ROWS = 50
FEW_SPEAKERS = 20  # below, intervals from resampling speakers are too narrow
RATES = ("wer_before", "wer_after", "cer_before", "cer_after", "wer_before_unclipped", "wer_after_unclipped",
         "wer_interval_before", "wer_interval_after", "utterances", "speakers", "loops_before",
         "loops_after")  # fmt: skip

Step = tuple[str, str, str]  # kind, words of the reference, words of the hypothesis


def scored_rows(asr: Path) -> list[Row]:
    """The rows of predictions.jsonl that the summary describes: those of the test split, if there is one."""
    rows = read_rows(asr / "predictions.jsonl")
    return [row for row in rows if row.get("split") == "test"] or rows


def result_section(summary: Row, rows: Sequence[Row]) -> Row | str:
    """The main result: rates before and after, and whether the difference is significant."""
    before, after, speakers = summary.get("wer_before"), summary.get("wer_after"), summary.get("speakers")
    if not is_number(after):
        return "Result: the run has no error rate yet; the asr stage measures it."
    named = not rows or any(row.get("speaker") for row in rows)
    bounds = difference_interval(rows) if is_number(before) and speakers != 1 else None
    groups = summary.get("by_etiology") or {}
    return {
        "verdict": _verdict(before, after, bounds),
        "bounds": bounds,
        "relative": (after - before) / before if before else None,
        "caution": caution(speakers, named, "tested" if summary.get("speakers_in_train") else "held out"),
        "in_train": summary.get("speakers_in_train") or 0,
        "audio_context": summary.get("audio_context"),
        "unclipped_rose": is_number(before) and after <= before and _unclipped_rose(summary),
        "worse": [name for name, row in groups.items() if row["wer_after"] > row.get("wer_before", math.inf)],
    } | {key: summary.get(key) for key in RATES}


def difference_interval(rows: Sequence[Row]) -> tuple[float, float] | None:
    """95% interval of WER after minus WER before, on the same draws of speakers; None without two speakers."""
    speakers = speakers_of(rows)
    if len(set(speakers.values())) < 2:
        return None
    difference = paired_bootstrap(_scores(rows, "errors_before"), _scores(rows, "errors"), speakers)
    return difference["low"], difference["high"]


def etiology_section(summary: Row, rows: Sequence[Row]) -> Row | str:
    """Rates by etiology, worst first, and tables by severity, duration and speaker."""
    table: dict[str, Row] = summary.get("by_etiology") or {}
    if set(table) <= {"unknown"}:
        return "WER by etiology: the corpus names no etiology."
    worst_first = sorted(table, key=lambda name: (-table[name]["wer_after"], name))
    lines: list[Row] = [{"name": name} | table[name] for name in worst_first]
    ends = [x for r in lines for x in (r.get("wer_before"), r["wer_after"], *(r.get("wer_interval_after") or ()))]
    return {
        "lines": lines,
        "top": axis_end([x for x in ends if is_number(x)]),
        "single": [line["name"] for line in lines if line.get("speakers") == 1],
        "slices": _slices(rows),
    }


def worst_section(rows: Sequence[Row]) -> Row:
    """The utterances with most errors, each aligned with the reference that its errors were counted against."""
    wrong = [row for row in rows if row["errors"]]
    ranked = sorted(wrong, key=lambda r: (-r["errors"], -r["errors"] / max(1, r["words"]), str(r["id"])))[:WORST]
    lines = []
    for row in ranked:
        mixture = sorted(zip(row.get("weights") or (), row.get("experts") or (), strict=True), reverse=True)
        before = _cut(row.get("hypothesis_before") or "", 8 * INSERTED_WORDS)
        steps = align_words(scored_reference(row), row["hypothesis"])
        lines.append(row | {"steps": steps, "mixture": mixture, "before": before})
    share = sum(row["errors"] for row in ranked) / max(1, sum(row["errors"] for row in rows))
    return {"lines": lines, "share": share, "wrong": len(wrong), "total": len(rows)}


def align_words(reference: str, hypothesis: str) -> list[Step]:
    """A shortest alignment of two texts; neighbours of one kind are one step, except substitutions.

    Words are equal when they differ in case and punctuation at most. A long insertion is cut.

    Returns:
        (kind, words of the reference, words of the hypothesis), kinds ok, sub, del and ins.
    """
    left, right = reference.split(), hypothesis.split()
    steps: list[Step] = []
    for op in Levenshtein.opcodes([_key(word) for word in left], [_key(word) for word in right]):
        said, heard = left[op.src_start : op.src_end], right[op.dest_start : op.dest_end]
        if op.tag == "replace":
            steps += [("sub", a, b) for a, b in zip(said, heard, strict=True)]
        elif op.tag == "insert":
            steps.append(("ins", "", _cut(" ".join(heard), INSERTED_WORDS)))
        else:
            steps.append(("ok" if op.tag == "equal" else "del", " ".join(said), " ".join(heard)))
    return steps


def axis_end(values: Sequence[float]) -> float:
    """Where an axis of rates ends: the first multiple of 20% (of 100% above 100%) at or over all values."""
    most = max(values, default=0.0)
    step = 0.2 if most <= 1 else 1.0
    return max(step, math.ceil(round(most / step, 6)) * step)


def _verdict(before: float | None, after: float, bounds: tuple[float, float] | None) -> str:
    if not is_number(before):
        return "The rate before training was not measured, so nothing can be said about the gain."
    if bounds is None:
        return "Whether the difference is more than chance cannot be said: that takes two or more speakers."
    span = f"{points(after - before)} points, 95% interval {points(bounds[0])} to {points(bounds[1])}"
    if bounds[0] <= 0 <= bounds[1]:
        return f"Before and after are not distinguishable: the interval of the difference contains zero ({span})."
    return f"WER {'fell' if after < before else 'rose'} ({span})."


def _unclipped_rose(summary: Row) -> bool:
    before, after = (summary.get(f"wer_{when}_unclipped") for when in ("before", "after"))
    return is_number(before) and is_number(after) and after > before


def caution(speakers: int | None, named: bool, chosen: str) -> str:
    """Limitations of the intervals; empty if there are none.

    Args:
        named: whether the corpus names speakers.
        chosen: use of these speakers.
    """
    if not named:
        return (
            "The corpus names no speakers, so each utterance counts as one of its own: utterances of one speaker are "
            "alike, and the intervals are too narrow."
        )
    if speakers == 1:
        return f"One speaker was {chosen}: the rates are this speaker's, and say nothing about others."
    if speakers is not None and speakers < FEW_SPEAKERS:
        return (
            f"Only {speakers} speakers were {chosen}. Intervals come from resampling speakers; with fewer than about "
            f"{FEW_SPEAKERS} they are too narrow, and they say little about speakers unlike these."
        )
    return ""


def _slices(rows: Sequence[Row]) -> list[Row]:
    """Rates by the groupings that the summary does not contain."""
    keys: dict[str, Callable[[Row], str]] = {name: GROUPS[name] for name in ("severity", "duration")}
    keys["etiology, severity and duration"] = lambda row: ", ".join(GROUPS[name](row) for name in CELL)
    keys["speaker"] = GROUPS["speaker"]
    slices = []
    for title, key in keys.items():
        groups = [_rates(name, list(part)) for name, part in groupby(sorted(rows, key=key), key)]
        if title == "speaker":
            groups.sort(key=lambda group: (-group["wer_after"], group["name"]))
        if len(groups) > 1:
            slices.append({"title": title, "rows": groups[:TABLE_ROWS], "cut": max(0, len(groups) - TABLE_ROWS)})
    return slices


def _rates(name: str, rows: Sequence[Row]) -> Row:
    before, after = wer(_scores(rows, "errors_before")), wer(_scores(rows, "errors"))
    return {"name": name, "utterances": len(rows), "wer_before": before, "wer_after": after}


def _scores(rows: Sequence[Row], field: str) -> list[Score]:
    return [Score(str(row["id"]), row["words"], row[field], 0, 0, 0, 0) for row in rows]


def _cut(text: str, limit: int) -> str:
    words = text.split()
    more = f" … {len(words) - limit} more" if len(words) > limit else ""
    return " ".join(words[:limit]) + more


def _key(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum() or c == "'") or word
