"""Groups of similar speech from pooled embeddings.

Shapes: N utterances, D embedding width, P reduced width, K final clusters, C clusters found, B rows of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.clustering.density import DenseClusters, dense_clusters
from common.clustering.reduction import CHUNK, Floats, Ints, Reduction, chunks, reduce_dimensions
from common.clustering.spectral import spectral_clusters
from common.errors import DataError

Algorithm = Literal["hdbscan", "spectral", "etiology"]

HUGE = 1e15  # no embedding is so long, and its square still fits float32
SAMPLE = 100_000  # more utterances are clustered by a sample of this size: time grows with its square


@dataclass(frozen=True, slots=True)
class Clustering:
    """Result of a clustering. Cluster 0 is the largest.

    Attributes:
        labels_N: the cluster of each utterance, also of noise.
        noise_N: whether HDBSCAN labelled the utterance as noise.
        probability_N: strength of membership in [0, 1]; 0 for noise and for utterances outside the sample.
        centroids_KD: mean embeddings, in the original space.
        attempts: HDBSCAN's tries in order, each {"min_cluster_size", "clusters"}, with "leaves" if the tree's leaves
            were used.
        algorithm: the algorithm that gave this result.
        merged_from: number of clusters before merging; None if no clusters were merged.
        min_cluster_size: value with which HDBSCAN gave this result.
        reduced_NP: the points in the reduced space, in which they were clustered.
        sampled: number of utterances that were clustered; the others joined the nearest centroid.
    """

    labels_N: NDArray[np.int32]
    noise_N: NDArray[np.bool_]
    probability_N: NDArray[np.float32]
    centroids_KD: NDArray[np.float32]
    attempts: tuple[dict[str, int], ...]
    algorithm: Algorithm
    merged_from: int | None
    min_cluster_size: int | None
    reduced_NP: NDArray[np.float32]
    sampled: int


def cluster(
    points_ND: Floats,
    *,
    etiologies: Sequence[str] = (),
    num_clusters: int,
    algorithm: Algorithm,
    reduce: Reduction,
    reduce_dim: int,
    min_cluster_size: int = 5,
    min_samples: int = 5,
    allow_reduce: bool,
    seed: int,
) -> Clustering:
    """Finds `num_clusters` groups of utterances, or fewer if `allow_reduce` is set.

    HDBSCAN is run with decreasing `min_cluster_size`, down to 2, until it finds enough clusters. Noise then joins the
    cluster of its largest membership, and if there are too many clusters, the nearest are merged. If there are more
    than 100,000 utterances, a random sample is clustered, and the others join the nearest centroid. All steps are done
    in the reduced space.

    Args:
        points_ND: embeddings; may be a memory map.
        num_clusters: number of clusters to find, which is the number of experts.
        etiologies: of each utterance, which are the groups of `algorithm` `etiology` (`known_groups`).
        algorithm: `spectral` always finds `num_clusters` clusters.
        reduce, reduce_dim: as for `reduce_dimensions`.
        min_cluster_size: minimum cluster size of HDBSCAN's first try.
        min_samples: number of neighbours within the core distance; larger values label more points as noise.
        allow_reduce: accept fewer clusters, and use spectral clustering if HDBSCAN finds none.
        seed: random seed of the sample, of UMAP and of spectral clustering's k-means.

    Raises:
        DataError: too few utterances or clusters, equal or non-finite embeddings.
    """
    if algorithm == "etiology":
        if (groups := len(set(etiologies))) < num_clusters and not allow_reduce:
            raise DataError(_too_few(groups, num_clusters, (), len(points_ND)))
        return known_groups(points_ND, etiologies, reduce=reduce, reduce_dim=reduce_dim, seed=seed)
    _check(points_ND, num_clusters)
    N = len(points_ND)
    reduced_NP = reduce_dimensions(points_ND, method=reduce, dim=reduce_dim, seed=seed)
    sample = _sample(N, seed)
    dense: DenseClusters | None = None
    found_S: Ints = np.zeros(len(sample), np.int64)
    if algorithm == "hdbscan" and num_clusters > 1:
        dense = dense_clusters(reduced_NP[sample], num_clusters, min_cluster_size, min_samples)
        found_S = dense.labels_N
    attempts = dense.attempts if dense else ()
    if num_clusters > 1 and (algorithm == "spectral" or (found_S.max() < 0 and allow_reduce)):
        found_S, dense, algorithm = spectral_clusters(reduced_NP[sample], num_clusters, seed), None, "spectral"
    count = int(found_S.max()) + 1
    if count < num_clusters and not allow_reduce:
        raise DataError(_too_few(count, num_clusters, attempts, N))
    labels_N = _spread(found_S, sample, N, -1)
    labels_N = _by_size(_merge(reduced_NP, _join_nearest_centroid(reduced_NP, labels_N), num_clusters))
    return Clustering(
        labels_N=labels_N,
        noise_N=_spread(dense.noise_N if dense else np.zeros(len(sample), bool), sample, N, False),
        probability_N=_spread(dense.probability_N if dense else np.ones(len(sample)), sample, N, 0).astype(np.float32),
        centroids_KD=_means(points_ND, labels_N).astype(np.float32),
        attempts=attempts,
        algorithm=algorithm,
        merged_from=count if count > num_clusters else None,
        min_cluster_size=dense.min_cluster_size if dense else None,
        reduced_NP=reduced_NP,
        sampled=len(sample),
    )


def known_groups(
    points_ND: Floats, names_N: Sequence[str], *, reduce: Reduction, reduce_dim: int, seed: int
) -> Clustering:
    """The corpus's own groups as a clustering: an upper bound for clustering, if the labels are right.

    Args:
        points_ND: embeddings.
        names_N: the group of each utterance.
        reduce, reduce_dim, seed: settings for `reduced_NP` only.

    Raises:
        DataError: there is only one group, or embeddings are non-finite or all equal.
    """
    groups = sorted(set(names_N))
    if len(groups) < 2:
        raise DataError(f"all utterances have the etiology {groups[0]!r}: cluster.algorithm etiology needs several")
    _check(points_ND, len(groups))
    labels_N = _by_size(np.array([groups.index(name) for name in names_N]))
    return Clustering(
        labels_N=labels_N,
        noise_N=np.zeros(len(labels_N), bool),
        probability_N=np.ones(len(labels_N), np.float32),
        centroids_KD=_means(points_ND, labels_N).astype(np.float32),
        attempts=(),
        algorithm="etiology",
        merged_from=None,
        min_cluster_size=None,
        reduced_NP=reduce_dimensions(points_ND, method=reduce, dim=reduce_dim, seed=seed),
        sampled=len(labels_N),
    )


# ---- checks ----


def _check(points_ND: Floats, num_clusters: int) -> None:
    N = len(points_ND)
    if N < 2:
        raise DataError(f"clustering needs at least two utterances and got {N}: raise --data-percent or add recordings")
    if num_clusters > N:
        raise DataError(f"{num_clusters} experts for {N} utterances: lower --num-experts or raise --data-percent")
    bad, equal = [], True
    for low, chunk_BD in chunks(points_ND):
        with np.errstate(invalid="ignore"):
            bad.extend((np.flatnonzero(~(np.abs(chunk_BD) < HUGE).all(axis=1)) + low).tolist())
        equal = equal and bool((chunk_BD == points_ND[0]).all())
    if bad:
        raise DataError(
            f"{len(bad)} of {N} embeddings are NaN, infinite or absurdly large, the first in row {bad[0]}: look for "
            "broken audio with `moe-asr corpus audit`, then run extract again, in fp32 if it ran in fp16"
        )
    if equal:
        raise DataError(
            f"all {N} embeddings are equal, so there is nothing to cluster: is all audio the same, or silent?"
        )


def _too_few(count: int, wanted: int, attempts: Sequence[Mapping[str, int]], N: int) -> str:
    tried = ", ".join(f"{attempt['clusters']} at {attempt['min_cluster_size']}" for attempt in attempts)
    by_size = f" (clusters by min_cluster_size: {tried})" if attempts else ""
    spectral = ", or use --clustering-algorithm spectral" if attempts else ""
    return (
        f"found {count} clusters in {N} utterances where --num-experts wants {wanted}{by_size}, and "
        f"--no-reduce-experts forbids fewer: drop that option, lower --num-experts, raise --data-percent{spectral}"
    )


# ---- clusters ----


def _sample(N: int, seed: int) -> Ints:
    """The rows that are clustered, ascending."""
    if N <= SAMPLE:
        return np.arange(N)
    return np.sort(np.random.default_rng(seed).choice(N, SAMPLE, replace=False))


def _spread(value_S: NDArray[Any], sample_S: Ints, N: int, rest: float) -> NDArray[Any]:
    """Values of a sample at their rows among all, and `rest` at the others."""
    value_N = np.full(N, rest, value_S.dtype)
    value_N[sample_S] = value_S
    return value_N


def _means(points_ND: Floats, labels_N: Ints) -> NDArray[np.float64]:
    """The mean of each cluster; rows with label -1 are ignored."""
    from scipy.sparse import csr_array

    clusters = int(labels_N.max()) + 1
    sum_CD = np.zeros((clusters, points_ND.shape[1]))
    for low, chunk_BD in chunks(points_ND):
        own_B = labels_N[low : low + CHUNK]
        rows = np.flatnonzero(own_B >= 0)
        member_CB = csr_array((np.ones(len(rows)), (own_B[rows], rows)), shape=(clusters, len(own_B)))
        sum_CD += member_CB @ chunk_BD
    return np.asarray(sum_CD / np.bincount(labels_N[labels_N >= 0], minlength=clusters)[:, None])


def _join_nearest_centroid(points_NP: Floats, labels_N: Ints) -> Ints:
    """Labels in which each -1 has become the cluster with the nearest centroid."""
    from scipy.spatial.distance import cdist

    noise = np.flatnonzero(labels_N < 0)
    filled_N = labels_N.copy()
    centroid_CP = _means(points_NP, labels_N) if len(noise) else np.empty((0, 0))
    for low in range(0, len(noise), CHUNK):
        some = noise[low : low + CHUNK]
        filled_N[some] = cdist(np.asarray(points_NP[some], np.float64), centroid_CP).argmin(axis=1)
    return filled_N


def _merge(points_NP: Floats, labels_N: Ints, wanted: int) -> Ints:
    """Merges the nearest clusters until `wanted` are left.

    Distance is Ward's measure (1963), the distance of the centroids weighted with the sizes, n·m/(n+m)·d²: with the
    unweighted distance, a few outliers would keep their own expert while large groups share one. A chain of nearest
    neighbours finds all merges without a table of all pairs; the merges with the lowest cost are then made.
    """
    clusters = int(labels_N.max()) + 1
    if clusters <= wanted:
        return labels_N
    merges = sorted(_ward_merges(_means(points_NP, labels_N), np.bincount(labels_N).astype(np.float64)))
    parent_C = np.arange(clusters)
    for _, keep, gone in merges[: clusters - wanted]:
        parent_C[parent_C == parent_C[gone]] = parent_C[keep]
    return np.asarray(parent_C[labels_N])


def _ward_merges(centroid_CP: Floats, size_C: Floats) -> list[tuple[float, int, int]]:
    """All C-1 merges as (cost, first cluster, second cluster), unordered."""
    centroid_CP, size_C = centroid_CP.copy(), size_C.copy()
    alive_C = np.ones(len(size_C), bool)
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(merges) < len(size_C) - 1:
        if not chain:
            chain.append(int(alive_C.argmax()))
        top = chain[-1]
        weight_C = size_C * size_C[top] / (size_C + size_C[top])
        cost_C = np.where(alive_C, weight_C * ((centroid_CP - centroid_CP[top]) ** 2).sum(axis=1), np.inf)
        cost_C[top] = np.inf
        nearest = int(cost_C.argmin())
        if len(chain) < 2 or cost_C[nearest] < cost_C[chain[-2]]:
            chain.append(nearest)
            continue
        keep = chain[-2]
        del chain[-2:]
        merges.append((float(cost_C[keep]), keep, top))
        total = size_C[keep] + size_C[top]
        centroid_CP[keep] = (size_C[keep] * centroid_CP[keep] + size_C[top] * centroid_CP[top]) / total
        size_C[keep], alive_C[top] = total, False
    return merges


def _by_size(labels_N: Ints) -> NDArray[np.int32]:
    """Labels 0, 1, … from the largest cluster to the smallest; clusters of equal size in order of appearance."""
    _, first_K, labels_N, size_K = np.unique(labels_N, return_index=True, return_inverse=True, return_counts=True)
    rank_K = np.empty(len(size_K), np.int32)
    rank_K[np.lexsort((first_K, -size_K))] = np.arange(len(size_K), dtype=np.int32)
    return np.asarray(rank_K[labels_N], np.int32)
