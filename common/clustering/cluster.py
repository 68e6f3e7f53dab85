"""Groups of similar speech from pooled embeddings: reduction, clustering, report, and a plane to draw them in.

Shapes: N utterances, D embedding width, P reduced width, K final clusters, C clusters found, B rows of a chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.clustering.hdbscan import flat_clusters, spanning_tree
from common.clustering.neighbours import Floats, Ints, nearest_neighbours
from common.clustering.reduction import CHUNK, Reduction, chunks, project, reduce_dimensions
from common.errors import DataError

__all__ = ["Clustering", "cluster", "cluster_report", "known_groups", "project"]

Algorithm = Literal["hdbscan", "spectral", "etiology"]

HUGE = 1e15  # no embedding is so long, and its square still fits float32
SILHOUETTE_SAMPLE = 5000
DENSE_UP_TO = 500  # utterances whose graph is decomposed whole


@dataclass(frozen=True, slots=True)
class Clustering:
    """What was found, cluster 0 being the largest.

    Attributes:
        labels_N: the cluster of each utterance; one that was noise has that of the nearest centroid.
        noise_N: which ones HDBSCAN called noise.
        probability_N: how firmly each belongs, in [0, 1]; 0 for noise.
        centroids_KD: mean embeddings, in the original space.
        attempts: HDBSCAN's tries in turn, each {"min_cluster_size", "clusters"}, and "leaves" where it took these.
        algorithm: the one whose result this is.
        merged_from: how many clusters there were before merging, None if none was merged.
        min_cluster_size: HDBSCAN's that was used.
        reduced_NP: the points as they were clustered.
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


def cluster(
    points_ND: Floats,
    *,
    num_clusters: int,
    algorithm: Algorithm,
    reduce: Reduction,
    reduce_dim: int,
    min_cluster_size: int = 5,
    min_samples: int = 5,
    allow_reduce: bool,
    seed: int,
) -> Clustering:
    """Finds `num_clusters` groups of utterances, or fewer where that is allowed.

    HDBSCAN is tried with smaller and smaller `min_cluster_size`, down to 2, until it finds enough clusters. Noise then
    joins the nearest centroid, and of too many clusters the nearest are merged. All this is done in the reduced space.

    Args:
        points_ND: embeddings; may be a memory map.
        num_clusters: how many experts there are to be.
        algorithm: `spectral` always finds as many as are wanted.
        reduce, reduce_dim: as for `reduce_dimensions`.
        min_cluster_size: of HDBSCAN's first try.
        min_samples: neighbours within the core distance; more of them call more points noise.
        allow_reduce: accept fewer clusters; and where HDBSCAN finds none, take spectral clustering.
        seed: of UMAP and of spectral clustering's k-means.

    Raises:
        DataError: too few utterances or clusters, equal or non-finite embeddings.
    """
    _check(points_ND, num_clusters)
    reduced_NP = reduce_dimensions(points_ND, method=reduce, dim=reduce_dim, seed=seed)
    attempts: tuple[dict[str, int], ...] = ()
    used_size: int | None = None
    found_N: Ints = np.zeros(len(points_ND), np.int64)
    probability_N: Floats = np.ones(len(points_ND))
    if algorithm == "hdbscan" and num_clusters > 1:
        found_N, probability_N, attempts, used_size = _decreasing(
            reduced_NP, num_clusters, min_cluster_size, min_samples
        )
    if num_clusters > 1 and (algorithm == "spectral" or (found_N.max() < 0 and allow_reduce)):
        found_N, probability_N, used_size = _spectral(reduced_NP, num_clusters, seed), np.ones(len(found_N)), None
        algorithm = "spectral"
    if found_N.max() + 1 < num_clusters and not allow_reduce:
        raise DataError(_too_few(int(found_N.max()) + 1, num_clusters, attempts, len(found_N)))
    filled_N = _join_nearest_centroid(reduced_NP, found_N)
    found = int(filled_N.max()) + 1
    labels_N = _by_size(_merge(reduced_NP, filled_N, num_clusters))
    return Clustering(
        labels_N=labels_N,
        noise_N=found_N < 0,
        probability_N=probability_N.astype(np.float32),
        centroids_KD=_means(points_ND, labels_N).astype(np.float32),
        attempts=attempts,
        algorithm=algorithm,
        merged_from=found if found > num_clusters else None,
        min_cluster_size=used_size,
        reduced_NP=reduced_NP,
    )


