"""HDBSCAN, exact, on matrix products.

Method: Campello, Moulavi & Sander, "Density-Based Clustering Based on Hierarchical Density Estimates" (PAKDD 2013).
The costly part is the minimum spanning tree of the mutual reachability distances max(d(p, q), core(p), core(q)).
Space trees do not prune in the 50 dimensions we cluster in, and neighbour graphs alone are approximate. Here distances
come in tiles from one matrix product each, in three steps: the forest of each point's nearest neighbours; links
between its trees, any that are valid; and one pass over all pairs that finds every edge which can still shorten that
tree, after which the tree is exact. The tree does not depend on min_cluster_size, so trying several is almost free.

Shapes: N points, D coordinates, K neighbours, E edges, C clusters; R and W are the rows and columns of a tile.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

KNN_ROWS, KNN_COLUMNS = 128, 8192  # tiles of 4 MiB, which stay in the cache between the passes over them
TILE = 1024
SLACK = 32 * float(np.finfo(np.float32).eps)  # bounds the rounding of a float32 product, relative to the squared norms
REPRESENTATIVES = 8  # of each tree, asked for their nearest stranger


@dataclass(frozen=True, slots=True)
class SpanningTree:
    """A minimum spanning tree of mutual reachability: N-1 edges, ascending by weight."""

    start_E: Ints
    stop_E: Ints
    weight_E: Floats


def nearest_neighbours(points_ND: Floats, count: int) -> tuple[Ints, Floats]:
    """The nearest other points of every point, by Euclidean distance.

    Args:
        points_ND: finite coordinates, N ≥ 2.
        count: how many neighbours, at most N-1; the point itself is not among them.

    Returns:
        (index_NK, distance_NK), nearest first.
    """
    N = len(points_ND)
    # In random order the first tile is a fair sample, so its K-th distance is a good bound for all later tiles.
    shuffle_N = np.random.default_rng(0).permutation(N)
    left_NF, right_FN = _factors(points_ND[shuffle_N])
    found_NK = np.empty((N, count), np.int64)

    def fill(first: int) -> None:
        found_NK[first : first + KNN_ROWS] = _nearest_of_block(left_NF, right_FN, first, count)

    _in_threads(fill, range(0, N, KNN_ROWS))
    index_NK = np.empty_like(found_NK)
    index_NK[shuffle_N] = shuffle_N[found_NK]
    start_E = np.repeat(np.arange(N), count)
    distance_NK = _distances(points_ND, start_E, index_NK.ravel()).reshape(N, count)
    order_NK = np.argsort(distance_NK, axis=1, kind="stable")
    return np.take_along_axis(index_NK, order_NK, 1), np.take_along_axis(distance_NK, order_NK, 1)


def spanning_tree(points_ND: Floats, min_samples: int) -> SpanningTree:
    """The exact minimum spanning tree of the points' mutual reachability distances.

    Args:
        points_ND: finite coordinates, N ≥ 2.
        min_samples: the core distance of a point is that to its min_samples-th nearest other point (the count of the
            `hdbscan` package; scikit-learn also counts the point itself).
    """
    N = len(points_ND)
    nearest = min(N - 1, min_samples)
    index_NK, distance_NK = nearest_neighbours(points_ND, min(N - 1, max(12, 2 * nearest)))
    core_N = distance_NK[:, nearest - 1].copy()
    start_E = np.repeat(np.arange(N), index_NK.shape[1])
    edges = (start_E, index_NK.ravel(), _reach(distance_NK.ravel(), core_N, start_E, index_NK.ravel()))
    tree = _link_trees(points_ND, core_N, _forest(N, edges))
    return _shorten(points_ND, core_N, tree)


def flat_clusters(tree: SpanningTree, min_cluster_size: int) -> tuple[Ints, Floats]:
    """The clusters of greatest excess of mass: those of most persistence, none inside another, never all points.

    Args:
        tree: from `spanning_tree`.
        min_cluster_size: a branch with fewer points (at least 2) is noise that falls out of its parent.

    Returns:
        (labels_N, probability_N): labels from 0, -1 for noise; probability is the share of its cluster's density that
        a point keeps up with, in [0, 1], 0 for noise.
    """
    dendrogram = _Dendrogram.of(tree)
    density_E = 1.0 / np.maximum(tree.weight_E, _smallest_positive(tree.weight_E))  # equal points: as dense as any
    branches = _condense(dendrogram, density_E.tolist(), min_cluster_size)
    label_C = _select(branches)
    selected_N = np.asarray(label_C)[branches.branch_N]
    labels_N = _compact(selected_N)
    peak_N = np.asarray(branches.death)[np.maximum(selected_N, 0)]
    probability_N = np.where(labels_N >= 0, np.minimum(branches.density_N / peak_N, 1.0), 0.0)
    order_N = dendrogram.order_N
    labels_out_N, probability_out_N = np.empty_like(labels_N), np.empty_like(probability_N)
    labels_out_N[order_N], probability_out_N[order_N] = labels_N, probability_N
    return labels_out_N, probability_out_N


# ---- distances in tiles ----


def _factors(points_ND: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrices whose product holds the squared distances, short by at most SLACK times the squared norms.

    Centred on the median, which no outlier moves: float32 keeps most digits near the origin.
    """
    centred_ND = (points_ND - np.median(points_ND, axis=0)).astype(np.float32)
    norm_N1 = np.einsum("nd,nd->n", centred_ND, centred_ND)[:, None] * np.float32(1 - SLACK)
    one_N1 = np.ones_like(norm_N1)
    left_NF = np.hstack([-2 * centred_ND, norm_N1, one_N1])
    return left_NF, np.ascontiguousarray(np.hstack([centred_ND, one_N1, norm_N1]).T)


