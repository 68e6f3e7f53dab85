"""Dense clusters: those of single runs of the package, noise by membership, and a tree as light as one of all pairs."""

import warnings
from importlib import import_module

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

from common.clustering.density import dense_clusters, spanning_tree
from common.clustering.spectral import spectral_clusters


def speech_like(N: int, D: int = 50, seed: int = 0, groups: int = 8, spread: float = 1.0) -> np.ndarray:
    """Points of speakers within groups, on axes of falling variance as PCA gives them."""
    rng = np.random.default_rng(seed)
    spread_D = np.arange(1, D + 1) ** -0.5
    speakers = max(N // 40, groups)
    group_GD = rng.normal(size=(groups, D)) * spread_D * 4
    speaker_SD = group_GD[rng.integers(0, groups, speakers)] + rng.normal(size=(speakers, D)) * spread_D * 2
    noise_ND = rng.normal(size=(N, D)) * spread_D * rng.uniform(1, spread, (N, 1))
    return (speaker_SD[rng.integers(0, speakers, N)] + noise_ND).astype(np.float32)


def reference(points_ND: np.ndarray, min_cluster_size: int, selection: str = "eom", **options):
    """The package with its defaults for Euclidean points: another algorithm, and no tree that is shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hdbscan

        fit = hdbscan.HDBSCAN(
            min_cluster_size=min_cluster_size,
            min_samples=5,
            approx_min_span_tree=False,
            core_dist_n_jobs=1,
            cluster_selection_method=selection,
            **options,
        ).fit(points_ND)
        return fit, hdbscan.all_points_membership_vectors(fit) if options else None


@pytest.mark.parametrize(("N", "size"), [(150, 5), (400, 5), (2000, 20)])
def test_one_try_gives_the_labels_of_the_package(N, size):
    points_ND = speech_like(N, seed=3)
    dense = dense_clusters(points_ND, 2, size, 5)
    expected, _ = reference(points_ND, size)
    assert dense.attempts == ({"min_cluster_size": size, "clusters": int(expected.labels_.max()) + 1},)
    clustered_N = expected.labels_ >= 0
    np.testing.assert_array_equal(dense.noise_N, ~clustered_N)
    assert adjusted_rand_score(expected.labels_[clustered_N], dense.labels_N[clustered_N]) == 1.0
    assert np.mean(np.abs(dense.probability_N - expected.probabilities_) < 1e-6) >= 0.98  # equal edges may be swapped


def test_later_tries_on_the_shared_tree_find_what_they_would_find_alone(monkeypatch):
    points_ND = speech_like(800, seed=4)
    wanted = int(reference(points_ND, 4)[0].labels_.max()) + 2  # one more than can be found: all sizes are tried
    package = import_module("hdbscan.hdbscan_")
    built, build = [], package._hdbscan_prims_kdtree
    monkeypatch.setattr(package, "_hdbscan_prims_kdtree", lambda *a, **o: built.append(1) or build(*a, **o))
    dense = dense_clusters(points_ND, wanted, 10, 5)
    assert built == [1]
    monkeypatch.undo()
    assert [a["min_cluster_size"] for a in dense.attempts if "leaves" not in a] == list(range(10, 1, -1))
    for attempt in (dense.attempts[0], dense.attempts[4], dense.attempts[-1]):
        alone, _ = reference(points_ND, attempt["min_cluster_size"], "leaf" if "leaves" in attempt else "eom")
        assert attempt["clusters"] == int(alone.labels_.max()) + 1
    best = max(dense.attempts, key=lambda attempt: attempt["clusters"])
    assert dense.min_cluster_size == best["min_cluster_size"]


def test_noise_has_the_cluster_of_its_largest_membership():
    points_ND = speech_like(1200, seed=1, spread=5.0)
    dense = dense_clusters(points_ND, 2, 5, 5)
    fit, member_NC = reference(points_ND, 5, prediction_data=True)
    noise_N = fit.labels_ < 0
    assert noise_N.mean() > 0.3
    np.testing.assert_array_equal(dense.noise_N, noise_N)
    assert (dense.probability_N[noise_N] == 0).all()
    cluster_C = np.array([dense.labels_N[fit.labels_ == c][0] for c in range(member_NC.shape[1])])
    # The package's memberships of new points, which are used, differ slightly from those of its own points.
    assert np.mean(dense.labels_N[noise_N] == cluster_C[member_NC[noise_N].argmax(1)]) > 0.99


def test_points_too_few_for_memberships_stay_without_a_cluster():
    points_ND = np.concatenate([np.zeros((4, 3)), np.full((4, 3), 9.0)]) + np.random.default_rng(0).normal(size=(8, 3))
    points_ND = np.append(points_ND, [[500.0, 0, 0]], axis=0)
    dense = dense_clusters(points_ND, 2, 3, 5)
    np.testing.assert_array_equal(dense.labels_N < 0, dense.noise_N)


@pytest.mark.parametrize("points_ND", [speech_like(700), speech_like(300) + 500.0, speech_like(2, groups=1)])
def test_the_spanning_tree_is_as_light_as_that_of_all_pairs(points_ND):
    start_E, stop_E = spanning_tree(points_ND)
    all_NN = cdist(points_ND.astype(np.float64), points_ND.astype(np.float64))
    assert len(start_E) == len(points_ND) - 1
    np.testing.assert_allclose(np.sort(all_NN[start_E, stop_E]), np.sort(minimum_spanning_tree(all_NN).data), rtol=1e-9)


def test_spectral_clusters_of_groups_without_a_link_are_these_groups():
    """Of 25 points each, whose ten nearest neighbours lie in their own group."""
    group_N = np.repeat(np.arange(4), 25)
    points_ND = np.eye(4)[group_N] * 1e3 + np.random.default_rng(0).normal(size=(100, 4))
    assert adjusted_rand_score(group_N, spectral_clusters(points_ND, 4, seed=0)) == 1.0
