"""HDBSCAN, exact, on matrix products.

Method: Campello, Moulavi & Sander, "Density-Based Clustering Based on Hierarchical Density Estimates" (PAKDD 2013).
The costly part is the minimum spanning tree of the mutual reachability distances max(d(p, q), core(p), core(q)).
Space trees do not prune in the 50 dimensions we cluster in, and neighbour graphs alone are approximate. Here distances
come in tiles from one matrix product each, in three steps: the forest of each point's nearest neighbours; links
between its trees, any that are valid; and one pass over all pairs that finds every edge which can still shorten that
tree, after which the tree is exact. The tree does not depend on min_cluster_size, so trying several is almost free.

Shapes: N points, D coordinates, K neighbours, E edges, C clusters; R and W are the rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.clustering.neighbours import ROWS, Floats, Ints, distances, factors, in_threads, nearest_neighbours

TILE = 1024
REPRESENTATIVES = 4  # of each tree, asked for their nearest stranger


@dataclass(frozen=True, slots=True)
class SpanningTree:
    """A minimum spanning tree of mutual reachability: N-1 edges, ascending by weight."""

    start_E: Ints
    stop_E: Ints
    weight_E: Floats


def spanning_tree(points_ND: Floats, min_samples: int) -> SpanningTree:
    """The exact minimum spanning tree of the points' mutual reachability distances.

    Args:
        points_ND: finite coordinates, N ≥ 2.
        min_samples: the core distance of a point is that to its min_samples-th nearest other point (the count of the
            `hdbscan` package; scikit-learn also counts the point itself).
    """
    N = len(points_ND)
    nearest = min(N - 1, min_samples)
    index_NK, distance_NK = nearest_neighbours(points_ND, min(N - 1, max(12, nearest + 4)))
    core_N = distance_NK[:, nearest - 1].copy()
    start_E = np.repeat(np.arange(N), index_NK.shape[1])
    edges = (start_E, index_NK.ravel(), _reach(distance_NK.ravel(), core_N, start_E, index_NK.ravel()))
    tree = _link_trees(points_ND, core_N, _forest(N, edges))
    return _shorten(points_ND, core_N, tree)


def flat_clusters(tree: SpanningTree, min_cluster_size: int, *, leaves: bool = False) -> tuple[Ints, Floats]:
    """The clusters of greatest excess of mass: those of most persistence, none inside another, never all points.

    Args:
        tree: from `spanning_tree`.
        min_cluster_size: a branch with fewer points (at least 2) is noise that falls out of its parent.
        leaves: the branches that split no further instead: finer clusters, and more noise.

    Returns:
        (labels_N, probability_N): labels from 0, -1 for noise; probability is the share of its cluster's density that
        a point keeps up with, in [0, 1], 0 for noise.
    """
    dendrogram = _Dendrogram.of(tree)
    density_E = 1.0 / np.maximum(
        tree.weight_E, _half_the_smallest(tree.weight_E)
    )  # equal points are not endlessly dense
    branches = _condense(dendrogram, density_E.tolist(), min_cluster_size)
    label_C = _leaves(branches) if leaves else _select(branches)
    selected_N = np.asarray(label_C)[branches.branch_N]
    labels_N = _compact(selected_N)
    # The density at which a cluster lost its last point or split; what lies deeper belongs to it fully.
    peak_N = np.asarray(branches.death)[np.maximum(selected_N, 0)]
    probability_N = np.where(labels_N >= 0, np.minimum(branches.density_N / peak_N, 1.0), 0.0)
    order_N = dendrogram.order_N
    labels_out_N, probability_out_N = np.empty_like(labels_N), np.empty_like(probability_N)
    labels_out_N[order_N], probability_out_N[order_N] = labels_N, probability_N
    return labels_out_N, probability_out_N


# ---- the spanning tree ----

Edges = tuple[Ints, Ints, Floats]


def _reach(length_E: Floats, core_N: Floats, start_E: Ints, stop_E: Ints) -> Floats:
    return np.maximum(length_E, np.maximum(core_N[start_E], core_N[stop_E]))


def _joined(*edges: Edges) -> Edges:
    start, stop, weight = (np.concatenate(parts) for parts in zip(*edges, strict=True))
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
    """Joins the trees of a forest by short, not always shortest, edges; each round at least halves their number."""
    N = len(points_ND)
    left_NF, right_FN = factors(points_ND)
    while True:
        count, label_N = _components(N, edges)
        if count == 1:
            return edges
        asked_A = _representatives(label_N, count)

        def strangers(low: int, asked_A: Ints = asked_A, label_N: Ints = label_N) -> Ints:
            asked_R = asked_A[low : low + ROWS]
            tile_RN = left_NF[asked_R] @ right_FN
            tile_RN[label_N[asked_R][:, None] == label_N] = np.inf
            return np.asarray(tile_RN.argmin(1))

        stop_A = np.concatenate(in_threads(strangers, range(0, len(asked_A), ROWS)))
        weight_A = _reach(distances(points_ND, asked_A, stop_A), core_N, asked_A, stop_A)
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
    """Makes a spanning tree the minimum one, by all pairs whose edge is lighter than the tree's path between them."""
    N = len(points_ND)
    dendrogram = _Dendrogram.of(SpanningTree(*edges))
    order_N = dendrogram.order_N
    sorted_ND, sorted_core_N = points_ND[order_N], core_N[order_N]
    left_NF, right_FN = factors(sorted_ND)
    square_N = np.nextafter((dendrogram.gap_N**2).astype(np.float32), np.float32(np.inf))  # rounded up: misses nothing

    def shorter(first: int) -> Edges:
        found: list[Edges] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        left_RF = left_NF[first : first + TILE]
        buffer = np.empty(TILE * TILE, np.float32)
        for column, row_RX, column_W in _path_tiles(square_N, first):
            R, W = len(row_RX), len(column_W)
            tile_RW = np.matmul(left_RF, right_FN[:, column : column + W], out=buffer[: R * W].reshape(R, W))
            hit_E = np.flatnonzero((tile_RW < row_RX) | (tile_RW < column_W))
            start_E, stop_E = np.divmod(hit_E, W)
            path_E = np.maximum(np.broadcast_to(row_RX, (R, W))[start_E, stop_E], column_W[stop_E])
            start_E, stop_E = start_E + first, stop_E + column
            keep_E = np.maximum(sorted_core_N[start_E], sorted_core_N[stop_E]) ** 2 < path_E
            start_E, stop_E, path_E = start_E[keep_E], stop_E[keep_E], path_E[keep_E]
            weight_E = _reach(distances(sorted_ND, start_E, stop_E), sorted_core_N, start_E, stop_E)
            keep_E = weight_E**2 < path_E
            found.append((order_N[start_E[keep_E]], order_N[stop_E[keep_E]], weight_E[keep_E]))
        return _joined(*found)

    return SpanningTree(*_forest(N, _joined(edges, *in_threads(shorter, range(0, N, TILE)))))


