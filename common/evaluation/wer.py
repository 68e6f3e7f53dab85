"""Word and character error rates of an evaluation, with intervals over speakers.

Texts pass Whisper's normaliser, rates are micro-averaged (errors of all utterances over words of all references), and
an utterance counts at most as many errors as its reference has words, except in the "unclipped" rates. One endless
hallucination therefore cannot dominate the rate of a thousand other utterances.

Shape letters: N utterances, S speakers, R resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from common.errors import DataError
from common.text import is_hallucination_loop, normalise, unspaced

Metric = Literal["wer", "wer_unclipped", "cer", "cer_unclipped"]
Floats = NDArray[np.float64]

LEVEL = 0.95  # of confidence, of all intervals
DURATION_EDGES = (2, 5, 10, 20, 30)  # seconds
RESAMPLE_BLOCK = 4_000_000  # speakers drawn at a time, which bounds memory


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of one utterance against the reference that fits it best.

    Args:
        id: of the utterance.
        words: in the normalised reference.
        word_errors: substitutions, deletions and insertions; not clipped.
        word_insertions: how many of them are insertions.
        chars: in the normalised reference, spaces included.
        char_errors: not clipped.
        reference: number of the reference that was used, from 0.
        loop: the hypothesis is a hallucination loop.
    """

    id: str
    words: int
    word_errors: int
    word_insertions: int
    chars: int
    char_errors: int
    reference: int
    loop: bool = False


def score(
    id: str, hypothesis: str, references: Sequence[str], language: str = "en", *, published: bool = False
) -> Score:
    """Counts the errors of a hypothesis against the reference with the lowest word error rate (the first, if equal).

    A reference can be empty, or empty after normalisation (the normaliser removes "um" and text in brackets). Its rate
    is then 0 for an empty hypothesis and worse than any other rate for a hypothesis with words; in the averages it adds
    no words, and its insertions count only in the unclipped rates.

    Args:
        id: of the utterance, for the score and for messages.
        hypothesis: the model's text, not normalised.
        references: one or more transcripts, not normalised.
        language: language of all texts, as in `normalise`.
        published: compare by Whisper's normaliser alone, as in `normalise`.

    Raises:
        DataError: there is no reference.
    """
    if not references:
        raise DataError(f"utterance {id!r} has no reference to score against: give its text in the corpus index")
    said, *meant = (normalise(text, language, published=published) for text in (hypothesis, *references))
    spaced = not unspaced(language)
    candidates = [_score(id, said, text, i, spaced) for i, text in enumerate(meant)]
    return min(candidates, key=_rate)  # min keeps the first of equals


def _score(id: str, said: str, meant: str, reference: int, spaced: bool) -> Score:
    said_words, words = said.split(), meant.split()
    # Where words are not spaced, the normaliser has put a space between all characters.
    said_letters, letters = (said, meant) if spaced else ("".join(said_words), "".join(words))
    if said == meant:
        return Score(id, len(words), 0, 0, len(letters), 0, reference)
    edits = Levenshtein.editops(words, said_words)
    return Score(
        id,
        words=len(words),
        word_errors=len(edits),
        word_insertions=sum(edit.tag == "insert" for edit in edits),
        chars=len(letters),
        char_errors=Levenshtein.distance(letters, said_letters),
        reference=reference,
        loop=is_hallucination_loop(said, meant),
    )


def _rate(score: Score) -> float:
    if score.words:
        return score.word_errors / score.words
    return float("inf") if score.word_errors else 0.0


def wer(scores: Sequence[Score], *, clipped: bool = True) -> float:
    """Micro-averaged word error rate, 1.0 for 100%.

    Args:
        scores: of the utterances to average over.
        clipped: an utterance's errors count up to the words of its reference.

    Returns:
        The rate. If the references have no words: 0 without errors, otherwise 1.
    """
    return _rate_of(*_errors_and_lengths(scores, "wer" if clipped else "wer_unclipped"))


def cer(scores: Sequence[Score], *, clipped: bool = True) -> float:
    """Micro-averaged character error rate, as `wer`; the reference is the one chosen by word error rate."""
    return _rate_of(*_errors_and_lengths(scores, "cer" if clipped else "cer_unclipped"))


