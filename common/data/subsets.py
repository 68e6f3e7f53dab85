"""Parts of a corpus that are trained on and evaluated: nested subsets of train, capped dev and test."""

from __future__ import annotations

from typing import Literal

from common.data.corpus import Corpus, Utterance, stratified_subset
from common.errors import DataError

TEST_SEED = 42  # of the evaluated part of test: the same for every run, so that runs can be compared


def training_subset(corpus: Corpus, *, samples: int | None, percent: float, seed: int) -> list[Utterance]:
    """A stratified part of `train`, sorted by id.

    Args:
        samples: number of utterances at most; None for `percent` of them.

    Raises:
        DataError: the corpus has no such utterances.
    """
    pool = _usable(corpus, "train")
    if samples is not None:
        return stratified_subset(pool, count=min(samples, len(pool)), seed=seed)
    return stratified_subset(pool, percent=percent, seed=seed)


def evaluation_subset(
    corpus: Corpus, split: Literal["dev", "test"], *, samples: int | None, seed: int
) -> list[Utterance]:
    """The evaluated part of dev or test, sorted by id; of test the same for every seed, so that runs can be compared.

    Args:
        samples: number of utterances at most; None for all.

    Raises:
        DataError: the corpus has no such utterances.
    """
    pool = _usable(corpus, split)
    count = min(samples or len(pool), len(pool))
    return stratified_subset(pool, count=count, seed=seed if split == "dev" else TEST_SEED)


def _usable(corpus: Corpus, split: str) -> list[Utterance]:
    found = corpus.split(split)
    if not found:
        raise DataError(
            f"corpus {corpus.url} has no utterances in split {split!r}: give it speakers in index.jsonl "
            "(`moe-asr corpus stats` lists the splits)"
        )
    return found