def _path_tiles(square_N: NDArray[np.float32], first: int) -> Iterator[tuple[int, Floats, Floats]]:
    """The heaviest edge, squared, on the tree's path between the points of a tile, the larger of two arrays.

    In the order of the dendrogram's leaves this is the largest height between the two: beside the diagonal the larger
    of one number for each row and one for each column. On the diagonal it is a table; below that there is nothing.

    Yields:
        (first column, row_R1 or row_RW, column_W).
    """
    N, stop = len(square_N), min(first + TILE, len(square_N))
    own_R = square_N[first:stop]
    above_RR = np.maximum.accumulate(np.triu(np.broadcast_to(own_R, (len(own_R), len(own_R))), 1), axis=1)
    yield first, np.where(np.tri(len(own_R), dtype=bool), -np.inf, above_RR), np.full(len(own_R), -np.inf, np.float32)
    row_R = np.maximum.accumulate(np.append(own_R[1:], np.float32(0))[::-1])[::-1]
    for column in range(stop, N, TILE):
        column_W = np.maximum.accumulate(square_N[column : column + TILE])
        yield column, row_R[:, None], column_W
        row_R = np.maximum(row_R, column_W[-1])


# ---- the hierarchy ----


@dataclass(frozen=True, slots=True)
class _Dendrogram:
    """Single linkage: node N+e is what edge e joined, of `children[e]` and with `size[N+e]` points.

    In leaf order a node's points are neighbours, from `begin[node]`; gap_N is the height between a leaf and the one
    before it.
    """

    children: list[tuple[int, int]]
    size: list[int]
    begin: list[int]
    order_N: Ints
    gap_N: Floats

    @classmethod
    def of(cls, tree: SpanningTree) -> _Dendrogram:
        N = len(tree.weight_E) + 1
        children, size = _single_linkage(N, zip(tree.start_E.tolist(), tree.stop_E.tolist(), strict=True))
        begin = [0] * (2 * N - 1)
        for e in range(N - 2, -1, -1):
            left, right = children[e]
            begin[left] = begin[N + e]
            begin[right] = begin[N + e] + size[left]
        begin_M = np.asarray(begin)
        order_N, gap_N = np.empty(N, np.int64), np.zeros(N)
        order_N[begin_M[:N]] = np.arange(N)
        if N > 1:
            gap_N[begin_M[np.asarray(children)[:, 1]]] = tree.weight_E
        return cls(children, size, begin, order_N, gap_N)