def known_groups(
    points_ND: Floats, names_N: Sequence[str], *, reduce: Reduction, reduce_dim: int, seed: int
) -> Clustering:
    """The groups that the corpus names, as a clustering: what clusters could be at best, if its labels are right.

    Args:
        points_ND: embeddings.
        names_N: the group of each utterance.
        reduce, reduce_dim, seed: for `reduced_NP` alone.

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
    )


def cluster_report(
    clustering: Clustering, points_reduced: Floats, *, groups: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Any]:
    """How clear the clusters are, and what they stand for.

    Args:
        clustering: from `cluster`.
        points_reduced: (N, P), as they were clustered.
        groups: for each property its value for each utterance, {"speaker": […], "etiology": […]}.
        seed: of the sample that stands for more than 5,000 points in the silhouette.

    Returns:
        Plain values. Purity is the share of utterances whose cluster has mostly their group (1 is best, but many small
        clusters have it too); the adjusted Rand index is 1 for equal partitions and 0 for unrelated ones; the
        silhouette is in [-1, 1], None for a single cluster.
    """
    from sklearn.metrics import adjusted_rand_score

    labels_N = clustering.labels_N
    if wrong := [name for name, values in groups.items() if len(values) != len(labels_N)]:
        raise ValueError(f"group {wrong[0]!r} has {len(groups[wrong[0]])} values for {len(labels_N)} utterances")
    return {
        "algorithm": clustering.algorithm,
        "clusters": len(clustering.centroids_KD),
        "sizes": np.bincount(labels_N).tolist(),
        "noise_share": float(clustering.noise_N.mean()),
        "silhouette": _silhouette(points_reduced, labels_N, seed),
        "purity": {name: _purity(labels_N, values) for name, values in groups.items()},
        "adjusted_rand": {name: float(adjusted_rand_score(values, labels_N)) for name, values in groups.items()},
        "min_cluster_size": clustering.min_cluster_size,
        "attempts": [dict(attempt) for attempt in clustering.attempts],
        "merged_from": clustering.merged_from,
    }


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


def _too_few(found: int, wanted: int, attempts: Sequence[Mapping[str, int]], N: int) -> str:
    tried = ", ".join(f"{attempt['clusters']} at {attempt['min_cluster_size']}" for attempt in attempts)
    by_size = f" (clusters by min_cluster_size: {tried})" if attempts else ""
    spectral = ", or use --clustering-algorithm spectral" if attempts else ""
    return (
        f"found {found} clusters in {N} utterances where --num-experts wants {wanted}{by_size}, and "
        f"--no-reduce-experts forbids fewer: drop that option, lower --num-experts, raise --data-percent{spectral}"
    )


# ---- clusters ----


def _decreasing(
    points_NP: Floats, wanted: int, min_cluster_size: int, min_samples: int
) -> tuple[Ints, Floats, tuple[dict[str, int], ...], int]:
    """HDBSCAN with smaller and smaller clusters until there are enough of them; if never, the try that found most.

    Groups that lie in a few large regions are found as these regions, whatever their size: then the leaves of the tree
    are tried, from large to small.

    Returns:
        (labels_N, probability_N, attempts, min_cluster_size of the labels).
    """
    tree = spanning_tree(points_NP, min_samples)
    attempts, results = [], []
    size = min_cluster_size
    while size >= 2:
        labels_N, probability_N = flat_clusters(tree, size)
        found = int(labels_N.max()) + 1
        attempts.append({"min_cluster_size": size, "clusters": found})
        results.append((labels_N, probability_N))
        if found >= wanted:
            break
        size = max(10, size // 2) if size > 10 else size - 1
    size = max(min_cluster_size, len(points_NP) // (4 * wanted))  # a quarter of a fair share
    while attempts[-1]["clusters"] < wanted and size >= min_cluster_size:
        labels_N, probability_N = flat_clusters(tree, size, leaves=True)
        # Where most points are noise, leaves are the accidents of one group's density.
        found = int(labels_N.max()) + 1 if (labels_N >= 0).mean() > 0.5 else 0
        attempts.append({"min_cluster_size": size, "clusters": found, "leaves": 1})
        results.append((labels_N, probability_N))
        size = size * 3 // 4
    best = max(range(len(attempts)), key=lambda i: attempts[i]["clusters"])  # of equal ones the largest size
    return *results[best], tuple(attempts), attempts[best]["min_cluster_size"]


def _spectral(points_NP: Floats, num_clusters: int, seed: int) -> Ints:
    """Spectral clustering (Ng, Jordan & Weiss, NIPS 2001) of the neighbour graph.

    The spanning tree joins the graph: groups that no neighbours link would otherwise be told apart by chance.
    """
    from scipy.sparse import coo_array, dia_array

    points_NP, copy_of_N = np.unique(points_NP, axis=0, return_inverse=True)  # copies stay together
    N = len(points_NP)
    if num_clusters >= N:
        return np.asarray(copy_of_N)
    index_NK, _ = nearest_neighbours(points_NP, min(10, N - 1))
    tree = spanning_tree(points_NP, 1)
    start_E = np.concatenate([np.repeat(np.arange(N), index_NK.shape[1]), tree.start_E])
    stop_E = np.concatenate([index_NK.ravel(), tree.stop_E])
    directed = coo_array((np.ones(len(start_E)), (start_E, stop_E)), shape=(N, N)).tocsr()
    directed.data[:] = 1.0  # an edge found twice counts once
    graph = directed + directed.T
    scale = dia_array(((1.0 / np.sqrt(graph.sum(axis=1)))[None], [0]), shape=(N, N))
    vectors_NK = _leading_vectors((scale @ graph @ scale).tocsr(), num_clusters, seed)
    vectors_NK = vectors_NK / np.maximum(np.linalg.norm(vectors_NK, axis=1, keepdims=True), 1e-12)
    return _k_means(vectors_NK, num_clusters, seed)[copy_of_N]


def _leading_vectors(graph: Any, count: int, seed: int) -> Floats:
    N = graph.shape[0]
    if max(DENSE_UP_TO, 2 * count) >= N:
        return np.asarray(np.linalg.eigh(graph.toarray())[1][:, -count:])
    from scipy.sparse.linalg import eigsh

    # Products alone, no factorisation: that of a neighbour graph fills up.
    start_N = np.random.default_rng(seed).uniform(-1, 1, N)
    return np.asarray(eigsh(graph, k=count, which="LA", v0=start_N, tol=1e-5, maxiter=50 * N)[1])


def _k_means(points_NP: Floats, num_clusters: int, seed: int) -> Ints:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: fewer are returned
        label_N = KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(points_NP)
    return np.asarray(np.unique(label_N, return_inverse=True)[1])


def _means(points_ND: Floats, labels_N: Ints) -> NDArray[np.float64]:
    """The mean of each cluster; label -1 counts nowhere."""
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

    Near is Ward's measure (1963), the distance of the centroids weighted with the sizes, n·m/(n+m)·d²: by distance
    alone a handful of odd utterances would keep an expert to itself while large groups share one. A chain of nearest
    neighbours finds all merges without a table of all pairs; those that cost least are then made.
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
    """All C-1 merges as (cost, one cluster, another one), in no order."""
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
    """Labels 0, 1, … from the largest cluster to the smallest; of equal ones the first seen comes first."""
    _, first_K, labels_N, size_K = np.unique(labels_N, return_index=True, return_inverse=True, return_counts=True)
    rank_K = np.empty(len(size_K), np.int32)
    rank_K[np.lexsort((first_K, -size_K))] = np.arange(len(size_K), dtype=np.int32)
    return np.asarray(rank_K[labels_N], np.int32)


# ---- report ----


def _silhouette(points_NP: Floats, labels_N: Ints, seed: int) -> float | None:
    from sklearn.metrics import silhouette_score

    chosen = np.arange(len(labels_N))
    if len(chosen) > SILHOUETTE_SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, SILHOUETTE_SAMPLE, replace=False))
    if not 2 <= len(np.unique(labels_N[chosen])) < len(chosen):
        return None
    return float(silhouette_score(points_NP[chosen], labels_N[chosen]))


def _purity(labels_N: Ints, values: Sequence[str]) -> float:
    _, value_N = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    table_KV = np.zeros((int(labels_N.max()) + 1, int(value_N.max()) + 1), np.int64)
    np.add.at(table_KV, (labels_N, value_N), 1)
    return float(table_KV.max(axis=1).sum() / len(labels_N))
