"""Who chooses: a gate trained on labels of the corpus, and the benchmark's controls."""

import json
from dataclasses import replace

import pytest

from common.data.corpus import read_corpus
from common.data.groups import group_values, shuffled_names
from common.errors import DataError
from common.evaluation.evaluate import choose_utterances, decode_corpus
from common.inference.load_model import open_model
from common.json_files import read_rows
from common.storage import open_store
from stages.local_runner import run_pipeline
from stages.settings import decoding_options
from stages.sweep import plan_sweep, run_sweep
from tests.stages.test_local_runner import micro_config
from tests.stages.test_pretrained import folders


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, micro_model, tones):
    """(store, summary) of a run whose gate learns etiologies, and whose experts are pre-trained by it."""
    store = tmp_path_factory.mktemp("labelled") / "store"
    config = micro_config(store, micro_model, tones, gating__target="etiology", asr__pretrain="experts")
    return store, run_pipeline(config)


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_gate_of_labels_has_an_expert_for_each_and_names_them(labelled):
    store, summary = labelled
    names = ["high", "low", "typical"]
    (gate,), (model,) = folders(store, "gating"), folders(store, "asr")
    assert report(gate)["labels"] == names and report(model)["groups"] == names
    assert [report(folder)["group"] for folder in folders(store, "experts")] == names
    assert report(model)["experts"] == 3  # though two clusters were asked for
    assert set(report(gate)["against_clusters"]) == {"adjusted_rand", "purity"}
    assert report(gate)["held_out_speakers"]["groups"] == "etiology"
    page = (store / "micro" / "report.html").read_text()
    assert "groups by etiology" in page and ">typical<" in page and "adjusted Rand" in page
    assert summary["hint"] in page.replace("&#39;", "'")


def test_it_learns_from_every_training_utterance_that_has_a_label(labelled, tones):
    rows = read_rows(folders(labelled[0], "gating")[0] / "assignments.jsonl")
    train = read_corpus(tones).split("train")
    assert {row["id"]: ("high", "low", "typical")[row["group"]] for row in rows} == {u.id: u.etiology for u in train}


def test_an_empty_column_is_refused(tmp_path, labelled, micro_model, tones):
    config = micro_config(labelled[0], micro_model, tones, run="empty", gating__target="severity")
    with pytest.raises(DataError, match="column 'severity' is empty in train"):
        run_pipeline(config)


def test_a_drawn_group_belongs_to_a_speaker_and_a_seed(tones):
    utterances = read_corpus(tones).utterances
    names = shuffled_names(3, 7)
    values = group_values(utterances, "shuffled", names)
    assert values == group_values(utterances, "shuffled", names)
    assert values != [name.replace("8-", "7-") for name in group_values(utterances, "shuffled", shuffled_names(3, 8))]
    assert set(values) == set(names)
    by_speaker = {}
    for u, value in zip(utterances, values, strict=True):
        assert by_speaker.setdefault(u.speaker, value) == value
    nobody = [replace(u, speaker="") for u in utterances[:30]]
    assert len(set(group_values(nobody, "shuffled", names))) == 3


def test_the_controls_run_and_their_models_are_evaluated_alike(tmp_path, micro_model, tones):
    store = tmp_path / "store"
    config = micro_config(store, micro_model, tones, run="c", num_experts=3, asr__pretrain="gate")
    runs = plan_sweep(config, ["one-group", "shuffled"], seeds=[5], steps=4)
    run_sweep(runs)
    models = {}
    for run in runs:
        record = json.loads((store / run.name / "run.json").read_text())
        (model,) = (store / "artifacts" / "asr" / record["tasks"]["asr"]["key"]).glob("*/report.json")
        models[run.regime] = json.loads(model.read_text()), json.loads((model.parent / "recogniser.json").read_text())
        rows = read_rows(model.parent / "predictions.jsonl")
        opened = open_model(run.name, store=open_store(store), cache=tmp_path, device="cpu", precision="fp32")
        corpus = read_corpus(tones)
        made = decode_corpus(opened, corpus, choose_utterances(corpus, "test", samples=12), decoding_options(config))
        assert {r["id"]: r["hypothesis"] for r in rows} == {r["id"]: r["hypothesis"] for r in made}
    assert models["one-group"][1]["groups"] == ["everybody"] and models["one-group"][1]["num_experts"] == 1
    assert models["shuffled"][0]["groups"] == ["5-0", "5-1", "5-2"]
