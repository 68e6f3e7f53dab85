"""Distances between many points, as tiles of one matrix product each, and exact nearest neighbours from them.

In the tens of dimensions that embeddings keep, space trees visit nearly every pair; a matrix product does that at the
processor's full speed. Tiles round to float32, so they only say which pairs to measure again in float64.

Shapes: N points, D coordinates, F = D + 2 factors, K neighbours, E pairs; R and W are the rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
T = TypeVar("T")

ROWS, COLUMNS = 128, 8192  # a tile of 4 MiB stays in the cache between the passes over it
SLACK = 32 * float(np.finfo(np.float32).eps)  # bounds the rounding of a float32 product, relative to the squared norms


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
    mixed_ND = points_ND[shuffle_N]
    left_NF, right_FN = factors(mixed_ND)
    index_NK, distance_NK = np.empty((N, count), np.int32), np.empty((N, count))

    def fill(first: int) -> None:
        index_NK[first : first + ROWS], distance_NK[first : first + ROWS] = _nearest_of_block(
            mixed_ND, left_NF[first : first + ROWS], right_FN, first, count
        )

    in_threads(fill, range(0, N, ROWS))
    back_N = np.argsort(shuffle_N)
    return shuffle_N[index_NK[back_N]].astype(np.int32), distance_NK[back_N]


def factors(points_ND: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrices whose product holds the squared distances, short by at most SLACK times the squared norms.

    Centred on the median, which no outlier moves: float32 keeps most digits near the origin.
    """
    centred_ND = (points_ND - np.median(points_ND, axis=0)).astype(np.float32)
    norm_N1 = np.einsum("nd,nd->n", centred_ND, centred_ND)[:, None] * np.float32(1 - SLACK)
    one_N1 = np.ones_like(norm_N1)
    left_NF = np.hstack([-2 * centred_ND, norm_N1, one_N1])
    return left_NF, np.ascontiguousarray(np.hstack([centred_ND, one_N1, norm_N1]).T)


def _nearest_of_block(
    points_ND: Floats, left_RF: Floats, right_FN: Floats, first: int, count: int
) -> tuple[Ints, Floats]:
    """Neighbours and distances of the points first, first + 1, …, by three sieves, each exact in what it drops.

    Tiles give lower bounds of squared distances. First the pairs are kept that lie within the true distance of some
    `count` others; then, with the true distances of those that look nearest, the pairs that can be nearer than these.
    """
    R, N = len(left_RF), right_FN.shape[1]
    found: list[tuple[Ints, Ints, Floats]] = []
    reach_R1: Floats | None = None
    buffer = np.empty(R * min(COLUMNS, N), np.float32)
    for column in range(0, N, COLUMNS):
        W = min(COLUMNS, N - column)
        tile_RW = np.matmul(left_RF, right_FN[:, column : column + W], out=buffer[: R * W].reshape(R, W))
        own = np.arange(max(first, column), min(first + R, column + W))
        tile_RW[own - first, own - column] = np.inf
        if reach_R1 is None:
            likely_R1 = np.partition(tile_RW, min(count, W) - 1, axis=1)[:, min(count, W) - 1, None]
            row_E, column_E = np.divmod(np.flatnonzero(tile_RW <= likely_R1), W)
            length_E = distances(points_ND, row_E + first, column_E)
            reach_R1 = _squared(np.maximum.reduceat(length_E, np.searchsorted(row_E, np.arange(R))))[:, None]
        hit = np.flatnonzero(tile_RW <= reach_R1)
        found.append((hit // W, hit % W + column, tile_RW.ravel()[hit]))
    row_E, column_E, low_E = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order_E = np.lexsort((low_E, row_E))
    row_E, column_E, low_E = row_E[order_E], column_E[order_E], low_E[order_E]
    begin_R = np.searchsorted(row_E, np.arange(R))
    length_R = distances(
        points_ND, np.repeat(np.arange(R) + first, count), _first_of_rows(column_E, begin_R, count).ravel()
    )
    near_E = low_E <= _squared(length_R.reshape(R, count).max(axis=1))[row_E]
    row_E, column_E = row_E[near_E], column_E[near_E]
    length_E = distances(points_ND, row_E + first, column_E)
    order_E = np.lexsort((column_E, length_E, row_E))
    begin_R = np.searchsorted(row_E, np.arange(R))
    return _first_of_rows(column_E[order_E], begin_R, count), _first_of_rows(length_E[order_E], begin_R, count)


def _squared(length: Floats) -> NDArray[np.float32]:
    """Squares in float32, rounded up."""
    return np.nextafter((length**2).astype(np.float32), np.float32(np.inf))


def _first_of_rows(value_E: NDArray[Any], begin_R: Ints, count: int) -> NDArray[Any]:
    return np.asarray(value_E[begin_R[:, None] + np.arange(count)])


def distances(points_ND: Floats, start_E: Ints, stop_E: Ints) -> Floats:
    """Distances of pairs in float64, in pieces: these are exact where the tiles round."""
    length_E = np.empty(len(start_E))
    for low in range(0, len(start_E), 1 << 16):
        piece = slice(low, low + (1 << 16))
        difference = points_ND[start_E[piece]].astype(np.float64) - points_ND[stop_E[piece]]
        length_E[piece] = np.sqrt(np.einsum("ed,ed->e", difference, difference))
    return length_E


def in_threads(work: Callable[[int], T], items: Iterable[int]) -> list[T]:
    """Maps in as many threads as the matrix library may use, each of its calls on one: the passes between run too."""
    from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

    threads = max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
