"""`moe-asr gate` on a finished run: tables, JSON and one page; the decoding as trained is the run's own."""

import json
import re

import pytest
from click.testing import CliRunner

from cli.gate import gate
from common.errors import DataError, UsageError
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import micro_config


@pytest.fixture(scope="module")
def store(tmp_path_factory, micro_model, tones):
    """A store with three runs of the same corpus: pre-trained, routed by speaker, and with one expert."""
    folder = tmp_path_factory.mktemp("gate") / "store"
    run_pipeline(micro_config(folder, micro_model, tones, asr__epochs=1))
    run_pipeline(micro_config(folder, micro_model, tones, asr__epochs=1, asr__route_by="speaker", run="by-speaker"))
    run_pipeline(
        micro_config(folder, micro_model, tones, asr__epochs=1, asr__pretrain="none", num_experts=1, run="one")
    )
    return folder


def ask(store, *words):
    done = CliRunner().invoke(gate, [*words, "--store", str(store), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.filterwarnings("ignore:n_jobs value:UserWarning")
def test_a_run_gets_tables_json_and_one_page(store, tmp_path):
    out = tmp_path / "gate"
    said = ask(store, "micro", "--out", str(out), "--samples", "40", "--layer", "1", "--layer", "-1")
    found = json.loads((out / "gate.json").read_text())
    page = (out / "gate.html").read_text()
    assert {(row["gate"], row["split"]) for row in found["calibration"]} == {
        ("pre-trained", "held-out tenth"),
        ("pre-trained", "dev"),
        ("pre-trained", "test"),
        ("after joint training", "dev"),
        ("after joint training", "test"),
    }
    assert 0 <= found["labels"]["agreement"] <= 1
    assert [row["top_k"] for row in found["sensitivity"]] == [0, 1, 2, 2]
    assert {(row["layer"], row["reduce"]) for row in found["choices"]} == {
        (layer, reduce) for layer in (-1, 1) for reduce in ("none", "pca", "umap")
    }
    assert [row["algorithm"] for row in found["choices"] if row["own"]] == ["spectral"]
    assert "block 1" in page and "as trained" in page
    assert not re.search(r"<script|<link|<img|https?://(?!www\.w3\.org)", page)
    for word in ("calibration error", "as trained", "ARI speaker", str(out / "gate.html")):
        assert word in said


def test_decoded_as_trained_is_what_the_run_itself_decoded(store):
    summary = json.loads((store / "micro" / "summary.json").read_text())
    rows = json.loads(ask(store, "micro", "--json", "--samples", "0", "--top-k", "1"))["sensitivity"]
    trained = next(row for row in rows if row["trained"])
    assert trained["wer"] == pytest.approx(summary["wer_after"])
    assert trained["interval"] == pytest.approx(summary["wer_interval_after"])
    assert rows[0]["wer"] == pytest.approx(summary["wer_before"])


def test_a_run_routed_by_speaker_gave_each_speaker_one_routing(store):
    record = json.loads((store / "by-speaker" / "run.json").read_text())
    folder = store / "artifacts" / "asr" / record["tasks"]["asr"]["key"]
    rows = [json.loads(line) for line in next(folder.glob("*/predictions.jsonl")).read_text().splitlines()]
    routings = {(row["speaker"], tuple(row["experts"]), tuple(row["weights"])) for row in rows}
    assert len(routings) == len({row["speaker"] for row in rows}) > 1
    found = json.loads(ask(store, "by-speaker", "--json", "--samples", "0", "--top-k", "2"))
    assert found["route_by"] == "speaker"
    summary = json.loads((store / "by-speaker" / "summary.json").read_text())
    trained = [row for row in found["sensitivity"] if row["trained"]]
    assert [(row["top_k"], row["route_by"]) for row in trained] == [(2, "speaker")]
    assert trained[0]["wer"] == pytest.approx(summary["wer_after"])
    alike = {row["same_expert"] for row in found["consistency"] if row["route_by"] == "speaker"}
    assert alike == {1.0}


def test_what_is_left_out_says_why(store):
    found = json.loads(ask(store, "micro", "--json", "--no-decode", "--samples", "0"))
    assert found["sensitivity"] is None and found["choices"] is None
    assert len(found["left_out"]) == 2
    assert found["calibration"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["one"], DataError, "has one expert at most, and so no gate"),
        (["nothing"], DataError, "no run 'nothing'"),
        (["micro", "--top-k", "two"], UsageError, "--top-k two"),
        (["micro", "--top-k", "0"], UsageError, "--top-k 0"),
    ],
)
def test_bad_questions_get_one_line(store, tmp_path, words, error, message):
    with pytest.raises(error, match=message) as caught:
        ask(store, *words, "--out", str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_something_else_is_kept(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds no gate\.json"):
        ask(store, "micro", "--out", str(tmp_path))
