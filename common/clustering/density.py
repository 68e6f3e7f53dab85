"""Groups as dense regions, found by the `hdbscan` package.

Method: Campello, Moulavi & Sander, "Density-Based Clustering Based on Hierarchical Density Estimates" (PAKDD 2013).

Shapes: N utterances, P their width, C clusters found, B noise points of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.clustering.reduction import Floats, Ints

if TYPE_CHECKING:
    from hdbscan import HDBSCAN

MOST_NOISE = 0.5  # where more points are noise, leaves are chance variations in the density of one group
CHUNK = 1024  # noise points whose memberships are computed at a time


@dataclass(frozen=True, slots=True)
class DenseClusters:
    """Result of HDBSCAN.

    Attributes:
        labels_N: the cluster of each point, -1 for noise without a membership in any cluster.
        noise_N: whether HDBSCAN labelled the point as noise.
        probability_N: strength of membership in [0, 1], 0 for noise.
        attempts: each try as {"min_cluster_size", "clusters"}, and "leaves" where the tree's leaves were taken.
        min_cluster_size: value of the try that gave these clusters.
    """

    labels_N: Ints
    noise_N: np.ndarray
    probability_N: Floats
    attempts: tuple[dict[str, int], ...]
    min_cluster_size: int


class _TreeOnce:
    """Builds the tree for the first try and returns it for the others, whose settings do not change it.

    In place of joblib's `Memory`, which writes points and tree to a disk and warns when that is slow.
    """

    def __init__(self) -> None:
        self.made: Any = None

    def cache(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """`build`, called once."""

        def once(*args: Any, **options: Any) -> Any:
            if self.made is None:
                self.made = build(*args, **options)
            return self.made

        return once


def dense_clusters(points_NP: Floats, wanted: int, min_cluster_size: int, min_samples: int) -> DenseClusters:
    """HDBSCAN with decreasing cluster size until it finds enough clusters; otherwise the try with the most clusters.

    The most persistent clusters are tried first; they can be large regions that contain several groups. The leaves of
    the tree are then tried, with decreasing size. All tries share one tree. Noise joins the cluster of its largest
    membership.

    Args:
        points_NP: finite coordinates, N ≥ 2.
        wanted: number of clusters to look for.
        min_cluster_size: value of the first try.
        min_samples: a point's core distance is the distance to its min_samples-th nearest other point.
    """
    tree = _TreeOnce()
    fits: list[tuple[int, int, HDBSCAN]] = []  # clusters, leaves, fit
    for size, leaves in _tries(len(points_NP), wanted, min_cluster_size):
        if fits and max(clusters for clusters, _, _ in fits) >= wanted:
            break
        method = "leaf" if leaves else "eom"
        fit = _fit(points_NP, size, min_samples, cluster_selection_method=method, memory=tree)
        clustered = int(fit.labels_.max()) + 1
        mostly_noise = leaves and (fit.labels_ < 0).mean() >= MOST_NOISE
        fits.append((0 if mostly_noise else clustered, int(leaves), fit))
    attempts = tuple(
        {"min_cluster_size": fit.min_cluster_size, "clusters": clusters} | ({"leaves": 1} if leaves else {})
        for clusters, leaves, fit in fits
    )
    _, _, best = max(fits, key=lambda candidate: candidate[0])  # of equal ones the first, with the largest size
    return DenseClusters(
        labels_N=_assign_noise(points_NP, best),
        noise_N=best.labels_ < 0,
        probability_N=best.probabilities_,
        attempts=attempts,
        min_cluster_size=best.min_cluster_size,
    )


def spanning_tree(points_NP: Floats) -> tuple[Ints, Ints]:
    """The ends of the N - 1 edges of a minimum spanning tree of the points."""
    tree = _fit(points_NP, 2, 1, gen_min_span_tree=True).minimum_spanning_tree_.to_numpy()
    return tree[:, 0].astype(np.int64), tree[:, 1].astype(np.int64)


def _tries(N: int, wanted: int, min_cluster_size: int) -> list[tuple[int, bool]]:
    """(min_cluster_size, whether leaves are used) of each try, in order."""
    tries, size = [], min_cluster_size
    while size >= 2:
        tries.append((size, False))
        size = max(10, size // 2) if size > 10 else size - 1
    size = max(min_cluster_size, N // (4 * wanted))  # a quarter of an equal share
    while size >= min_cluster_size:
        tries.append((size, True))
        size = size * 3 // 4
    return tries


def _fit(points_NP: Floats, size: int, min_samples: int, **options: Any) -> HDBSCAN:
    """One run of the package.

    Prim's algorithm is exact, uses one thread and starts no processes. It is also the fastest one on points of 50
    dimensions, where the others' space trees exclude few pairs.
    """
    from hdbscan import HDBSCAN

    return HDBSCAN(min_cluster_size=size, min_samples=min_samples, algorithm="prims_kdtree", **options).fit(points_NP)


def _assign_noise(points_NP: Floats, fit: HDBSCAN) -> Ints:
    """Labels in which noise is assigned to the cluster of its largest membership, if it has one."""
    from hdbscan import membership_vector

    labels_N: Ints = fit.labels_.astype(np.int64)
    noise = np.flatnonzero(labels_N < 0)
    if labels_N.max() < 0 or not len(noise) or 2 * fit.min_samples > len(labels_N):  # neighbours that memberships need
        return labels_N
    fit.generate_prediction_data()
    for low in range(0, len(noise), CHUNK):
        some_B = noise[low : low + CHUNK]
        member_BC = np.nan_to_num(membership_vector(fit, points_NP[some_B]), nan=0.0)
        labels_N[some_B] = np.where(member_BC.max(axis=1) > 0, member_BC.argmax(axis=1), -1)
    return labels_N
