"""Compares clustering settings: encoder layer, pooling, reduction, algorithm.

Shape letters: N utterances, D embedding width, B utterances of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from common.clustering.cluster import Algorithm, cluster
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
    options: Mapping[str, Any],
    *,
    reductions: Sequence[Reduction] = REDUCTIONS,
) -> list[dict[str, Any]]:
    """Clusters every combination of the settings; one row per combination.

    The algorithm `etiology` evaluates the corpus's own etiologies as if they were clusters; it is omitted if there is
    only one.

    Args:
        points: vectors_ND by layer and pooling, all of the same utterances.
        groups: "etiology" and "speaker" of each utterance.
        options: further arguments of `cluster`, for all combinations.

    Returns:
        Rows of layer, pooling, reduce, algorithm; clusters, noise_share, silhouette (None for one cluster), largest
        (share of the largest cluster), etiology and speaker (adjusted Rand index against them). A combination that
        fails has `problem` instead.
    """
    algorithms = [name for name in ALGORITHMS if name != "etiology" or len(set(groups["etiology"])) > 1]
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
    options: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        clusters = cluster(
            points_ND, etiologies=groups["etiology"], reduce=reduce, algorithm=algorithm, allow_reduce=True, **options
        )
    except DataError as error:
        return {"problem": str(error)}
    report = cluster_report(clusters, clusters.reduced_NP, groups=groups, seed=options["seed"])
    return {
        "clusters": report["clusters"],
        "noise_share": report["noise_share"],
        "silhouette": report["silhouette"],
        "largest": max(report["sizes"]) / len(points_ND),
        **report["adjusted_rand"],
    }
