"""A finished run's gate, looked at from all sides: the object of gate.json (`moe-asr gate`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.clustering.choices import ClusterOptions, Source, compare_clusterings, embed_layers
from common.clustering.embeddings import EmbeddingTable, read_tables, speaker_means
from common.config import Config, validate
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import Corpus, Utterance, stratified_subset
from common.errors import DataError
from common.evaluation.gate_quality import DecodingSet, NearestClusters, calibration, sensitivity, speaker_consistency
from common.inference.load_model import OpenedModel, open_model
from common.json_files import Row, read_object, read_rows
from common.model.bundle import load_gate
from common.model.gate import Gate
from common.pipeline.runs import run_record, stage_folders
from common.storage.store import Store
from stages.inputs import evaluation_subset, load_corpus, training_subset
from stages.settings import decoding_options

PRETRAINED, JOINT = "pre-trained", "after joint training"


@dataclass(frozen=True, slots=True)
class GateQuestions:
    """What is asked beside calibration and consistency, which cost nothing.

    Attributes:
        counts: numbers of experts to decode with; nothing is decoded without any.
        layers, poolings: clustered beside the run's own; audio is encoded again for these.
        samples: utterances that the ways of clustering are compared on; 0 leaves them out.
    """

    counts: Sequence[int] = (0, 1, 2, 4)
    layers: Sequence[int] = ()
    poolings: Sequence[str] = ()
    samples: int = 2000


@dataclass(frozen=True)
class _Run:
    """What a run left, opened."""

    name: str
    config: Config
    corpus: Corpus
    opened: OpenedModel
    gates: dict[str, Gate]
    table: EmbeddingTable
    split: dict[str, list[Utterance]]
    gating: Path | None
    cluster: Path | None


def examine_gate(name: str, store: Store, cache: Path, asked: GateQuestions, *, device: str = "auto") -> Row:
    """Calibration, consistency, sensitivity to the number of experts, and ways of clustering, of one run.

    Args:
        name: of the run.
        store: that holds it.
        cache: where what is remote is kept.

    Returns:
        Plain values, as gate.json holds them; a section that the run cannot have is None, and `left_out` says why.

    Raises:
        DataError: there is no such run, it is not finished, or it has no gate.
    """
    run = _open(name, store, cache, device)
    info = run.opened.info
    assert info is not None
    tables = {"utterance": run.table}
    if any(u.speaker for u in run.split["test"]):
        tables["speaker"] = speaker_means(run.table, [*run.split["dev"], *run.split["test"]])
    left_out: list[str] = []
    found: Row = {
        "run": run.name,
        "experts": info.num_experts,
        "top_k": info.top_k,
        "mixture": info.mixture,
        "route_by": info.route_by,
        "consistency": [
            {"gate": gate_name, "split": split, "route_by": by}
            | speaker_consistency(gate, table, run.split[split], info.top_k)
            for by, table in tables.items()
            for gate_name, gate in run.gates.items()
            for split in ("dev", "test")
        ],
        "labels": None,
        "calibration": None,
        "sensitivity": None,
        "choices": None,
        "left_out": left_out,
    }
    if run.cluster is not None:
        found |= _calibrations(run, tables[info.route_by])
    else:
        left_out.append("Calibration: this run clustered nothing, so no utterance has a right expert.")
    if asked.counts:
        found["sensitivity"] = _sensitivity(run, tables, asked.counts)
    else:
        left_out.append("Numbers of experts: nothing was decoded, as asked.")
    if asked.samples:
        found["choices"] = _choices(run, asked)
    else:
        left_out.append("Ways of clustering: left out, as asked.")
    return found


def _open(name: str, store: Store, cache: Path, device: str) -> _Run:
    record = run_record(store, name)
    config = validate(record["config"] | {"store": store.url})
    stages = {task["stage"] for task in record["tasks"].values()}
    opened = open_model(record["name"], store=store, cache=cache, device=device, precision=config.precision)
    if opened.recogniser.gate is None:
        raise DataError(f"run {record['name']} has one expert at most, and so no gate: name one with several")
    folders = {stage: stage_folders(store, record, stage, cache) for stage in ("cluster", "gating") if stage in stages}
    gating = folders["gating"][0] if "gating" in folders else None
    corpus = load_corpus(config, cache)
    return _Run(
        name=record["name"],
        config=config,
        corpus=corpus,
        opened=opened,
        gates=({PRETRAINED: load_gate(gating)} if gating else {}) | {JOINT: opened.recogniser.gate},
        table=read_tables(stage_folders(store, record, "extract", cache)),
        split={"dev": evaluation_subset(config, corpus, "dev"), "test": evaluation_subset(config, corpus, "test")},
        gating=gating,
        cluster=folders["cluster"][0] if "cluster" in folders else None,
    )


def _calibrations(run: _Run, table: EmbeddingTable) -> Row:
    """Both gates on utterances that were in no cluster, labelled by their nearest neighbours that were."""
    assert run.cluster is not None
    rows = read_rows(run.cluster / "assignments.jsonl")
    labels = np.array([row["cluster"] for row in rows], np.int64)
    known = NearestClusters(run.table.rows([row["id"] for row in rows]), labels)
    found = []
    if run.gating is not None:
        found.append({"gate": PRETRAINED, "split": "held-out tenth"} | read_object(run.gating / "report.json"))
    for split, utterances in run.split.items():
        ids = [u.id for u in utterances]
        label_N = known.label(run.table.rows(ids))
        found += [
            {"gate": gate_name, "split": split} | calibration(gate, table.rows(ids), label_N)
            for gate_name, gate in run.gates.items()
        ]
    about = {"clustered": len(rows), "agreement": known.agreement(run.config.seed)}
    return {"labels": about, "calibration": found}


def _sensitivity(run: _Run, tables: dict[str, EmbeddingTable], counts: Sequence[int]) -> list[Row]:
    opened, info, test = run.opened, run.opened.info, run.split["test"]
    assert info is not None
    examples = make_examples(run.corpus, test, opened.codec, context=opened.context, margin=opened.margin)
    data = DecodingSet(
        utterances=test,
        examples=examples,
        loader=BatchLoader(examples, num_workers=0, device=opened.accelerator.device),
        codec=opened.codec,
        decoding=decoding_options(run.config),
        accelerator=opened.accelerator,
        language=opened.language,
    )
    wanted = sorted({min(count, info.num_experts) for count in counts})
    trained = (min(info.top_k, info.num_experts), info.route_by)  # clustering may have found fewer than top_k
    return sensitivity(opened.recogniser, data, tables, counts=wanted, trained=trained)


def _choices(run: _Run, asked: GateQuestions) -> list[Row]:
    """Ways of clustering, those of the run's own configuration marked as `own`."""
    config, opened = run.config, run.opened
    pool = training_subset(config, run.corpus, "embeddings")
    some = stratified_subset(pool, count=min(asked.samples, len(pool)), seed=config.seed)
    own: Source = (config.extract.layer, config.extract.pooling)
    points: dict[Source, npt.NDArray[np.float32]] = {own: run.table.rows([u.id for u in some])}
    others = [source for source in _sources(own, asked) if source != own]
    if others:
        examples = make_examples(run.corpus, some, opened.codec, context=opened.context, margin=opened.margin)
        found = embed_layers(
            opened.recogniser,
            examples,
            BatchLoader(examples, num_workers=0, device=opened.accelerator.device),
            opened.accelerator,
            layers=sorted({layer for layer, _ in others}),
            poolings=sorted({pooling for _, pooling in others}),
            batch_seconds=config.runtime.extract_batch_seconds,
        )
        points |= {source: found[source] for source in others}
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


def _sources(own: Source, asked: GateQuestions) -> Iterator[Source]:
    for layer in asked.layers or (own[0],):
        for pooling in asked.poolings or (own[1],):
            yield layer, pooling


def headline(found: Row) -> list[tuple[str, Any]]:
    """The figures that answer first: name and value, of the jointly trained gate on test."""
    rows = [row for row in found["calibration"] or () if (row["gate"], row["split"]) == (JOINT, "test")]
    calibrated = [
        ("accuracy", rows[0]["accuracy"]),
        ("expected calibration error", rows[0]["expected_calibration_error"]),
    ] if rows else []  # fmt: skip
    alike = [r for r in found["consistency"] if (r["gate"], r["split"], r["route_by"]) == (JOINT, "test", "utterance")]
    return [*calibrated, ("a speaker's utterances at one expert", alike[0]["same_expert"])]