def _single_linkage(N: int, edges: Iterable[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Joins points along the edges, lightest first: the two nodes that each edge joins, and every node's size."""
    node, parent = list(range(N)), list(range(N))  # of a union-find: the dendrogram's node at each root
    children, size = [], [1] * N
    for start, stop in edges:
        while parent[start] != start:
            parent[start] = start = parent[parent[start]]
        while parent[stop] != stop:
            parent[stop] = stop = parent[parent[stop]]
        left, right = node[start], node[stop]
        if size[left] < size[right]:
            start, stop = stop, start
        children.append((left, right))
        parent[stop] = start
        node[start] = len(size)
        size.append(size[left] + size[right])
    return children, size


@dataclass(frozen=True, slots=True)
class _Branches:
    """The condensed tree: branches in which only noise falls out; 0 is the root, parents come before children.

    stability is the excess of mass; death the greatest density at which a branch lost a point; branch_N and density_N
    say, in leaf order, from which branch a point fell and at what density.
    """

    parent: list[int]
    stability: list[float]
    death: list[float]
    branch_N: Ints
    density_N: Floats


def _condense(dendrogram: _Dendrogram, density: list[float], min_cluster_size: int) -> _Branches:
    children, size, begin = dendrogram.children, dendrogram.size, dendrogram.begin
    N = len(dendrogram.order_N)
    parent, birth, stability, death = [-1], [0.0], [0.0], [0.0]
    owner = [-1] * (2 * N - 1)  # the branch of a node; -1 where it fell out with a node above it
    owner[-1] = 0
    branch_N, density_N = np.zeros(N, np.int64), np.zeros(N)
    for e in range(N - 2, -1, -1):
        branch = owner[N + e]
        if branch < 0:
            continue
        large = [child for child in children[e] if size[child] >= min_cluster_size]
        death[branch] = density[e]
        if len(large) == 2:
            stability[branch] += (density[e] - birth[branch]) * size[N + e]
            for child in large:
                owner[child] = len(parent)
                parent.append(branch)
                birth.append(density[e])
                stability.append(0.0)
                death.append(0.0)
            continue
        for child in children[e]:
            if child in large:
                owner[child] = branch
            else:
                stability[branch] += (density[e] - birth[branch]) * size[child]
                fallen = slice(begin[child], begin[child] + size[child])
                branch_N[fallen] = branch
                density_N[fallen] = density[e]
    return _Branches(parent, stability, death, branch_N, density_N)


def _select(branches: _Branches) -> list[int]:
    """For each branch the selected one that it is or lies in, -1 if none: each wins unless its children weigh more."""
    best, below = list(branches.stability), [0.0] * len(branches.parent)
    wins = [False] * len(branches.parent)
    for branch in range(len(branches.parent) - 1, 0, -1):
        wins[branch] = below[branch] <= best[branch]
        best[branch] = max(best[branch], below[branch])
        below[branches.parent[branch]] += best[branch]
    chosen = [-1] * len(branches.parent)
    for branch in range(1, len(branches.parent)):
        above = chosen[branches.parent[branch]]
        chosen[branch] = above if above >= 0 else (branch if wins[branch] else -1)
    return chosen


def _leaves(branches: _Branches) -> list[int]:
    """For each branch itself where it has no children, else -1; the trunk is no cluster."""
    inner = set(branches.parent)
    return [-1 if branch == 0 or branch in inner else branch for branch in range(len(branches.parent))]


def _compact(chosen_N: Ints) -> Ints:
    """Labels 0, 1, … instead of branch numbers; -1 stays."""
    used, label_N = np.unique(chosen_N, return_inverse=True)
    return label_N - int(used[0] < 0)


def _half_the_smallest(weight_E: Floats) -> float:
    """Half the smallest length that is not zero: equal points are denser than all others, but their sums are finite."""
    positive_E = weight_E[weight_E > 0]
    return float(positive_E.min() / 2) if len(positive_E) else 1.0
