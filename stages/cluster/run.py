"""Clusters the embeddings of the subset, and reports the agreement of the clusters with etiologies and speakers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from common.clustering.cluster import cluster
from common.clustering.embeddings import read_tables
from common.clustering.reduction import project
from common.clustering.report import cluster_report, poor_clustering
from common.config import Config
from common.data.corpus import Corpus, Utterance
from common.errors import DataError
from common.json_files import write_object, write_rows
from common.pipeline.stage import Context
from stages.inputs import training_subset

log = logging.getLogger(__name__)
PLOTTED = 5000  # points of the map at most


def run(config: Config, context: Context, *, corpus: Corpus, embeddings: list[Path], output: Path) -> None:
    """Writes assignments.jsonl, centroids.npy (K, D), report.json, projection.jsonl and the map."""
    utterances = training_subset(config, corpus, "embeddings")
    points_ND = read_tables(embeddings).rows([u.id for u in utterances])
    context.metrics.progress(0, len(utterances), name="clustering", unit="utterances")
    wanted, options = config.num_experts or 1, config.cluster
    if len(utterances) < wanted and options.algorithm != "etiology":
        raise DataError(
            f"{len(utterances)} utterances cannot make {wanted} clusters: lower --num-experts or raise "
            "subsets.embeddings_percent"
        )
    groups = {"etiology": [u.etiology for u in utterances], "speaker": [u.speaker for u in utterances]}
    clusters = cluster(
        points_ND,
        etiologies=groups["etiology"],
        num_clusters=wanted,
        allow_reduce=options.reduce_experts,
        seed=config.seed,
        **options.model_dump(exclude={"reduce_experts", "plot"}),
    )
    report = cluster_report(clusters, clusters.reduced_NP, groups=groups, seed=config.seed)
    report |= {"clusters_wanted": wanted, "warning": poor_clustering(report, groups, wanted)}
    if report["warning"]:
        log.warning("%s", report["warning"])
    rows = [
        {"id": u.id, "cluster": int(label), "noise": bool(noise), "probability": round(float(probability), 6)}
        for u, label, noise, probability in zip(
            utterances, clusters.labels_N, clusters.noise_N, clusters.probability_N, strict=True
        )
    ]
    write_rows(output / "assignments.jsonl", rows)
    np.save(output / "centroids.npy", clusters.centroids_KD, allow_pickle=False)
    write_object(output / "report.json", report)
    if options.plot != "none":
        _draw(options.plot, clusters.reduced_NP, utterances, rows, config.seed, output)
    context.metrics.progress(len(utterances), len(utterances), name="clustering", unit="utterances")
    context.summary["utterances"] = len(utterances)
    context.summary |= {name: report[name] for name in ("clusters", "clusters_wanted", "noise_share", "warning")}


def _draw(
    method: Literal["umap", "pca", "tsne"],
    points_NP: np.ndarray,
    utterances: Sequence[Utterance],
    rows: list[dict[str, object]],
    seed: int,
    output: Path,
) -> None:
    from common.report.plots import plot_clusters

    chosen = list(range(len(rows)))
    if len(chosen) > PLOTTED:
        chosen = sorted(np.random.default_rng(seed).choice(len(rows), PLOTTED, replace=False).tolist())
    plane_N2 = project(points_NP[chosen], method=method, seed=seed)
    write_rows(
        output / "projection.jsonl",
        [
            {
                "id": utterances[i].id,
                "x": round(float(x), 4),
                "y": round(float(y), 4),
                "cluster": rows[i]["cluster"],
                "etiology": utterances[i].etiology,
                "noise": rows[i]["noise"],
            }
            for i, (x, y) in zip(chosen, plane_N2, strict=True)
        ],
    )
    plot_clusters(output, output)
