"""Subsets of a corpus for training and evaluation: nested subsets of train, and dev and test of limited size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from common.data.corpus import Corpus, Utterance
from common.errors import DataError

TEST_SEED = 42  # of the evaluated part of test: the same for every run, so that runs can be compared


def training_subset(corpus: Corpus, *, samples: int | None, percent: float, seed: int) -> list[Utterance]:
    """A stratified part of `train`, sorted by id.

    Args:
        samples: maximum number of utterances; None for `percent` of them.

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
    """The evaluated part of dev or test, sorted by id; the part of test does not depend on the seed, so that runs can
    be compared.

    Args:
        samples: maximum number of utterances; None for all.

    Raises:
        DataError: the corpus has no such utterances.
    """
    pool = _usable(corpus, split)
    count = min(samples or len(pool), len(pool))
    return stratified_subset(pool, count=count, seed=seed if split == "dev" else TEST_SEED)


def _usable(corpus: Corpus, split: str) -> list[Utterance]:
    utterances = corpus.split(split)
    if not utterances:
        raise DataError(
            f"corpus {corpus.url} has no utterances in split {split!r}: give it speakers in index.jsonl "
            "(`moe-asr corpus stats` lists the splits)"
        )
    return utterances


def stratified_subset(
    utterances: Sequence[Utterance], *, percent: float | None = None, count: int | None = None, seed: int
) -> list[Utterance]:
    """A subset of the utterances with proportional etiologies; larger subsets contain the smaller ones.

    Within an etiology of n utterances, the utterance of rank r (by a hash of seed and id) gets the position (r + 1/2) /
    n; all etiologies are merged in order of these positions, and a subset is the first part of this order. Subsets are
    therefore nested for percents and counts, proportional, and independent of the order of `utterances`.

    Args:
        percent: above 0, up to 100; or
        count: number of utterances, at least 1; if there are fewer, all are returned.
        seed: another seed gives another subset.

    Returns:
        At least one utterance (when there is any), sorted by id.
    """
    wanted = count if count is not None else max(1, math.floor(len(utterances) * (percent or 0) / 100 + 0.5))
    if wanted >= len(utterances):
        return sorted(utterances, key=lambda u: u.id)
    return sorted((utterances[i] for i in _subset_order(utterances, seed)[:wanted]), key=lambda u: u.id)


def _subset_order(utterances: Sequence[Utterance], seed: int) -> list[int]:
    """The order of `utterances` whose first parts are the subsets."""
    prefix = f"{seed}\0"
    rank_keys = np.fromiter((_hash64(prefix + u.id) for u in utterances), np.uint64, len(utterances))
    stratum_of = {name: i for i, name in enumerate(sorted({u.etiology for u in utterances}))}
    strata = np.fromiter((stratum_of[u.etiology] for u in utterances), np.int64, len(utterances))
    by_stratum = np.lexsort((rank_keys, strata))
    sizes = np.bincount(strata, minlength=len(stratum_of))
    ranks = np.arange(len(utterances)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    positions = (ranks + 0.5) / np.repeat(sizes, sizes)
    order: list[int] = by_stratum[np.lexsort((rank_keys[by_stratum], positions))].tolist()
    return order


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
