"""Results as JSON: word errors by utterance, from which rates and intervals are computed; one line for each row."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from common.evaluation.wer import Score
from common.json_files import Row, read_object

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 4000


def tested_utterances(scores: Sequence[Score], **columns: Sequence[str]) -> Row:
    """What all results on a test set have in common: ids, columns of the corpus (`speakers`, …), numbers of words."""
    return {"ids": [score.id for score in scores], **columns, "words": [score.words for score in scores]}


def word_errors(scores: Sequence[Score]) -> list[int]:
    """What one result on a test set consists of, in the order of its utterances."""
    return [score.word_errors for score in scores]


def to_scores(tested: Mapping[str, Sequence[Any]], errors: Sequence[int], prefix: str = "") -> list[Score]:
    """The scores again; there are no texts, and therefore no characters. `prefix` is put before the ids."""
    return [
        Score(f"{prefix}{id}", words, wrong, 0, chars=1, char_errors=0, reference=0)
        for id, words, wrong in zip(tested["ids"], tested["words"], errors, strict=True)
    ]


def read_results(path: Path, empty: Row) -> Row:
    """The results so far, over a copy of those of an `empty` file."""
    return deepcopy(empty) | (read_object(path) if path.is_file() else {})


def write_results(path: Path, results: Row) -> None:
    """Writes JSON in which every element of a list or object at the top has a line of its own, so that a change shows
    what was measured again.
    """
    parts = []
    for key, value in results.items():
        if isinstance(value, dict):
            inner, (begin, end) = [f"  {json.dumps(name)}: {_compact(row)}" for name, row in value.items()], "{}"
        elif isinstance(value, list):
            inner, (begin, end) = [f"  {_compact(row)}" for row in value], "[]"
        else:
            parts.append(f" {json.dumps(key)}: {_compact(value)}")
            continue
        parts.append(f" {json.dumps(key)}: {begin}\n" + ",\n".join(inner) + f"\n {end}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
