"""Compares clustering settings: encoder layer, pooling, reduction, algorithm.

Shape letters: N utterances, D embedding width, B utterances of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from common.clustering.cluster import Algorithm, Clustering, cluster, known_groups
from common.clustering.reduction import Reduction
from common.clustering.report import cluster_report
from common.data.batches import BatchLoader, Example, epoch_batches
from common.data.features import log_mel
from common.errors import DataError
from common.model.recogniser import Recogniser
from common.model.whisper import encode_layers, pool

Source = tuple[int, str]  # layer, pooling
REDUCTIONS: tuple[Reduction, ...] = ("none", "pca", "umap")
ALGORITHMS: tuple[Algorithm, ...] = ("hdbscan", "spectral", "etiology")
PART = 0.8  # of the utterances, clustered again to see whether the groups stay
REPEATS = 3


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Settings shared by all compared clusterings; names as in `common.config.Config` and
    `common.sections.ClusterConfig`.
    """

    num_experts: int
    reduce_dim: int
    min_cluster_size: int
    min_samples: int
    seed: int


def embed_layers(
    recogniser: Recogniser,
    examples: Sequence[Example],
    loader: BatchLoader,
    accelerator: Accelerator,
    *,
    layers: Sequence[int],
    poolings: Sequence[str],
    batch_seconds: float,
) -> dict[Source, npt.NDArray[np.float32]]:
    """Embeddings of the frozen encoder at several layers, each utterance encoded once.

    Args:
        loader: of these examples.
        layers, poolings: as of `common.sections.ExtractConfig`.
        batch_seconds: padded audio per batch.

    Returns:
        (layer, pooling) → vectors_ND in the order of `examples`.
    """
    if recogniser.slot is not None:
        recogniser.slot.routing = None
    vectors: dict[Source, dict[str, torch.Tensor]] = {(layer, name): {} for layer in layers for name in poolings}
    batches = epoch_batches(examples, batch_size=1, batch_seconds=batch_seconds, shuffle=False)
    with torch.inference_mode(), accelerator.autocast():
        for batch in loader(batches):
            hidden = encode_layers(recogniser.whisper, log_mel(batch.audio_BS, recogniser.mel_bands), layers)
            for (layer, name), rows in vectors.items():
                pooled_BD = pool(hidden[layer], batch.valid_B.to(hidden[layer].device), name)
                rows |= dict(zip(batch.ids, pooled_BD.float().cpu(), strict=True))
    return {source: torch.stack([rows[example.id] for example in examples]).numpy() for source, rows in vectors.items()}


def compare_clusterings(
    points: Mapping[Source, npt.NDArray[np.float32]],
    groups: Mapping[str, Sequence[str]],
    options: ClusterOptions,
    *,
    reductions: Sequence[Reduction] = REDUCTIONS,
    algorithms: Sequence[Algorithm] = ALGORITHMS,
) -> list[dict[str, Any]]:
    """Clusters every combination of the settings; one row per combination.

    Args:
        points: vectors_ND by layer and pooling, all of the same utterances.
        groups: "etiology" and "speaker" of each utterance.
        algorithms: `etiology` evaluates the corpus's own etiologies as if they were clusters; it is omitted if there
            is only one.

    Returns:
        Rows of layer, pooling, reduce, algorithm; clusters, noise_share, silhouette (None for one cluster), largest
        (share of the largest cluster), etiology and speaker (adjusted Rand index against them), stability (mean
        adjusted Rand index between the clusters of three random samples of four fifths and those of all utterances;
        None for known groups). A combination that fails has `problem` instead.
    """
    if len(set(groups["etiology"])) < 2:
        algorithms = [name for name in algorithms if name != "etiology"]
    rows = []
    for (layer, pooling), points_ND in points.items():
        for reduce in reductions:
            for algorithm in algorithms:
                row = {"layer": layer, "pooling": pooling, "reduce": reduce, "algorithm": algorithm}
                rows.append(row | _judge(points_ND, groups, reduce, algorithm, options))
    return rows


def _judge(
    points_ND: npt.NDArray[np.float32],
    groups: Mapping[str, Sequence[str]],
    reduce: Reduction,
    algorithm: Algorithm,
    options: ClusterOptions,
) -> dict[str, Any]:
    try:
        clusters = _cluster(points_ND, groups["etiology"], reduce, algorithm, options)
    except DataError as error:
        return {"problem": str(error)}
    report = cluster_report(clusters, clusters.reduced_NP, groups=groups, seed=options.seed)
    stability = None if algorithm == "etiology" else _stability(points_ND, clusters, reduce, algorithm, options)
    return {
        "clusters": report["clusters"],
        "noise_share": report["noise_share"],
        "silhouette": report["silhouette"],
        "largest": max(report["sizes"]) / len(points_ND),
        **report["adjusted_rand"],
        "stability": stability,
    }


def _cluster(
    points_ND: npt.NDArray[np.float32],
    etiologies: Sequence[str],
    reduce: Reduction,
    algorithm: Algorithm,
    options: ClusterOptions,
) -> Clustering:
    settings = asdict(options)
    wanted, seed, dim = settings.pop("num_experts"), settings.pop("seed"), settings.pop("reduce_dim")
    if algorithm == "etiology":
        return known_groups(points_ND, etiologies, reduce=reduce, reduce_dim=dim, seed=seed)
    return cluster(
        points_ND,
        num_clusters=wanted,
        algorithm=algorithm,
        reduce=reduce,
        reduce_dim=dim,
        allow_reduce=True,
        seed=seed,
        **settings,
    )


def _stability(
    points_ND: npt.NDArray[np.float32],
    whole: Clustering,
    reduce: Reduction,
    algorithm: Algorithm,
    options: ClusterOptions,
) -> float | None:
    """Stability of the clusters; None if the samples are too small to be clustered."""
    from sklearn.metrics import adjusted_rand_score

    generator = np.random.default_rng(options.seed)
    scores = []
    for _ in range(REPEATS):
        part = np.sort(generator.permutation(len(points_ND))[: round(PART * len(points_ND))])
        try:
            clusters = _cluster(points_ND[part], (), reduce, algorithm, options)
        except DataError:
            return None
        scores.append(adjusted_rand_score(whole.labels_N[part], clusters.labels_N))
    return float(np.mean(scores))
