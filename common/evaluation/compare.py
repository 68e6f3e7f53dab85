"""Compares runs and evaluations: rates with intervals, and differences on the same draws of speakers.

Shape letters: M results, R resamples, S results (seeds) of one system.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.errors import DataError, UsageError
from common.evaluation.breakdown import UNKNOWN, speakers_of
from common.evaluation.results import Result
from common.evaluation.wer import LEVEL, Floats, Metric, Score, cer, interval_of_difference, resampled_rates, wer
from common.json_files import Row
from common.sections import DecodeConfig

UNTOLD = {"low": None, "high": None, "p": None, "better": None}
METRICS: tuple[Metric, ...] = ("wer", "cer")
Systems = Mapping[str, Sequence[Result]]


def compare(
    systems: Systems,
    *,
    reference: str | None = None,
    shared_only: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Row:
    """Rates of systems, and their differences from a reference.

    The rate of a system with several results (seeds of one regime) is their mean; its intervals resample speakers and,
    independently, results. All systems use the same draws of speakers, so that differences are paired.

    Args:
        systems: name → its results.
        reference: the system with which the others are compared; by default the first.
        shared_only: compare on the utterances that all systems share; otherwise different sets are refused.
        resamples: R, number of draws of speakers.
        seed: random seed of the draws.

    Returns:
        Plain values for JSON: `reference`, `utterances`, `speakers`, `left_out` (utterances that some systems lack),
        `notes`, and `systems`, each with rates, intervals, `runs`, `by_etiology`, `difference` from the reference (None
        for itself) and `facts` (means over its results). Intervals and p are None if there is only one speaker.

    Raises:
        UsageError: there is no system with the reference's name.
        DataError: the systems were not tested on the same utterances.
    """
    names = list(systems)
    reference = reference or names[0]
    if reference not in systems:
        raise UsageError(f"--reference {reference}: not among {', '.join(names)}")
    everything = [result for results in systems.values() for result in results]
    shared, left_out = _shared(everything, shared_only)
    systems = {name: [_restricted(result, shared) for result in results] for name, results in systems.items()}
    rows = next(iter(systems.values()))[0].rows
    speakers = speakers_of(rows)
    return {
        "schema": 1,
        "reference": reference,
        "level": LEVEL,
        "resamples": resamples,
        "utterances": len(shared),
        "speakers": len(set(speakers.values())),
        "named_speakers": any(row.get("speaker") for row in rows),
        "left_out": left_out,
        "notes": _notes(everything),
        "systems": _described(systems, rows, speakers, reference, resamples, seed),
    }


def _described(
    systems: Systems, rows: Sequence[Row], speakers: Mapping[str, str], reference: str, resamples: int, seed: int
) -> list[Row]:
    """Each system's facts, rates, and rates by etiology."""
    described: dict[str, Row] = {name: {"name": name} | _facts(results) for name, results in systems.items()}
    for name, rates in _rates(systems, speakers, reference, resamples, seed).items():
        described[name] |= rates | {"by_etiology": {}}
    for group, ids in _etiologies(rows).items():
        part = {name: [_restricted(result, ids) for result in results] for name, results in systems.items()}
        for name, rates in _rates(part, speakers, reference, resamples, seed).items():
            described[name]["by_etiology"][group] = rates
    return list(described.values())


def _shared(results: Sequence[Result], shared_only: bool) -> tuple[set[str], int]:
    """Ids of the utterances that all results have with the same reference transcripts, and the number of other
    utterances.
    """
    sets = [{(str(row["id"]), row["reference"]) for row in result.rows} for result in results]
    shared, union = set.intersection(*sets), set.union(*sets)
    others = {name for name, _ in union - shared}
    if others and not shared_only:
        first, other = results[0], next(r for r, ids in zip(results, sets, strict=True) if ids != sets[0])
        lacks, more = len(sets[0] - sets[results.index(other)]), len(sets[results.index(other)] - sets[0])
        raise DataError(
            f"{first.name} and {other.name} were not tested on the same utterances: {other.name} lacks {lacks} of "
            f"{len(sets[0])} and has {more} others (one is {min(others)!r}); --common compares the "
            f"{len(shared)} that all share"
        )
    if not shared:
        raise DataError(f"{results[0].name} and the others share no utterance: they cannot be compared")
    return {name for name, _ in shared}, len(others)


def _restricted(result: Result, ids: set[str]) -> Result:
    rows = sorted((row for row in result.rows if str(row["id"]) in ids), key=lambda row: str(row["id"]))
    return replace(result, rows=rows, scores={str(row["id"]): result.scores[str(row["id"])] for row in rows})


def _etiologies(rows: Sequence[Row]) -> dict[str, set[str]]:
    """Etiology → ids of its utterances, in alphabetical order."""
    ids_by_etiology: dict[str, set[str]] = {}
    for row in sorted(rows, key=lambda row: row.get("etiology") or UNKNOWN):
        ids_by_etiology.setdefault(row.get("etiology") or UNKNOWN, set()).add(str(row["id"]))
    return ids_by_etiology


def _rates(systems: Systems, speakers: Mapping[str, str], reference: str, resamples: int, seed: int) -> dict[str, Row]:
    """Each system's rates on these utterances, with intervals, and its differences from the reference."""
    draws = {metric: _draws(systems, speakers, metric, resamples, seed) for metric in METRICS}
    means = {
        name: _mean_of([summary_of(result.scores.values()) for result in results]) for name, results in systems.items()
    }
    ids = next(iter(systems.values()))[0].scores
    size = {"utterances": len(ids), "speakers": len({speakers[name] for name in ids})}
    rates = {}
    for name, mean in means.items():
        several = size["speakers"] > 1  # all draws of one speaker are alike, and would make any difference certain
        bounds = {f"{metric}_interval": _bounds(draws[metric][name]) if several else None for metric in METRICS}
        differences = {
            metric: {"delta": mean[metric] - means[reference][metric]}
            | (_against(draws[metric][name] - draws[metric][reference]) if several else UNTOLD)
            for metric in METRICS
        }
        rates[name] = {**mean, **bounds, **size, "difference": None if name == reference else differences}
    return rates


