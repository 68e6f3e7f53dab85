"""A finished run's gate on speakers that it was not trained on, and other ways of clustering (`moe-asr gate`).

Shape letters: N utterances, D embedding width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.clustering.choices import ClusterOptions, Source, compare_clusterings, embed_layers
from common.clustering.embeddings import EmbeddingTable, read_tables, speaker_sums
from common.config import Config, merge, validate
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import Corpus, Utterance
from common.data.subsets import stratified_subset
from common.errors import DataError
from common.evaluation.gate_report import gate_report
from common.inference.load_model import OpenedModel, open_model
from common.json_files import Row, read_rows
from common.model.bundle import load_gate
from common.model.gate import Gate
from common.pipeline.runs import run_record, settings_alone, stage_folders
from common.storage.store import Store
from stages.inputs import evaluation_subset, load_corpus, training_subset

Vectors = npt.NDArray[np.float32]
NEIGHBOURS = 5
HELD_OUT = 2000  # clustered utterances, at most


def examine_gate(
    name: str,
    store: Store,
    cache: Path,
    *,
    corpus: str,
    endpoint_url: str | None = None,
    layers: Sequence[int] = (),
    poolings: Sequence[str] = (),
    samples: int = 2000,
    device: str = "auto",
) -> Row:
    """A run's gate on dev and test, and its utterances clustered in several ways.

    Args:
        name: of the run.
        store: holds the run.
        cache: where what is remote is kept.
        corpus: the run's corpus, a folder or an address; its location is not read from the record.
        endpoint_url: endpoint of an S3-compatible store that contains the corpus.
        layers, poolings: further settings to cluster, for which the audio is encoded again.
        samples: number of utterances for the comparison of clusterings; 0 skips the comparison.

    Returns:
        run; gates: accuracy and expected_calibration_error of each gate on each split, against the most frequent
        cluster of an utterance's nearest neighbours (no row in a run without clusters); agreement: how often the
        neighbours predict the cluster of a clustered utterance; clusterings: rows of `compare_clusterings`.

    Raises:
        DataError: there is no such run, it is not finished, or it has no gate.
    """
    record = run_record(store, name)
    place = {"store": store.url, "endpoint_url": endpoint_url, "corpus": {"path": corpus}}
    tree = settings_alone(record)
    opened = open_model(record["name"], store=store, cache=cache, device=device, precision=tree["precision"])
    merge(tree, place | {"model": {"name": str(opened.base)}})
    config = validate(tree)
    if opened.recogniser.gate is None:
        raise DataError(f"run {record['name']} has at most one expert, and so no gate: name a run with several")
    stages = {task["stage"] for task in record["tasks"].values()}
    folders = {stage: stage_folders(store, record, stage, cache) for stage in {"extract", "cluster", "gating"} & stages}
    data, table = load_corpus(config, cache), read_tables(folders["extract"])
    gates = {"pre-trained": load_gate(folders["gating"][0])} if "gating" in folders else {}
    gates["after joint training"] = opened.recogniser.gate
    study: Row = {"run": record["name"], "gates": [], "agreement": None, "clusterings": []}
    if "cluster" in folders:
        stage, column = ("cluster", "cluster") if config.gating.target == "cluster" else ("gating", "group")
        rows = read_rows(folders[stage][0] / "assignments.jsonl")
        labels_N = np.array([row[column] for row in rows], np.int64)
        neighbours, study["agreement"] = neighbours_vote(table.rows([row["id"] for row in rows]), labels_N, config.seed)
        for split in ("dev", "test"):
            utterances = evaluation_subset(config, data, split)
            ids = [u.id for u in utterances]
            together = utterances if config.asr.route_by == "speaker" else ()
            label_N = neighbours.predict(table.rows(ids))
            for which, gate in gates.items():
                report = gate_report(probabilities(gate, table.rows(ids), together), label_N)
                figures = {key: report[key] for key in ("utterances", "accuracy", "expected_calibration_error")}
                study["gates"].append({"gate": which, "split": split} | figures)
    if samples:
        study["clusterings"] = _clusterings(config, data, opened, table, layers, poolings, samples)
    return study


def probabilities(gate: Gate, vectors_ND: Vectors, together: Sequence[Utterance] = ()) -> Vectors:
    """A gate's probability_NE of each expert.

    Args:
        together: the utterances, if the gate decides for all utterances of a speaker together.
    """
    with torch.inference_mode():
        evidence_NF = gate.evidence(torch.from_numpy(vectors_ND).to(gate.mean_D.device)).cpu()
        if together:
            evidence_NF = torch.from_numpy(speaker_sums(evidence_NF.numpy(), together))
    probability_NE: Vectors = evidence_NF[:, : gate.num_experts].softmax(1).numpy()
    return probability_NE


def neighbours_vote(vectors_ND: Vectors, labels_N: npt.NDArray[np.int64], seed: int) -> tuple[Any, float]:
    """A nearest-neighbour classifier, and its accuracy on held-out rows."""
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier

    held = max(1, min(HELD_OUT, len(labels_N) // 5))
    fitted_ND, held_ND, fitted_N, held_N = train_test_split(vectors_ND, labels_N, test_size=held, random_state=seed)
    accuracy = KNeighborsClassifier(min(NEIGHBOURS, len(fitted_N))).fit(fitted_ND, fitted_N).score(held_ND, held_N)
    return KNeighborsClassifier(min(NEIGHBOURS, len(labels_N))).fit(vectors_ND, labels_N), float(accuracy)


def _clusterings(
    config: Config,
    corpus: Corpus,
    opened: OpenedModel,
    table: EmbeddingTable,
    layers: Sequence[int],
    poolings: Sequence[str],
    samples: int,
) -> list[Row]:
    """Clusterings of the same utterances with different settings; `own` marks that of the run's configuration."""
    pool = training_subset(config, corpus, "embeddings")
    some = stratified_subset(pool, count=min(samples, len(pool)), seed=config.seed)
    own: Source = (config.extract.layer, config.extract.pooling)
    points = {own: table.rows([u.id for u in some])}
    if layers or poolings:
        examples = make_examples(corpus, some, opened.codec, context=opened.context, margin=opened.margin)
        points = (
            embed_layers(
                opened.recogniser,
                examples,
                BatchLoader(examples, num_workers=0, device=opened.accelerator.device),
                opened.accelerator,
                layers=sorted(set(layers) or {own[0]}),
                poolings=sorted(set(poolings) or {own[1]}),
                batch_seconds=config.runtime.extract_batch_seconds,
            )
            | points
        )
    options = ClusterOptions(
        num_experts=config.num_experts or 1,
        reduce_dim=config.cluster.reduce_dim,
        min_cluster_size=config.cluster.min_cluster_size,
        min_samples=config.cluster.min_samples,
        seed=config.seed,
    )
    groups = {"etiology": [u.etiology for u in some], "speaker": [u.speaker for u in some]}
    chosen = own, config.cluster.reduce, config.cluster.algorithm
    return [
        row | {"own": ((row["layer"], row["pooling"]), row["reduce"], row["algorithm"]) == chosen}
        for row in compare_clusterings(points, groups, options)
    ]
