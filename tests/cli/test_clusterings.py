"""`moe-asr clusterings` on a finished run: ways of embedding and clustering."""

import json

import pytest
from click.testing import CliRunner

from cli.clusterings import clusterings
from common.errors import DataError
from stages.inputs import load_corpus
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import micro_config


@pytest.fixture(scope="module")
def store(tmp_path_factory, micro_model, tones):
    """A store with three runs of the same corpus: pre-trained, routed by speaker, and with one expert."""
    folder = tmp_path_factory.mktemp("clusterings") / "store"
    (folder.parent / "corpus").symlink_to(tones)
    run_pipeline(micro_config(folder, micro_model, tones, asr__epochs=1))
    run_pipeline(micro_config(folder, micro_model, tones, asr__epochs=1, asr__route_by="speaker", run="by-speaker"))
    run_pipeline(
        micro_config(folder, micro_model, tones, asr__epochs=1, asr__pretrain="none", num_experts=1, run="one")
    )
    return folder


def ask(store, *words):
    name, *options = words
    places = [str(store.parent / "corpus"), "--store", str(store), "--device", "cpu"]
    done = CliRunner().invoke(clusterings, [name, *places, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.filterwarnings("ignore:n_jobs value:UserWarning")
def test_a_run_gets_other_ways_of_clustering(store):
    asked = ("micro", "--samples", "40", "--layer", "1", "--layer", "-1")
    report = json.loads(ask(store, *asked, "--json"))
    assert {(row["layer"], row["reduce"]) for row in report} == {
        (layer, reduce) for layer in (-1, 1) for reduce in ("none", "pca", "umap")
    }
    assert [row["algorithm"] for row in report if row["own"]] == ["spectral"]
    said = ask(store, *asked)
    for word in ("layer 1 mean, pca, spectral", "(own)", "ARI speaker"):
        assert word in said


def test_the_corpus_is_opened_with_the_runs_own_base_model(store, micro_model, monkeypatch):
    names = []

    def opening(config, cache):
        names.append(config.model.name)
        return load_corpus(config, cache)

    monkeypatch.setattr("stages.clusterings.load_corpus", opening)
    ask(store, "micro", "--samples", "40")
    assert names == [str(micro_model)]


def test_a_run_routed_by_speaker_gave_each_speaker_one_routing(store):
    record = json.loads((store / "by-speaker" / "run.json").read_text())
    folder = store / "artifacts" / "asr" / record["tasks"]["asr"]["key"]
    rows = [json.loads(line) for line in next(folder.glob("*/predictions.jsonl")).read_text().splitlines()]
    routings = {(row["speaker"], tuple(row["experts"]), tuple(row["weights"])) for row in rows}
    assert len(routings) == len({row["speaker"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("run", "message"), [("one", "has at most one expert, and so no gate"), ("nothing", "no run 'nothing'")]
)
def test_a_run_without_a_gate_gets_one_line(store, run, message):
    with pytest.raises(DataError, match=message) as caught:
        ask(store, run)
    assert "\n" not in str(caught.value)
