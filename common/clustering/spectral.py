"""Spectral clustering of the neighbour graph.

Shapes: N utterances, P their width, K clusters, E edges.
"""

import warnings
from typing import Any

import numpy as np

from common.clustering.density import spanning_tree
from common.clustering.reduction import Floats, Ints

NEIGHBOURS = 10
DENSE_UP_TO = 500  # utterances whose graph is decomposed whole


def spectral_clusters(points_NP: Floats, num_clusters: int, seed: int) -> Ints:
    """Spectral clustering (Ng, Jordan & Weiss, NIPS 2001) of the neighbour graph.

    The spanning tree makes the graph connected: otherwise groups without a link would be separated arbitrarily.

    Args:
        points_NP: finite coordinates.
        num_clusters: number of clusters; fewer are found if there are fewer distinct points, since equal points stay
            together.
        seed: random seed of the eigenvectors' start and of k-means.

    Returns:
        labels_N, from 0.
    """
    from scipy.sparse import coo_array, csr_array, dia_array
    from sklearn.neighbors import kneighbors_graph

    points_NP, copy_of_N = np.unique(points_NP, axis=0, return_inverse=True)
    N = len(points_NP)
    if num_clusters >= N:
        return np.asarray(copy_of_N)
    tree = coo_array((np.ones(N - 1), spanning_tree(points_NP)), shape=(N, N))
    directed = csr_array(kneighbors_graph(points_NP, min(NEIGHBOURS, N - 1)) + tree)
    directed.data[:] = 1.0  # an edge of both counts once
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
