"""The simulation of a large corpus runs at a micro size, and its arithmetic agrees with a real run."""

import json

import pytest

from bench import scale, scale_parts
from common.data.corpus import read_corpus
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import micro_config

STEPS = [
    "write the index",
    "read the index",
    "subsets",
    "plan",
    "examples",
    "batches by number",
    "batches by seconds",
    "examples to a loader",
    "write embeddings",
    "read embeddings",
    "embeddings of train",
    "cluster",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory, micro_model):
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    words = ["--utterances", "8000", "--width", "24", "--model", str(micro_model), "--out", str(out), "--together"]
    scale.main(words)
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_step_is_measured_at_both_sizes(report):
    assert [(row["utterances"], row["step"]) for row in report["rows"]] == [
        (size, step) for size in (800, 8000) for step in STEPS
    ]
    for row in report["rows"]:
        assert set(row) >= {"step", "utterances", "seconds", "gib", "note", "growth"}
        assert row["seconds"] >= 0 and row["gib"] > 0
        assert row["growth"] is None or row["utterances"] == 8000
    assert set(report) == {"machine", "utterances", "width", "rows", "store", "workflow"}
    assert [len(one["note"]) > 0 for one in report["rows"] if one["step"] == "cluster"] == [True, True]


def test_a_table_holds_every_row(report):
    lines = scale.table(report).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(report["rows"])


def test_growth_is_the_power_of_the_size():
    rows = [
        {"step": "a", "utterances": 10, "seconds": 1.0},
        {"step": "a", "utterances": 100, "seconds": 100.0},
        {"step": "b", "utterances": 100, "seconds": 5.0},
    ]
    assert [row["growth"] for row in scale.with_growth(rows)] == [None, 2.0, None]


def test_simulated_speakers_keep_to_one_split_and_have_all_etiologies(tmp_path):
    scale.step_index(tmp_path, 20_000, 8, tmp_path)
    found = read_corpus(tmp_path / "corpus").utterances
    assert len({(u.speaker, u.split) for u in found}) == len({u.speaker for u in found}) == 53
    assert {u.split for u in found} == {"train", "dev", "test"}
    assert {u.etiology for u in found} == set(scale.ETIOLOGIES)
    assert 7 < sum(u.duration for u in found) / len(found) < 9


def test_a_step_alone_prints_its_rows(tmp_path, micro_model, capsys):
    place = ["--folder", str(tmp_path), "--utterances", "400", "--width", "8", "--model", str(micro_model)]
    scale.main(["--step", "index", *place])
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == ["write the index"]


def test_counted_objects_are_those_of_a_real_run(tmp_path, micro_model, tones):
    config = micro_config(tmp_path / "store", micro_model, tones, asr__epochs=1, extract__shard_size=40)
    run_pipeline(config)
    found = [
        path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*") if path.is_file()
    ]
    embedded = len(read_corpus(tones).utterances)
    counted = scale_parts.objects(embedded, 2, shard_size=40)
    assert sum(name.startswith("artifacts/extract/") for name in found) == scale_parts.PER_SHARD * counted["shards"]
    of_experts = [name for name in found if name.startswith("artifacts/experts/") or "/experts/" in name[15:]]
    assert len(of_experts) == scale_parts.PER_EXPERT * 2
    assert abs(len(found) - counted["objects"]) <= 5


def test_a_workflow_grows_by_its_pieces_and_compresses():
    small, large = scale_parts.workflow_size(10), scale_parts.workflow_size(100)
    assert small["specification"] == large["specification"] > 10_000
    assert large["bytes"] - small["bytes"] == pytest.approx(90 * large["per_piece"], rel=0.05)
    assert large["compressed"] < large["bytes"]