def _draws(
    systems: Systems, speakers: Mapping[str, str], metric: Metric, resamples: int, seed: int
) -> dict[str, Floats]:
    """Each system's rate on R draws of speakers; with S > 1 results, each draw also resamples the results."""
    flat = [list(result.scores.values()) for results in systems.values() for result in results]
    rates_MR = resampled_rates(flat, speakers, metric=metric, resamples=resamples, seed=seed)
    generator = np.random.default_rng([seed, 1])  # apart from the speakers', so that single results pair as in `wer`
    rates: dict[str, Floats] = {}
    start = 0
    for name, results in systems.items():
        rates[name] = mean_of_results(rates_MR[start : start + len(results)], generator)
        start += len(results)
    return rates


def mean_of_results(values_SR: Floats, generator: np.random.Generator) -> Floats:
    """Mean over S results (seeds) for each of R draws of speakers; with S > 1, each draw also resamples the results.

    Resampled results vary less than S new results would, by (S - 1) / S in variance: the draws are stretched
    accordingly.
    """
    results = len(values_SR)
    mean_R: Floats = values_SR.mean(axis=0)
    if results > 1:
        drawn_SR = generator.integers(0, results, size=values_SR.shape)
        drawn_R = np.take_along_axis(values_SR, drawn_SR, axis=0).mean(axis=0)
        mean_R = mean_R + (drawn_R - mean_R) * math.sqrt(results / (results - 1))
    return mean_R


def _against(deltas_R: Floats) -> Row:
    """Interval and p of a difference; `better`, the share of draws in which it is below zero."""
    better = float(np.mean((deltas_R < 0) + 0.5 * (deltas_R == 0)))
    return interval_of_difference(deltas_R) | {"better": better}


def _facts(results: Sequence[Result]) -> Row:
    """Rates of a system's single results, and means of the facts of their training."""
    every = [summary_of(result.scores.values()) for result in results]
    runs = [{"name": result.name, "wer": s["wer"], "cer": s["cer"]} for result, s in zip(results, every, strict=True)]
    spread = float(np.std([summary["wer"] for summary in every], ddof=1)) if len(every) > 1 else None
    return {"runs": runs, "wer_spread": spread, "facts": _mean_facts([result.facts for result in results])}


def _mean_of(rates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([summary[key] for summary in rates])) for key in rates[0]}


def summary_of(scores: Iterable[Score]) -> dict[str, float]:
    """Rates and counts of a set of scores, without intervals."""
    all_scores = list(scores)
    return {
        "wer": wer(all_scores),
        "wer_unclipped": wer(all_scores, clipped=False),
        "cer": cer(all_scores),
        "insertions": sum(score.word_insertions for score in all_scores),
        "loops": sum(score.loop for score in all_scores),
    }


def _bounds(values_R: Floats) -> list[float]:
    """Interval of a rate, limited to at least zero, since stretched draws may be negative."""
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [max(0.0, float(low)), max(0.0, float(high))]


def _mean_facts(facts: Sequence[Row]) -> Row:
    """Means of numeric facts, and values that are equal in all results; expert loads are sorted first, since the
    experts' numbers in different trainings are unrelated.
    """
    means: Row = {}
    for key in dict.fromkeys(key for row in facts for key in row):
        values: list[Any] = [row.get(key) for row in facts]
        if key == "load" and all(values) and len({len(load) for load in values}) == 1:
            means[key] = [float(x) for x in np.mean([sorted(load, reverse=True) for load in values], axis=0)]
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            mean = float(np.mean(values))
            means[key] = int(mean) if mean.is_integer() and all(isinstance(v, int) for v in values) else mean
        elif all(value == values[0] for value in values):
            means[key] = values[0]
        elif key == "collapsed":
            means[key] = any(values)
    return means


def _notes(results: Sequence[Result]) -> list[str]:
    """Notes on circumstances that make a comparison less fair."""
    notes = []
    ways = {json.dumps(_plain_decoding(result.facts.get("decoding")), sort_keys=True) for result in results}
    if len(ways) > 1:
        notes.append("They were not all decoded in the same way: part of a difference may come from that.")
    contexts = {context: result.name for result in results if (context := result.facts.get("audio_context"))}
    if len(contexts) > 1:
        described = "; ".join(f"{context} ({name})" for context, name in contexts.items())
        notes.append(f"Their audio contexts differ: {described}.")
    in_train = max((result.facts.get("speakers_in_train") or 0 for result in results), default=0)
    if in_train:
        notes.append(f"{in_train} of the speakers are also in train: these are not rates for new speakers.")
    if len({result.facts["language"] for result in results if result.facts.get("language")}) > 1:
        notes.append("Their texts were not all normalised for the same language.")
    if collapsed := [result.name for result in results if result.facts.get("collapsed")]:
        notes.append(f"Experts collapsed in {', '.join(collapsed)}: these systems effectively use fewer experts.")
    return notes


def _plain_decoding(decoding: Row | None) -> Row | None:
    """The decoding options that influence texts, without batch size and random seed; older runs lack newer options."""
    if decoding is None:
        return None
    known = {key: value for key, value in decoding.items() if key in DecodeConfig.model_fields}
    known.setdefault("normaliser", "published")
    return DecodeConfig.model_validate(known).model_dump(mode="json", exclude={"batch_size"})