def bootstrap_interval(
    scores: Sequence[Score],
    speakers: Mapping[str, str],
    *,
    metric: Metric = "wer",
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a rate, by drawing speakers with replacement.

    Utterances of one speaker are similar, so drawing utterances would give intervals that are far too narrow. With
    fewer than about 20 speakers the intervals are still too narrow, and with one speaker the interval is a single
    point: report the number of speakers with it.

    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation".

    Args:
        scores: of N utterances.
        speakers: utterance id → speaker; an utterance that is missing counts as a separate speaker.
        metric: the rate.
        resamples: R, number of draws of speakers.
        seed: random seed; the same seed gives the same interval.

    Returns:
        Lower and upper end.
    """
    return _interval(resampled_rates([scores], speakers, metric=metric, resamples=resamples, seed=seed)[0])


def paired_bootstrap(
    scores_a: Sequence[Score],
    scores_b: Sequence[Score],
    speakers: Mapping[str, str],
    *,
    metric: Metric = "wer",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Difference of two systems on the same utterances, with the same draws of speakers for both.

    Args:
        scores_a, scores_b: of the same N utterances, in any order.
        speakers, metric, resamples, seed: as for `bootstrap_interval`.

    Returns:
        `delta`, the rate of b minus that of a (negative: b is better); `low` and `high`, its interval; `p`, two-sided:
        twice the share of draws on the other side of zero, at least 2 / (R + 1).

    Raises:
        DataError: the utterances differ.
    """
    a, b = (sorted(scores, key=lambda score: score.id) for scores in (scores_a, scores_b))
    ids_a, ids_b = [score.id for score in a], [score.id for score in b]
    if ids_a != ids_b:
        odd = sorted(set(ids_a) ^ set(ids_b))[:1] or ["(an utterance is scored twice)"]
        raise DataError(
            f"cannot pair {len(a)} scores with {len(b)}: {odd[0]!r} is not in both; evaluate both on one set"
        )
    rates_2R = resampled_rates([a, b], speakers, metric=metric, resamples=resamples, seed=seed)
    rate_a, rate_b = (_rate_of(*_errors_and_lengths(scores, metric)) for scores in (a, b))
    return {"delta": rate_b - rate_a} | interval_of_difference(rates_2R[1] - rates_2R[0])


def resampled_rates(
    systems: Sequence[Sequence[Score]], speakers: Mapping[str, str], *, metric: Metric, resamples: int, seed: int
) -> Floats:
    """Rates of M systems on the same draws of speakers, of shape (M, R).

    Args:
        systems: the scores of each, of the same utterances.
        speakers, metric, resamples, seed: as for `bootstrap_interval`.
    """
    sums = [part for scores in systems for part in _sums_by_speaker(scores, speakers, metric)]
    draws = _draw(np.random.default_rng(seed), resamples, *sums)
    blocks = [[_ratio(drawn[i], drawn[i + 1]) for i in range(0, len(drawn), 2)] for drawn in draws]
    return np.concatenate(blocks, axis=1)


def interval_of_difference(deltas_R: Floats) -> dict[str, float]:
    """`low` and `high` of the interval of a difference and its two-sided `p`, from its draws (`paired_bootstrap`)."""
    low, high = _interval(deltas_R)
    beyond = min((deltas_R <= 0).sum(), (deltas_R >= 0).sum())
    return {"low": low, "high": high, "p": min(1.0, float(2 * (beyond + 1) / (len(deltas_R) + 1)))}


def summarise(scores: Sequence[Score], speakers: Mapping[str, str]) -> dict[str, Any]:
    """Rates, intervals and counts of a set of utterances, for reports.

    Args:
        scores: of N utterances.
        speakers: as for `bootstrap_interval`.

    Returns:
        `wer`, `wer_unclipped`, `cer`, `cer_unclipped`; `ci` and `cer_ci`, the intervals of `wer` and `cer` as
        [low, high]; `utterances`, `words`, `speakers`, `insertions` and `loops`, numbers.
    """
    return {
        "wer": wer(scores),
        "wer_unclipped": wer(scores, clipped=False),
        "cer": cer(scores),
        "cer_unclipped": cer(scores, clipped=False),
        "ci": list(bootstrap_interval(scores, speakers)),
        "cer_ci": list(bootstrap_interval(scores, speakers, metric="cer")),
        "utterances": len(scores),
        "words": sum(score.words for score in scores),
        "speakers": len({speakers.get(score.id, score.id) for score in scores}),
        "insertions": sum(score.word_insertions for score in scores),
        "loops": sum(score.loop for score in scores),
    }


def duration_bucket(seconds: float) -> str:
    """The group of a duration in reports, such as "05-10 s"; the order of the names is the order of durations."""
    lower = max((edge for edge in (0, *DURATION_EDGES) if edge <= seconds), default=0)
    upper = next((edge for edge in DURATION_EDGES if edge > lower), None)
    return f"{lower:02}-{upper:02} s" if upper else f"{lower:02} s and more"


def _errors_and_lengths(scores: Sequence[Score], metric: Metric) -> tuple[Floats, Floats]:
    """Errors and reference lengths of N utterances, in words or characters."""
    if metric.startswith("wer"):
        pairs = [(score.word_errors, score.words) for score in scores]
    else:
        pairs = [(score.char_errors, score.chars) for score in scores]
    errors_N, lengths_N = np.array(pairs, np.float64).reshape(-1, 2).T
    return (errors_N if metric.endswith("unclipped") else np.minimum(errors_N, lengths_N)), lengths_N


def _sums_by_speaker(scores: Sequence[Score], speakers: Mapping[str, str], metric: Metric) -> tuple[Floats, Floats]:
    """Errors and reference lengths of S speakers, in the order of their names, so that it does not depend on the order
    of utterances."""
    errors_N, lengths_N = _errors_and_lengths(scores, metric)
    names_N = [speakers.get(score.id, score.id) for score in scores]
    place = {name: i for i, name in enumerate(sorted(set(names_N)))}
    speaker_N = np.fromiter((place[name] for name in names_N), np.intp, count=len(names_N))
    errors_S, lengths_S = np.zeros(len(place)), np.zeros(len(place))
    np.add.at(errors_S, speaker_N, errors_N)
    np.add.at(lengths_S, speaker_N, lengths_N)
    return errors_S, lengths_S


def _draw(rng: np.random.Generator, resamples: int, *sums_S: Floats) -> Iterator[list[Floats]]:
    """Draws S of S speakers `resamples` times; yields, block by block, the total of each of `sums_S` over each draw."""
    speakers = len(sums_S[0])
    block = max(1, RESAMPLE_BLOCK // max(1, speakers))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_RS = rng.integers(0, max(1, speakers), size=(rows, speakers))
        yield [sums[drawn_RS].sum(axis=1) for sums in sums_S]


def _ratio(errors: Floats, lengths: Floats) -> Floats:
    """Errors divided by lengths, elementwise; for length 0, 0 if there are no errors and otherwise 1."""
    empty = lengths == 0
    return np.where(empty, np.minimum(errors, 1.0), errors / np.where(empty, 1.0, lengths))


def _rate_of(errors: Floats, lengths: Floats) -> float:
    return float(_ratio(errors.sum(keepdims=True), lengths.sum(keepdims=True))[0])


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
