"""Quality of the clusters, their agreement with the corpus's groups, and whether they are good enough to train experts.

Shapes: N utterances, P their reduced width, K clusters, V values of a property.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.clustering.cluster import Clustering
from common.clustering.reduction import Floats, Ints

SILHOUETTE_SAMPLE = 5000
MOST_NOISE = 0.5  # with more of it, the groups describe less than half of the speech
CHANCE_RAND = 0.05  # three standard deviations of the adjusted Rand index of unrelated groups of 100 utterances


def cluster_report(
    clustering: Clustering, points_reduced: Floats, *, groups: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Any]:
    """Quality of the clusters, and their agreement with the corpus's groups.

    Args:
        clustering: from `cluster`.
        points_reduced: (N, P), in the space in which they were clustered.
        groups: property → its value for each utterance, {"speaker": […], "etiology": […]}.
        seed: random seed of the sample that is used for the silhouette if there are more than 5,000 points.

    Returns:
        Plain values. The share of noise is that of the utterances that were clustered. Purity is the share of
        utterances whose cluster has mostly their group (1 is best, but many small clusters have it too); the adjusted
        Rand index is 1 for equal partitions and 0 for unrelated ones; the silhouette is in [-1, 1], None for a single
        cluster.
    """
    labels_N = clustering.labels_N
    if wrong := [name for name, values in groups.items() if len(values) != len(labels_N)]:
        raise ValueError(f"group {wrong[0]!r} has {len(groups[wrong[0]])} values for {len(labels_N)} utterances")
    shared = {name: shared_information(values, labels_N) for name, values in groups.items()}
    return {
        "algorithm": clustering.algorithm,
        "clusters": len(clustering.centroids_KD),
        "sizes": np.bincount(labels_N).tolist(),
        "utterances_clustered": clustering.sampled,
        "noise_share": float(clustering.noise_N.sum() / clustering.sampled),
        "silhouette": _silhouette(points_reduced, labels_N, seed),
        "purity": {name: agreement["purity"] for name, agreement in shared.items()},
        "adjusted_rand": {name: agreement["adjusted_rand"] for name, agreement in shared.items()},
        "min_cluster_size": clustering.min_cluster_size,
        "attempts": [dict(attempt) for attempt in clustering.attempts],
        "merged_from": clustering.merged_from,
    }


def shared_information(values: Sequence[str], labels_N: Ints) -> dict[str, float]:
    """Adjusted Rand index and purity of clusters (`labels_N`) against a group of each utterance; 0 for no utterance."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import contingency_matrix

    if not len(values):
        return {"adjusted_rand": 0.0, "purity": 0.0}
    count_VK = contingency_matrix(values, labels_N)
    return {
        "adjusted_rand": float(adjusted_rand_score(values, labels_N)),
        "purity": float(count_VK.max(axis=0).sum() / len(labels_N)),
    }


def poor_clustering(report: Mapping[str, Any], groups: Mapping[str, Sequence[str]], wanted: int) -> str:
    """Description of poor clusters, with the requested values and advice; empty if the clusters are not poor.

    Clusters are poor when there are fewer than asked for, when more than half of the utterances were noise, or when
    they agree with none of the corpus's groups more than chance would. The corpus's own groups are never poor.

    Args:
        report: from `cluster_report`.
        groups: groups of the report; a group with a single value is not compared.
        wanted: number of clusters requested.
    """
    if wanted < 2 or report["algorithm"] == "etiology":
        return ""
    rand = {name: report["adjusted_rand"][name] for name, values in groups.items() if len(set(values)) > 1}
    by_chance = bool(rand) and max(rand.values()) < CHANCE_RAND
    if report["clusters"] >= wanted and report["noise_share"] <= MOST_NOISE and not by_chance:
        return ""
    findings = [f"{report['clusters']} of {wanted} groups asked for were found"]
    if report["noise_share"] > MOST_NOISE:
        findings.append(f"{report['noise_share']:.0%} of the utterances were noise and joined the most similar group")
    if by_chance:
        against = " and ".join(f"{value:.4f} against {name}" for name, value in rand.items())
        findings.append(f"the adjusted Rand index is {against}, where chance gives 0")
    spectral = ", --clustering-algorithm spectral" if report["algorithm"] == "hdbscan" else ""
    return (
        f"Poor clustering: {'; '.join(findings)}. Experts trained on such groups may not differ usefully: try fewer "
        f"--num-experts{spectral}, more utterances (--set subsets.embeddings_percent=100) or --skip-pretraining."
    )


def _silhouette(points_NP: Floats, labels_N: Ints, seed: int) -> float | None:
    from sklearn.metrics import silhouette_score

    chosen = np.arange(len(labels_N))
    if len(chosen) > SILHOUETTE_SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, SILHOUETTE_SAMPLE, replace=False))
    if not 2 <= len(np.unique(labels_N[chosen])) < len(chosen):
        return None
    return float(silhouette_score(points_NP[chosen], labels_N[chosen]))
