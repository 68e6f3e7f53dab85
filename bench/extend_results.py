"""The results file of `bench.extend`: word errors by utterance of every side, and the summary over seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.results_file import RESAMPLES, read_results, to_scores, write_results
from common.errors import DataError
from common.evaluation.compare import mean_of_results
from common.evaluation.wer import Score, interval_of_difference, resampled_rates, wer
from common.json_files import Row

EMPTY: Row = {"tested": {}, "sides": [], "groups": [], "summary": []}


def tested_name(row: Row) -> str:
    """What the utterances are filed under that a side was tested on."""
    return str(row.get("speaker", row["new"]))


def add_side(path: Path, row: Row, tested: Row) -> None:
    """Adds a side to the results.

    Raises:
        DataError: it was tested on other utterances than the sides before it.
    """
    results, name = read_results(path, EMPTY), tested_name(row)
    if results["tested"].setdefault(name, tested) != tested:
        raise DataError(f"{path}: {name} was tested on other utterances before")
    add_row(path, results, "sides", row)


def add_row(path: Path, results: Row, key: str, row: Row) -> None:
    """Adds a row to one list of the results, prints it, and writes the results with their summary."""
    results[key].append(row)
    print(json.dumps({name: value for name, value in row.items() if name != "errors"}), flush=True)
    write_results(path, results | {"summary": summarise(results)})


def summarise(results: Row) -> list[Row]:
    """Means over seeds and persons, with the difference from tuning all adapter weights.

    Its interval is over speakers and over seeds: a seed is a model and an enrolment of its own, the same for all ways.
    """
    groups: dict[tuple[str, str, int], dict[str, list[Row]]] = {}
    for row in results["sides"]:
        count = 0 if "speaker" in row else row["utterances"]
        groups.setdefault((row["model"], row["new"], count), {}).setdefault(row["way"], []).append(row)
    summary = []
    for (model, new, count), ways in sorted(groups.items()):
        tuned, speakers = scores_by_seed(ways.get("tuned", ()), results["tested"])
        for way, rows in ways.items():
            scores, own = scores_by_seed(rows, results["tested"])
            row = {"model": model, "new": new, "utterances": count or None, "way": way, "rows": len(rows)}
            row["new_wer"] = wer([score for seed in scores.values() for score in seed])
            for key in ("others_before", "others_after", "bytes", "seconds"):
                row[key] = statistics.mean(row[key] for row in rows)
            paired = way not in ("tuned", "as it is") and own == speakers and scores.keys() == tuned.keys()
            row["minus_tuned"] = difference(tuned, scores, speakers) if paired else None
            summary.append(row)
    return summary


def scores_by_seed(rows: Sequence[Row], tested: Mapping[str, Row]) -> tuple[dict[int, list[Score]], dict[str, str]]:
    """Scores of a way over all persons, by seed, and the speaker of each utterance."""
    scores: dict[int, list[Score]] = {}
    speakers: dict[str, str] = {}
    for row in rows:
        utterances = tested[tested_name(row)]
        own = to_scores(utterances, row["errors"])
        scores.setdefault(row["seed"], []).extend(own)
        speakers |= zip((score.id for score in own), utterances["speakers"], strict=True)
    return scores, speakers


def difference(
    tuned: Mapping[int, list[Score]], scores: Mapping[int, list[Score]], speakers: Mapping[str, str]
) -> dict[str, float]:
    """`delta` of word error rates, with `low`, `high` and `p`, over draws of speakers and of seeds.

    Of a single speaker, utterances are drawn.
    """
    if len({*speakers.values()}) == 1:
        speakers = {utterance: utterance for utterance in speakers}
    rates_MR = resampled_rates(
        [by_seed[seed] for by_seed in (scores, tuned) for seed in tuned],
        speakers,
        metric="wer",
        resamples=RESAMPLES,
        seed=0,
    )
    deltas_SR = rates_MR[: len(tuned)] - rates_MR[len(tuned) :]
    delta = statistics.mean(wer(scores[seed]) - wer(tuned[seed]) for seed in tuned)
    return {"delta": delta} | interval_of_difference(mean_of_results(deltas_SR, np.random.default_rng(0)))
