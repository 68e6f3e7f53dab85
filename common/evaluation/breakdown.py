"""Rows of scored utterances, as in predictions.jsonl and utterances.csv, and the error rates of groups of them."""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.data.corpus import Utterance
from common.evaluation.wer import Score, duration_bucket, score, summarise
from common.json_files import Row

_FORMULA = re.compile(r"[=+\-@\t\r\n\uff0b\uff0d\uff1d\uff20]")  # how one begins in some spreadsheet
Routing = tuple[Sequence[int], Sequence[float]]  # experts and weights of an utterance
UNKNOWN = "unknown"
GROUPS: dict[str, Callable[[Row], str]] = {
    "etiology": lambda row: row.get("etiology") or UNKNOWN,
    "severity": lambda row: row.get("severity") or UNKNOWN,
    "duration": lambda row: duration_bucket(float(row["duration"])),
    "speaker": lambda row: row.get("speaker") or UNKNOWN,
}
CELL = ("etiology", "severity", "duration")


def references(u: Utterance) -> list[str]:
    """The reference transcripts of an utterance: one or two."""
    return [u.text, *([u.text_alt] if u.text_alt else [])]


def scored_row(u: Utterance, hypothesis: str, score: Score, routing: Routing = ((), ())) -> Row:
    """The row of one utterance: speaker, groups, references, hypothesis, errors and experts."""
    experts, weights = routing
    return {
        "id": u.id,
        "split": u.split,
        "speaker": u.speaker,
        "etiology": u.etiology,
        "severity": u.severity,
        "duration": u.duration,
        "audio": u.audio_filepath,
        "reference": u.text,
        "reference_alt": u.text_alt or "",
        "hypothesis": hypothesis,
        "words": score.words,
        "errors": score.word_errors,
        "insertions": score.word_insertions,
        "chars": score.chars,
        "char_errors": score.char_errors,
        "reference_used": score.reference,
        "loop": score.loop,
        "experts": list(experts),
        "weights": [round(weight, 4) for weight in weights],
    }


def score_of(row: Row, language: str = "en", hypothesis: str = "hypothesis", *, published: bool = False) -> Score:
    """The score of a row; computed again from its texts if the row lacks a part of it.

    Args:
        hypothesis: column of the text to score; the counts stored in the row belong to `hypothesis`.
        published: use only Whisper's normaliser if the score is computed again.
    """
    if hypothesis == "hypothesis" and "char_errors" in row:
        return Score(
            str(row["id"]),
            words=row["words"],
            word_errors=row["errors"],
            word_insertions=row["insertions"],
            chars=row["chars"],
            char_errors=row["char_errors"],
            reference=row["reference_used"],
            loop=row["loop"],
        )
    texts = [row["reference"], *([row["reference_alt"]] if row.get("reference_alt") else [])]
    return score(str(row["id"]), row[hypothesis], texts, language, published=published)


def scored_reference(row: Row) -> str:
    """The reference that a row's errors were counted against."""
    return str(row["reference_alt"] if row.get("reference_used") else row["reference"])


def speakers_of(rows: Iterable[Row]) -> dict[str, str]:
    """Utterance id → speaker; an utterance of an unknown speaker counts as a separate speaker."""
    return {str(row["id"]): str(row.get("speaker") or row["id"]) for row in rows}


def breakdown(rows: Sequence[Row], scores: Sequence[Score]) -> Row:
    """Error rates overall, by etiology, severity, duration and speaker, and by the first three together.

    Args:
        rows, scores: rows and scores of the same utterances, in the same order.

    Returns:
        `overall`, `by_etiology`, `by_severity`, `by_duration`, `by_speaker`, `cells`: each in the form of
        `wer.summarise`.
    """
    speakers = speakers_of(rows)

    def grouped(key: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
        members: dict[str, list[Score]] = {}
        for row, counted in zip(rows, scores, strict=True):
            members.setdefault(key(row), []).append(counted)
        return {name: summarise(members[name], speakers) for name in sorted(members)}

    cells = grouped(lambda row: "\0".join(GROUPS[name](row) for name in CELL))
    return {
        "overall": summarise(scores, speakers),
        **{f"by_{name}": grouped(key) for name, key in GROUPS.items()},
        "cells": [dict(zip(CELL, name.split("\0"), strict=True)) | rates for name, rates in cells.items()],
    }


def loops(rows: Sequence[Row]) -> list[Row]:
    """The utterances whose hypothesis is a hallucination loop, most inserted words first."""
    looped = [row for row in rows if row["loop"]]
    return sorted(looped, key=lambda row: (-row["insertions"], str(row["id"])))


def named(group: Mapping[str, Any]) -> bool:
    """Whether a breakdown is informative: it has more than one group, or a group with a name."""
    return set(group) - {UNKNOWN} != set()


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """utterances.csv: a line for each row, lists with spaces between their values.

    A text that a spreadsheet would interpret as a formula is prefixed with an apostrophe.
    """

    def cell(value: Any) -> Any:
        if isinstance(value, list):
            return " ".join(map(str, value))
        if isinstance(value, str) and _FORMULA.match(value):
            return f"'{value}"
        return int(value) if isinstance(value, bool) else value

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
