"""The cluster stage: threads are left as they were, and poor clusters are said to be poor."""

import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from common.clustering.embeddings import write_table
from common.config import validate
from common.data.corpus import read_corpus
from common.errors import DataError
from common.json_files import read_rows
from common.pipeline.metrics import MetricsLog
from common.pipeline.stage import Context
from stages.cluster.run import run


@pytest.fixture
def cluster_stage(tones, tmp_path):
    """Runs the stage on 108 tones with these embeddings: (its report, the manifest's summary)."""
    corpus = read_corpus(tones)

    def stage(points_ND: np.ndarray, num_experts: int = 3, **options) -> tuple[dict, dict]:
        config = validate({"num_experts": num_experts, "subsets": {"embeddings_percent": 100}, "cluster": options})
        write_table(tmp_path / "embeddings", [u.id for u in corpus.utterances], points_ND)
        (tmp_path / "output").mkdir(exist_ok=True)
        context = Context(None, None, None, None, MetricsLog(None), None, lambda: False, tmp_path)
        run(config, context, corpus=corpus, embeddings=[tmp_path / "embeddings"], output=tmp_path / "output")
        return json.loads((tmp_path / "output" / "report.json").read_text(encoding="utf-8")), context.summary

    stage.groups_N = np.unique([u.etiology for u in corpus.utterances], return_inverse=True)[1]
    return stage


def test_the_map_is_a_sample_of_many_utterances(cluster_stage, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.cluster.run.PLOTTED", 50)
    cluster_stage(np.random.default_rng(0).normal(size=(108, 8)).astype(np.float32), reduce="none", plot="pca")
    mapped, assigned = (read_rows(tmp_path / "output" / f"{name}.jsonl") for name in ("projection", "assignments"))
    assert (len(mapped), len(assigned)) == (50, 72)


def processor_ticks() -> dict[str, int]:
    """Time that each thread of this process has used."""
    used = {}
    for thread in Path("/proc/self/task").iterdir():
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        used[thread.name] = int(fields[11]) + int(fields[12])
    return used


def busy_threads() -> int:
    """How many threads use the processor while torch computes for a fifth of a second of this one."""
    before, end = processor_ticks(), time.thread_time() + 0.2
    values = torch.rand(128, 128)
    while time.thread_time() < end:
        values = (values @ values).softmax(-1)
    return sum(ticks - before.get(thread, 0) > 2 for thread, ticks in processor_ticks().items())


def limits() -> dict[str, int]:
    return {os.path.basename(pool["filepath"]): pool["num_threads"] for pool in threadpool_info()}  # noqa: PTH119


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux does")
def test_the_stage_leaves_the_number_of_threads_as_it_was(cluster_stage):
    """UMAP's compiler, on OpenMP, would raise torch's threads to the number of processors."""
    torch.set_num_threads(1)
    busy_threads()  # loads what torch computes with
    before = torch.get_num_threads(), busy_threads(), limits()
    cluster_stage(
        np.eye(3, 20)[cluster_stage.groups_N] + np.random.default_rng(0).normal(0, 0.1, (108, 20)), plot="umap"
    )
    after = torch.get_num_threads(), busy_threads(), limits()
    import numba  # not before the stage has set its cache

    assert after[:2] == before[:2] == (1, 1)
    assert numba.threading_layer() == "workqueue"  # also where an earlier test of this process had started it
    assert {name: after[2][name] for name in before[2]} == before[2]


def test_poor_clusters_are_a_warning_with_what_was_asked_for(cluster_stage, caplog):
    noise_ND = np.random.default_rng(0).normal(size=(108, 20))
    with caplog.at_level(logging.WARNING):
        report, summary = cluster_stage(noise_ND, plot="none")
    assert [record.getMessage() for record in caplog.records] == [report["warning"]]
    assert f"Poor clustering: {report['clusters']} of 3 groups asked for were found" in report["warning"]
    assert "the adjusted Rand index is" in report["warning"]
    assert summary["warning"] == report["warning"] and summary["clusters_wanted"] == 3


def test_the_corpus_has_as_many_groups_as_it_has(cluster_stage, caplog):
    """Three etiologies are no poor clustering where 8 experts are the most, and too few where all 8 are needed."""
    noise_ND = np.random.default_rng(0).normal(size=(108, 20))
    options = {"num_experts": 8, "algorithm": "etiology", "plot": "none"}
    with pytest.raises(DataError, match="found 3 clusters in 72 utterances where --num-experts wants 8"):
        cluster_stage(noise_ND, **options, reduce_experts=False)
    report, _ = cluster_stage(noise_ND, **options)
    assert (report["clusters"], report["clusters_wanted"], report["warning"]) == (3, 8, "") and not caplog.records


def test_clear_groups_are_no_warning(cluster_stage, caplog):
    clear_ND = np.eye(3, 20)[cluster_stage.groups_N] + np.random.default_rng(0).normal(0, 0.1, (108, 20))
    report, summary = cluster_stage(clear_ND, plot="none")
    assert report["adjusted_rand"]["etiology"] == 1.0 and report["clusters"] == 3
    assert report["warning"] == summary["warning"] == "" and not caplog.records
