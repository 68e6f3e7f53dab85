"""Dimensionality reduction of embeddings, for clustering and for plots; a memory map is read in chunks.

Shapes: N points, D their width, P the reduced width, K neighbours, B rows of a chunk.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Reduction = Literal["none", "pca", "umap"]
Projection = Literal["umap", "pca", "tsne"]

CHUNK = 4096  # rows in float64 at a time: 40 MiB at 1280 columns
FEWEST_FOR_A_MAP = 5


def reduce_dimensions(points_ND: Floats, *, method: Reduction, dim: int, seed: int) -> NDArray[np.float32]:
    """Embeddings in fewer dimensions.

    Args:
        points_ND: may be a memory map: PCA reads it in chunks, twice.
        method: `none` copies, `pca` is linear, `umap` (McInnes, Healy & Melville 2018) keeps neighbourhoods.
        dim: width of the result; less if the data have fewer than dim + 1 rows or dim columns.
        seed: random seed of UMAP.
    """
    width = min(dim, len(points_ND) - 1, points_ND.shape[1])
    if method == "none":
        return np.array(points_ND, np.float32)
    if method == "pca" or len(points_ND) < FEWEST_FOR_A_MAP:
        return _principal_components(points_ND, width)
    return _umap(np.asarray(points_ND, np.float32), width, seed)


def project(points: Floats, *, method: Projection, seed: int) -> NDArray[np.float32]:
    """Two-dimensional projection for plots, (N, 2). Fewer than five points, which have no neighbourhoods, are projected
    by PCA.
    """
    points_ND = np.asarray(points, np.float32)
    if method == "umap" and len(points_ND) >= FEWEST_FOR_A_MAP:
        return _two_columns(_umap(points_ND, 2, seed))
    if method == "tsne" and len(points_ND) >= FEWEST_FOR_A_MAP:
        from sklearn.manifold import TSNE

        start_N2 = _two_columns(_principal_components(points_ND, min(2, points_ND.shape[1])))
        start_N2 *= 1e-4 / max(float(start_N2[:, 0].std()), 1e-12)  # small, as t-SNE wants its start
        tsne = TSNE(init=start_N2, perplexity=min(30.0, (len(points_ND) - 1) / 3), random_state=seed)
        return np.asarray(tsne.fit_transform(points_ND), np.float32)
    return _two_columns(_principal_components(points_ND, min(2, len(points_ND) - 1, points_ND.shape[1])))


def chunks(points_ND: Floats) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Rows in float64, some thousands at a time, each with the number of its first row."""
    for low in range(0, len(points_ND), CHUNK):
        yield low, np.asarray(points_ND[low : low + CHUNK], np.float64)


def _principal_components(points_ND: Floats, width: int) -> NDArray[np.float32]:
    """Scores on the first principal axes, from a covariance that is summed chunk by chunk.

    Sums are taken about the first chunk's mean, which preserves precision if the mean is large compared with the
    spread. The largest coordinate of each axis is positive, so that the result does not depend on the solver's choice
    of sign.
    """
    from scipy.linalg import eigh

    N, D = points_ND.shape
    origin_D = np.asarray(points_ND[:CHUNK], np.float64).mean(axis=0)
    sum_D, square_DD = np.zeros(D), np.zeros((D, D))
    for _, chunk_BD in chunks(points_ND):
        chunk_BD = chunk_BD - origin_D
        sum_D += chunk_BD.sum(axis=0)
        square_DD += chunk_BD.T @ chunk_BD
    square_DD -= np.outer(sum_D, sum_D / N)
    axes_DP = eigh(square_DD, subset_by_index=(D - width, D - 1))[1][:, ::-1]
    axes_DP = axes_DP * np.sign(axes_DP[np.abs(axes_DP).argmax(axis=0), np.arange(width)])
    mean_D = origin_D + sum_D / N
    return np.concatenate([((chunk_BD - mean_D) @ axes_DP).astype(np.float32) for _, chunk_BD in chunks(points_ND)])


def _umap(points_ND: NDArray[np.float32], width: int, seed: int) -> NDArray[np.float32]:
    """UMAP on exact neighbours, initialised by PCA, because spectral initialisation fails on small and on disconnected
    graphs.
    """
    _set_up_numba()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # warns that TensorFlow is missing, for an unused part
        warnings.filterwarnings("ignore", message=r"precomputed_knn\[2\]")  # new points cannot be added: none will be
        from sklearn.neighbors import NearestNeighbors
        from umap import UMAP

        N = len(points_ND)
        neighbours = NearestNeighbors(n_neighbors=min(14, N - 2)).fit(points_ND)
        distance_NK, index_NK = neighbours.kneighbors()  # the point itself is not among them
        own_N1 = np.arange(N, dtype=index_NK.dtype)[:, None]
        known = (np.hstack([own_N1, index_NK]), np.pad(distance_NK, ((0, 0), (1, 0))).astype(np.float32))
        mapper = UMAP(
            n_components=width,
            n_neighbors=known[0].shape[1],
            precomputed_knn=known,
            init=_umap_start(points_ND, width),
            random_state=seed,
            n_jobs=1,  # more would not be reproducible
        )
        return np.asarray(mapper.fit_transform(points_ND), np.float32)


def _umap_start(points_ND: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    scores_NP = _principal_components(points_ND, min(width, points_ND.shape[1]))
    scores_NP = np.pad(scores_NP, ((0, 0), (0, width - scores_NP.shape[1])))
    return np.asarray(10 * scores_NP / max(float(np.abs(scores_NP).max()), 1e-12), np.float32)


def _set_up_numba() -> None:
    """Sets the threading layer and the cache folder of numba, the compiler that UMAP uses.

    With OpenMP, its default, numba sets the number of threads of the whole process, including torch's, to the number of
    processors, which makes later training several times slower if torch was limited to fewer. Numba's own work queue
    does not change OpenMP; it does not support several UMAPs at once in threads of one process.
    """
    if "NUMBA_CACHE_DIR" not in os.environ:
        os.environ["NUMBA_CACHE_DIR"] = str(_numba_cache())
    import numba

    numba.config.THREADING_LAYER = "workqueue"


def _numba_cache() -> Path:
    """A writable folder: without one, as in a read-only image or without a home folder, numba cannot be loaded."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "moe-asr" / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="moe-asr-numba-"))
    return folder


def _two_columns(points_NP: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.pad(points_NP, ((0, 0), (0, 2 - points_NP.shape[1])))
