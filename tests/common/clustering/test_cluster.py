"""Clustering: what is found, merged, filled in and refused."""

import warnings

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score

from common.clustering import cluster as module
from common.clustering import spectral
from common.clustering.cluster import cluster, known_groups
from common.errors import DataError

OPTIONS = {"algorithm": "hdbscan", "reduce": "none", "reduce_dim": 50, "allow_reduce": True, "seed": 0}


def blobs(groups: int, each: int, D: int = 12, seed: int = 0, apart: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    """Equal balls of points and the ball of each point, shuffled."""
    rng = np.random.default_rng(seed)
    truth_N = rng.permutation(np.repeat(np.arange(groups), each))
    centre_GD = rng.normal(size=(groups, D))
    centre_GD *= apart / np.linalg.norm(centre_GD, axis=1, keepdims=True)
    return (centre_GD[truth_N] + rng.normal(size=(len(truth_N), D))).astype(np.float32), truth_N


# ---- known groups ----


def test_groups_that_the_corpus_names_are_clusters_by_size():
    points_ND, truth_N = blobs(3, 20)
    names_N = ["slow", "fast", "fast"]
    clusters = known_groups(points_ND, [names_N[i] for i in truth_N], reduce="pca", reduce_dim=5, seed=0)
    np.testing.assert_array_equal(clusters.labels_N, truth_N == 0)  # "fast", twice as many, is cluster 0
    np.testing.assert_allclose(clusters.centroids_KD[1], points_ND[truth_N == 0].mean(0), rtol=1e-4)
    assert not clusters.noise_N.any() and clusters.reduced_NP.shape == (60, 5)


def test_one_group_is_no_clustering():
    points_ND, _ = blobs(2, 5)
    with pytest.raises(DataError, match="all utterances have the etiology 'same'"):
        known_groups(points_ND, ["same"] * 10, reduce="none", reduce_dim=5, seed=0)


# ---- clusters ----


def test_groups_within_two_regions_are_found_as_leaves():
    """Two regions far apart with three groups each: HDBSCAN by persistence sees the regions alone."""
    rng = np.random.default_rng(0)
    truth_N = rng.permutation(np.repeat(np.arange(6), 80))
    centre_GD = np.zeros((6, 12))
    centre_GD[:, 0] = np.where(np.arange(6) < 3, -60.0, 60.0)
    centre_GD[np.arange(6), 1 + np.arange(6)] = 7.0
    points_ND = (centre_GD[truth_N] + rng.normal(size=(480, 12))).astype(np.float32)
    clusters = cluster(points_ND, num_clusters=6, **OPTIONS)
    assert {attempt["clusters"] for attempt in clusters.attempts if "leaves" not in attempt} == {2}
    assert clusters.attempts[-1]["leaves"] == 1
    assert adjusted_rand_score(truth_N, clusters.labels_N) > 0.95
    assert len(cluster(points_ND, num_clusters=2, **OPTIONS).centroids_KD) == 2


@pytest.mark.parametrize("algorithm", ["hdbscan", "spectral"])
def test_clear_groups_are_found_whole(algorithm):
    points_ND, truth_N = blobs(4, 50)
    clusters = cluster(
        points_ND, num_clusters=4, **OPTIONS | {"algorithm": algorithm, "reduce": "pca", "reduce_dim": 5}
    )
    assert adjusted_rand_score(truth_N, clusters.labels_N) == 1.0
    assert clusters.algorithm == algorithm
    assert clusters.merged_from is None
    assert clusters.centroids_KD.shape == (4, points_ND.shape[1])
    for k in range(4):
        np.testing.assert_allclose(
            clusters.centroids_KD[k], points_ND[clusters.labels_N == k].mean(0), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("algorithm", ["hdbscan", "spectral"])
@pytest.mark.parametrize("reduce", ["none", "pca"])
def test_the_same_input_gives_the_same_labels_twice(algorithm, reduce):
    points_ND, _ = blobs(6, 30, apart=5.0)
    first, second = (
        cluster(points_ND, num_clusters=4, **OPTIONS | {"algorithm": algorithm, "reduce": reduce}) for _ in range(2)
    )
    np.testing.assert_array_equal(first.labels_N, second.labels_N)
    np.testing.assert_array_equal(first.centroids_KD, second.centroids_KD)
    np.testing.assert_array_equal(first.probability_N, second.probability_N)


def test_smaller_cluster_sizes_are_tried_until_there_are_enough():
    points_ND, truth_N = blobs(6, 4)
    clusters = cluster(points_ND, num_clusters=6, **OPTIONS, min_samples=2)
    assert [attempt["min_cluster_size"] for attempt in clusters.attempts] == [5, 4]
    assert clusters.attempts[-1]["clusters"] == 6
    assert clusters.min_cluster_size == 4
    assert adjusted_rand_score(truth_N, clusters.labels_N) == 1.0


def test_too_few_clusters_are_accepted_only_when_allowed():
    points_ND, _ = blobs(3, 40)
    clusters = cluster(points_ND, num_clusters=8, **OPTIONS)
    assert [a["min_cluster_size"] for a in clusters.attempts if "leaves" not in a] == [5, 4, 3, 2]
    assert (
        len(clusters.centroids_KD) == clusters.labels_N.max() + 1 == max(a["clusters"] for a in clusters.attempts) < 8
    )
    with pytest.raises(
        DataError, match=r"found \d clusters in 120 utterances where --num-experts wants 8.*no-reduce-experts"
    ):
        cluster(points_ND, num_clusters=8, **OPTIONS | {"allow_reduce": False})


def test_no_cluster_at_all_falls_back_to_spectral_only_when_allowed():
    points_ND = np.random.default_rng(0).normal(size=(10, 8))
    clusters = cluster(points_ND, num_clusters=3, **OPTIONS)
    assert {attempt["clusters"] for attempt in clusters.attempts} == {0}
    assert clusters.algorithm == "spectral"
    assert clusters.min_cluster_size is None
    assert len(clusters.centroids_KD) == 3
    assert not clusters.noise_N.any()
    with pytest.raises(DataError, match="found 0 clusters in 10 utterances"):
        cluster(points_ND, num_clusters=3, **OPTIONS | {"allow_reduce": False})


def test_too_many_clusters_are_merged_with_their_neighbours():
    points_ND, truth_N = blobs(12, 25, apart=15.0, D=20)
    side_N = truth_N % 3
    points_ND[:, :3] += 40.0 * np.eye(3)[side_N]
    clusters = cluster(points_ND, num_clusters=3, **OPTIONS)
    assert clusters.merged_from == 12
    assert adjusted_rand_score(side_N, clusters.labels_N) == 1.0


def test_merging_equals_ward_linkage_where_every_cluster_has_one_point():
    points_ND = np.random.default_rng(2).normal(size=(40, 5))
    merged_N = module._merge(points_ND, np.arange(40), 6)
    expected_N = fcluster(linkage(points_ND, "ward"), 6, "maxclust")
    assert adjusted_rand_score(expected_N, merged_N) == 1.0


def test_noise_joins_the_nearest_centroid_and_stays_marked():
    points_ND, _ = blobs(2, 40, apart=20.0)
    stray_SD = points_ND[:3] + np.array([[30.0], [-30.0], [40.0]], np.float32) * np.eye(12, dtype=np.float32)[9:12]
    clusters = cluster(np.concatenate([points_ND, stray_SD]), num_clusters=2, **OPTIONS)
    noise = np.flatnonzero(clusters.noise_N)
    assert set(range(80, 83)) <= set(noise.tolist())
    assert (clusters.probability_N[noise] == 0).all()
    core_KD = np.stack([points_ND[(clusters.labels_N == k)[:80] & ~clusters.noise_N[:80]].mean(0) for k in range(2)])
    nearest_S = np.linalg.norm(stray_SD[:, None] - core_KD, axis=2).argmin(1)
    np.testing.assert_array_equal(clusters.labels_N[80:], nearest_S)


def test_clusters_are_numbered_from_the_largest():
    points_ND, truth_N = blobs(3, 60)
    kept = np.concatenate([np.flatnonzero(truth_N == g)[: 20 + 15 * g] for g in range(3)])
    clusters = cluster(points_ND[kept], num_clusters=3, **OPTIONS)
    assert np.bincount(clusters.labels_N).tolist() == [50, 35, 20]


def test_one_expert_takes_everything():
    points_ND, _ = blobs(3, 10)
    clusters = cluster(points_ND, num_clusters=1, **OPTIONS)
    assert clusters.labels_N.tolist() == [0] * 30
    assert clusters.algorithm == "hdbscan"


def test_spectral_clustering_agrees_with_scikit_learn():
    points_ND, _ = blobs(5, 60, apart=6.5)
    clusters = cluster(points_ND, num_clusters=5, **OPTIONS | {"algorithm": "spectral"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs_N = SpectralClustering(5, affinity="nearest_neighbors", random_state=0).fit_predict(points_ND)
    assert adjusted_rand_score(theirs_N, clusters.labels_N) >= 0.97


def test_spectral_clustering_is_the_same_whether_the_graph_is_decomposed_whole_or_not(monkeypatch):
    points_ND, _ = blobs(5, 60, apart=6.5)
    whole = cluster(points_ND, num_clusters=5, **OPTIONS | {"algorithm": "spectral"})
    monkeypatch.setattr(spectral, "DENSE_UP_TO", 0)
    partly = cluster(points_ND, num_clusters=5, **OPTIONS | {"algorithm": "spectral"})
    np.testing.assert_array_equal(whole.labels_N, partly.labels_N)


@pytest.mark.parametrize("algorithm", ["hdbscan", "spectral"])
@pytest.mark.parametrize(("N", "wanted"), [(2, 2), (3, 2), (5, 5), (10, 8)])
def test_a_handful_of_utterances_is_enough(algorithm, N, wanted):
    points_ND = np.random.default_rng(N).normal(size=(N, 16)).astype(np.float32)
    clusters = cluster(points_ND, num_clusters=wanted, **OPTIONS | {"algorithm": algorithm, "reduce": "pca"})
    assert sorted(np.unique(clusters.labels_N)) == list(range(len(clusters.centroids_KD)))
    assert np.isfinite(clusters.centroids_KD).all()


@pytest.mark.parametrize("algorithm", ["hdbscan", "spectral"])
def test_copies_of_few_utterances_make_as_many_clusters(algorithm):
    points_ND = np.repeat(np.eye(3, 6, dtype=np.float32), 12, axis=0)
    clusters = cluster(points_ND, num_clusters=8, **OPTIONS | {"algorithm": algorithm})
    assert adjusted_rand_score(np.repeat(np.arange(3), 12), clusters.labels_N) == 1.0
    with pytest.raises(DataError, match="found 3 clusters in 36"):
        cluster(points_ND, num_clusters=8, **OPTIONS | {"algorithm": algorithm, "allow_reduce": False})


@pytest.mark.parametrize("algorithm", ["hdbscan", "spectral"])
def test_of_many_utterances_a_sample_is_clustered_and_the_others_join_it(algorithm, monkeypatch):
    points_ND, truth_N = blobs(4, 100)
    monkeypatch.setattr(module, "SAMPLE", 150)
    clusters = cluster(points_ND, num_clusters=4, **OPTIONS | {"algorithm": algorithm})
    assert clusters.sampled == 150
    assert adjusted_rand_score(truth_N, clusters.labels_N) == 1.0
    assert (clusters.probability_N > 0).sum() == 150 - clusters.noise_N.sum()
    again = cluster(points_ND, num_clusters=4, **OPTIONS | {"algorithm": algorithm})
    np.testing.assert_array_equal(clusters.labels_N, again.labels_N)


# ---- refusals ----


def nan_in_row_7(points_ND):
    points_ND[7, 3] = np.nan
    return points_ND


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda points_ND: points_ND[:1], "at least two utterances and got 1"),
        (lambda points_ND: points_ND[:3], "4 experts for 3 utterances"),
        (lambda points_ND: np.ones_like(points_ND), "all 40 embeddings are equal"),
        (nan_in_row_7, "1 of 40 embeddings are NaN.*first in row 7"),
        (lambda points_ND: points_ND * np.float32(1e30), "40 of 40 embeddings are NaN, infinite or absurdly large"),
    ],
)
def test_what_cannot_be_clustered_is_refused_with_its_numbers(spoil, message):
    points_ND, _ = blobs(4, 10)
    with pytest.raises(DataError, match=message):
        cluster(spoil(points_ND), num_clusters=4, **OPTIONS)
