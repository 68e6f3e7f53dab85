"""Subsets of utterances with proportional etiologies, each contained in the larger ones."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from common.data.corpus import Utterance

TEST_SEED = 42  # of the evaluated part of test: the same for every run, so that runs can be compared


def stratified_subset(
    utterances: Sequence[Utterance], *, percent: float | None = None, count: int | None = None, seed: int
) -> list[Utterance]:
    """A subset of the utterances with proportional etiologies; larger subsets contain the smaller ones.

    Within an etiology of n utterances, the utterance of rank r (by a hash of seed and id) gets the position (r + 1/2) /
    n; all etiologies are merged in order of these positions, and a subset is the first part of this order. Subsets are
    therefore nested for percents and counts, proportional, and independent of the order of `utterances`.

    Args:
        percent: above 0, up to 100; it does not count beside `count`.
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