def _nearest_of_block(left_NF: Floats, right_FN: Floats, first: int, count: int) -> Ints:
    """Neighbour indices of the points first … first + KNN_ROWS, all those that could be among the nearest, ranked."""
    left_RF = left_NF[first : first + KNN_ROWS]
    R, N = len(left_RF), right_FN.shape[1]
    rows, columns, values = [], [], []
    bound_R1 = None
    buffer = np.empty(R * min(KNN_COLUMNS, N), np.float32)
    for column in range(0, N, KNN_COLUMNS):
        W = min(KNN_COLUMNS, N - column)
        tile_RW = np.matmul(left_RF, right_FN[:, column : column + W], out=buffer[: R * W].reshape(R, W))
        own = np.arange(max(first, column), min(first + R, column + W))
        tile_RW[own - first, own - column] = np.inf
        if bound_R1 is None:
            bound_R1 = np.partition(tile_RW, min(count, W) - 1, axis=1)[:, min(count, W) - 1, None]
        hit = np.flatnonzero(tile_RW <= bound_R1)
        rows.append(hit // W)
        columns.append(hit % W + column)
        values.append(tile_RW.ravel()[hit])
    row, col, value = np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
    order = np.lexsort((col, value, row))
    begin_R = np.searchsorted(row[order], np.arange(R))
    return np.asarray(col[order][begin_R[:, None] + np.arange(count)])


def _distances(points_ND: Floats, start_E: Ints, stop_E: Ints) -> Floats:
    """Distances of pairs in float64, in pieces: these are exact where the tiles round."""
    length_E = np.empty(len(start_E))
    for low in range(0, len(start_E), 1 << 16):
        piece = slice(low, low + (1 << 16))
        difference = points_ND[start_E[piece]].astype(np.float64) - points_ND[stop_E[piece]]
        length_E[piece] = np.sqrt(np.einsum("ed,ed->e", difference, difference))
    return length_E


def _reach(length_E: Floats, core_N: Floats, start_E: Ints, stop_E: Ints) -> Floats:
    return np.maximum(length_E, np.maximum(core_N[start_E], core_N[stop_E]))


def _in_threads(work: Callable[[int], Any], items: Iterable[int]) -> list[Any]:
    """Maps in as many threads as the matrix library may use, each of its calls on one: the passes between run too."""
    from threadpoolctl import threadpool_info, threadpool_limits

    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


# ---- the spanning tree ----

Edges = tuple[Ints, Ints, Floats]


def _joined(first: Edges, *others: Edges) -> Edges:
    start, stop, weight = (np.concatenate(parts) for parts in zip(first, *others, strict=True))
    return start, stop, weight


def _forest(N: int, edges: Edges) -> Edges:
    """The lightest spanning forest of a graph, ascending by weight."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    start_E, stop_E, weight_E = edges
    low_E, high_E = np.minimum(start_E, stop_E), np.maximum(start_E, stop_E)
    _, unique_E = np.unique(low_E.astype(np.int64) * N + high_E, return_index=True)  # duplicates would be summed
    low_E, high_E, weight_E = low_E[unique_E], high_E[unique_E], weight_E[unique_E]
    # A sparse graph knows no edge of length zero, so lengths are replaced by their ranks.
    levels, rank_E = np.unique(weight_E, return_inverse=True)
    graph = csr_array((rank_E + 1.0, (low_E, high_E)), shape=(N, N))
    forest = minimum_spanning_tree(graph).tocoo()
    rank_F = forest.data.astype(np.int64) - 1
    order_F = np.lexsort((forest.col, forest.row, rank_F))
    return forest.row[order_F], forest.col[order_F], levels[rank_F[order_F]]


def _components(N: int, edges: Edges) -> tuple[int, Ints]:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    graph = csr_array((np.ones(len(edges[0]), np.int8), (edges[0], edges[1])), shape=(N, N))
    count, label_N = connected_components(graph, directed=False)
    return int(count), label_N


def _link_trees(points_ND: Floats, core_N: Floats, edges: Edges) -> Edges:
    """Joins the trees of a forest by short, not necessarily shortest, edges; each round at least halves their number."""
    N = len(points_ND)
    left_NF, right_FN = _factors(points_ND)
    while True:
        count, label_N = _components(N, edges)
        if count == 1:
            return edges
        asked_A = _representatives(label_N, count)
        nearest: list[Ints] = []
        for low in range(0, len(asked_A), KNN_ROWS):
            asked_R = asked_A[low : low + KNN_ROWS]
            tile_RN = left_NF[asked_R] @ right_FN
            tile_RN[label_N[asked_R][:, None] == label_N] = np.inf
            nearest.append(tile_RN.argmin(1))
        stop_A = np.concatenate(nearest)
        weight_A = _reach(_distances(points_ND, asked_A, stop_A), core_N, asked_A, stop_A)
        edges = _forest(N, _joined(edges, (asked_A, stop_A, weight_A)))


def _representatives(label_N: Ints, count: int) -> Ints:
    """A few points of every tree but the largest."""
    order_N = np.argsort(label_N, kind="stable")
    begin_C = np.searchsorted(label_N[order_N], np.arange(count + 1))
    size_C = np.diff(begin_C)
    begin_C, size_C = np.delete(begin_C[:-1], size_C.argmax()), np.delete(size_C, size_C.argmax())
    step_CA = (np.arange(REPRESENTATIVES) * size_C[:, None]) // REPRESENTATIVES
    return np.asarray(np.unique(order_N[begin_C[:, None] + step_CA]))


def _shorten(points_ND: Floats, core_N: Floats, edges: Edges) -> SpanningTree:
    """Makes a spanning tree the minimum one, by all pairs whose edge is lighter than the tree's path between them.

    A path's heaviest edge is, in the order of the dendrogram's leaves, the largest height between its two ends, so
    for a whole tile it is the larger of one number for each row and one for each column.
    """
    N = len(points_ND)
    dendrogram = _Dendrogram.of(SpanningTree(*edges))
    order_N = dendrogram.order_N
    sorted_ND, sorted_core_N = points_ND[order_N], core_N[order_N]
    left_NF, right_FN = _factors(sorted_ND)
    height_N = dendrogram.gap_N

    def shorter(first: int) -> Edges:
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for column, path_R, path_W in _path_bounds(height_N, first):
            hit_E = _tile_hits(left_NF, right_FN, first, column, path_R, path_W)
            start_E, stop_E = hit_E // len(path_W), hit_E % len(path_W)
            path_E = np.maximum(path_R[start_E], path_W[stop_E])
            start_E, stop_E = start_E + first, stop_E + column
            keep_E = np.maximum(sorted_core_N[start_E], sorted_core_N[stop_E]) < path_E
            start_E, stop_E, path_E = start_E[keep_E], stop_E[keep_E], path_E[keep_E]
            weight_E = _reach(_distances(sorted_ND, start_E, stop_E), sorted_core_N, start_E, stop_E)
            keep_E = weight_E < path_E
            found.append((order_N[start_E[keep_E]], order_N[stop_E[keep_E]], weight_E[keep_E]))
        return _joined(found[0], *found[1:])

    better = _in_threads(shorter, range(0, N, TILE))
    return SpanningTree(*_forest(N, _joined(edges, *better)))


def _path_bounds(height_N: Floats, first: int) -> Iterator[tuple[int, Floats, Floats]]:
    """For each tile right of the diagonal: its first column, and the heaviest height on each row's and column's way.

    The tile on the diagonal comes as single rows would need; its bound is the block's largest height, which is loose,
    so it is cut into the quarters above its diagonal until they are small.
    """
    N = len(height_N)
    row_R = np.append(height_N[first + 1 : first + TILE], 0.0)
    row_R = np.maximum.accumulate(row_R[::-1])[::-1]
    between = 0.0
    for column in range(first + TILE, N, TILE):
        column_W = np.maximum.accumulate(height_N[column : column + TILE])
        yield column, np.maximum(row_R, between), column_W
        between = max(between, float(column_W[-1]))
