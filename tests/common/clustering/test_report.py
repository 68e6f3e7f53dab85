"""The report of a clustering, and what it calls poor."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from common.clustering import report as module
from common.clustering.cluster import Clustering
from common.clustering.report import cluster_report, poor_clustering
from tests.common.clustering.test_cluster import blobs


def clustering_of(labels_N: np.ndarray) -> Clustering:
    N = len(labels_N)
    return Clustering(
        labels_N=labels_N.astype(np.int32),
        noise_N=np.arange(N) % 4 == 0,
        probability_N=np.ones(N, np.float32),
        centroids_KD=np.zeros((int(labels_N.max()) + 1, 2), np.float32),
        attempts=({"min_cluster_size": 5, "clusters": 2},),
        algorithm="hdbscan",
        merged_from=None,
        min_cluster_size=5,
        reduced_NP=np.zeros((N, 2), np.float32),
        sampled=N,
    )


def test_the_report_counts_and_compares():
    points_ND, truth_N = blobs(2, 20, apart=30.0)
    half = np.array(["a", "b"])[np.arange(40) % 2]
    groups = {"etiology": [f"e{g}" for g in truth_N], "speaker": half.tolist(), "site": ["one"] * 40}
    report = cluster_report(clustering_of(truth_N), points_ND, groups=groups, seed=0)
    assert report["sizes"] == [20, 20]
    assert report["clusters"] == 2
    assert report["noise_share"] == 0.25
    assert report["silhouette"] > 0.8
    assert report["purity"]["etiology"] == report["adjusted_rand"]["etiology"] == report["purity"]["site"] == 1.0
    assert report["purity"]["speaker"] == max(np.mean(half[truth_N == 0] == "a"), np.mean(half[truth_N == 0] == "b"))
    assert abs(report["adjusted_rand"]["speaker"]) < 0.2
    assert report["utterances_clustered"] == 40
    assert report["attempts"] == [{"min_cluster_size": 5, "clusters": 2}]


def test_the_silhouette_of_a_sample_is_near_that_of_all_and_repeats(monkeypatch):
    points_ND, truth_N = blobs(4, 100, apart=6.0)
    whole, *_ = (cluster_report(clustering_of(truth_N), points_ND, groups={}, seed=0) for _ in range(1))
    monkeypatch.setattr(module, "SILHOUETTE_SAMPLE", 200)
    first, second = (cluster_report(clustering_of(truth_N), points_ND, groups={}, seed=0) for _ in range(2))
    assert first == second
    assert first["silhouette"] == pytest.approx(whole["silhouette"], abs=0.05)


def test_a_single_cluster_has_no_silhouette():
    points_ND, _ = blobs(1, 9)
    assert cluster_report(clustering_of(np.zeros(9, int)), points_ND, groups={}, seed=0)["silhouette"] is None


def test_a_group_of_another_length_is_a_programming_error():
    with pytest.raises(ValueError, match="'speaker' has 1 values for 9"):
        cluster_report(clustering_of(np.zeros(9, int)), np.zeros((9, 2)), groups={"speaker": ["x"]}, seed=0)


GOOD = {"algorithm": "hdbscan", "clusters": 3, "noise_share": 0.4, "adjusted_rand": {"etiology": 0.3, "speaker": 0.0}}
GROUPS = {"etiology": ["a", "b"], "speaker": ["x", "y"]}


@pytest.mark.parametrize(
    ("changes", "wanted", "words"),
    [
        ({}, 3, []),
        ({"clusters": 2}, 3, ["2 of 3 groups asked for were found"]),
        ({"noise_share": 0.85}, 3, ["3 of 3 groups asked for", "85% of the utterances were noise"]),
        ({"adjusted_rand": {"etiology": 0.0002, "speaker": -0.01}}, 3, ["0.0002 against etiology and -0.0100 against"]),
        ({"clusters": 1, "noise_share": 0.9}, 1, []),
    ],
)
def test_what_is_poor_is_said_with_what_was_asked_for(changes, wanted, words):
    sentence = poor_clustering(GOOD | changes, GROUPS, wanted)
    assert bool(sentence) == bool(words)
    assert all(word in sentence for word in words)


def test_groups_with_a_single_value_are_not_compared():
    report = GOOD | {"adjusted_rand": {"etiology": 0.0, "speaker": 0.0}}
    assert poor_clustering(report, {"etiology": ["a", "a"], "speaker": ["", ""]}, 3) == ""


def test_unrelated_groups_stay_below_the_bound_of_chance():
    rng = np.random.default_rng(0)
    scores = [adjusted_rand_score(*rng.integers(0, 3, (2, 100))) for _ in range(300)]
    assert np.mean(np.array(scores) < module.CHANCE_RAND) > 0.99
