"""Our HDBSCAN against the `hdbscan` package, and its tree against one from all pairs."""

import warnings

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

from common.clustering.hdbscan import flat_clusters, spanning_tree
from common.clustering.neighbours import nearest_neighbours


def speech_like(N: int, D: int = 50, seed: int = 0, groups: int = 8) -> np.ndarray:
    """Points of speakers within groups, on axes of falling variance as PCA gives them."""
    rng = np.random.default_rng(seed)
    spread_D = np.arange(1, D + 1) ** -0.5
    speakers = max(N // 40, groups)
    group_GD = rng.normal(size=(groups, D)) * spread_D * 4
    speaker_SD = group_GD[rng.integers(0, groups, speakers)] + rng.normal(size=(speakers, D)) * spread_D * 2
    points_ND = speaker_SD[rng.integers(0, speakers, N)] + rng.normal(size=(N, D)) * spread_D
    return points_ND.astype(np.float32)


def prim(length_NN: np.ndarray) -> np.ndarray:
    """Lengths of a minimum spanning tree, ascending."""
    outside_N, reach_N, lengths = np.ones(len(length_NN), bool), length_NN[0].copy(), []
    outside_N[0] = False
    while outside_N.any():
        nearest = int(np.where(outside_N, reach_N, np.inf).argmin())
        lengths.append(reach_N[nearest])
        outside_N[nearest] = False
        reach_N = np.minimum(reach_N, length_NN[nearest])
    return np.sort(lengths)


def reference(points_ND: np.ndarray, min_cluster_size: int, min_samples: int, selection: str = "eom"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference, on import and from scikit-learn under it
        import hdbscan

        return hdbscan.HDBSCAN(
            min_cluster_size=min_cluster_size,
            min_samples=min_samples,
            approx_min_span_tree=False,
            algorithm="prims_kdtree",
            core_dist_n_jobs=1,
            cluster_selection_method=selection,
        ).fit(points_ND)


@pytest.mark.parametrize(("N", "D"), [(2, 3), (40, 2), (700, 50), (2500, 10)])
def test_nearest_neighbours_are_those_of_all_pairs(N, D):
    points_ND = speech_like(N, D)
    count = min(7, N - 1)
    index_NK, distance_NK = nearest_neighbours(points_ND, count)
    all_NN = cdist(points_ND.astype(np.float64), points_ND.astype(np.float64))
    np.testing.assert_allclose(np.take_along_axis(all_NN, index_NK.astype(int), 1), distance_NK)
    np.fill_diagonal(all_NN, np.inf)
    np.testing.assert_allclose(distance_NK, np.sort(all_NN, axis=1)[:, :count], rtol=1e-12)


@pytest.mark.parametrize("kind", ["speech", "noise", "far apart", "with copies", "off centre"])
def test_the_spanning_tree_is_as_light_as_that_of_all_pairs(kind):
    rng = np.random.default_rng(1)
    points_ND = {
        "speech": lambda: speech_like(1500),
        "noise": lambda: rng.normal(size=(1500, 30)),
        "far apart": lambda: speech_like(1200, groups=60) + 1e3 * rng.integers(0, 2, (1200, 1)),
        "with copies": lambda: np.repeat(speech_like(150), 10, axis=0),
        "off centre": lambda: speech_like(1200) + 500.0,
    }[kind]()
    tree = spanning_tree(points_ND, 5)
    all_NN = cdist(points_ND.astype(np.float64), points_ND.astype(np.float64))
    core_N = np.sort(all_NN, axis=1)[:, 5]
    reach_NN = np.maximum(all_NN, np.maximum(core_N[:, None], core_N))
    assert len(tree.weight_E) == len(points_ND) - 1
    assert (np.diff(tree.weight_E) >= 0).all()
    np.testing.assert_allclose(tree.weight_E, prim(reach_NN), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("N", "min_cluster_size", "min_samples"), [(60, 2, 3), (400, 5, 5), (3000, 5, 5), (3000, 20, 5)]
)
def test_labels_and_probabilities_equal_those_of_the_hdbscan_package(N, min_cluster_size, min_samples):
    points_ND = speech_like(N, seed=3)
    labels_N, probability_N = flat_clusters(spanning_tree(points_ND, min_samples), min_cluster_size)
    expected = reference(points_ND, min_cluster_size, min_samples)
    assert expected.labels_.max() > 0
    assert adjusted_rand_score(expected.labels_, labels_N) >= 0.99
    assert np.mean((labels_N < 0) == (expected.labels_ < 0)) >= 0.99
    assert np.mean(np.abs(probability_N - expected.probabilities_) < 1e-6) >= 0.98


@pytest.mark.parametrize("min_cluster_size", [5, 30])
def test_leaves_equal_those_of_the_hdbscan_package(min_cluster_size):
    points_ND = speech_like(1500, seed=4)
    labels_N, probability_N = flat_clusters(spanning_tree(points_ND, 5), min_cluster_size, leaves=True)
    expected = reference(points_ND, min_cluster_size, 5, "leaf")
    assert expected.labels_.max() > 1
    assert adjusted_rand_score(expected.labels_, labels_N) >= 0.99
    assert np.mean(np.abs(probability_N - expected.probabilities_) < 1e-6) >= 0.98


def test_one_tree_serves_every_cluster_size():
    tree = spanning_tree(speech_like(800), 5)
    found = [int(flat_clusters(tree, size)[0].max()) for size in (40, 20, 10, 5)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_tiles_at_the_edges_change_nothing(monkeypatch):
    points_ND = speech_like(700)
    whole = spanning_tree(points_ND, 5)
    monkeypatch.setattr("common.clustering.hdbscan.TILE", 64)
    monkeypatch.setattr("common.clustering.neighbours.COLUMNS", 96)
    monkeypatch.setattr("common.clustering.neighbours.ROWS", 50)
    tiled = spanning_tree(points_ND, 5)
    np.testing.assert_allclose(whole.weight_E, tiled.weight_E, rtol=1e-12)


def test_the_same_points_give_the_same_tree_and_labels_twice():
    points_ND = speech_like(900)
    first, second = spanning_tree(points_ND, 5), spanning_tree(points_ND, 5)
    np.testing.assert_array_equal(first.start_E, second.start_E)
    np.testing.assert_array_equal(first.weight_E, second.weight_E)
    np.testing.assert_array_equal(flat_clusters(first, 5)[0], flat_clusters(second, 5)[0])
