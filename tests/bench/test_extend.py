"""Measurements of extensions: what is measured once, and what is computed from word errors by utterance."""

import json

import pytest

from bench import extend
from bench.table import extension_costs, extension_rows, group_rows, person_rows
from common.data.corpus import read_corpus
from common.errors import DataError
from common.model.whisper import load_whisper
from common.training.added_experts import WAYS
from tests.common.export.test_formats import make_bundle

FROZEN = {"as it is", *WAYS}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, micro_model, tones):
    """The words of a command that measured one group, and what it wrote."""
    folder = tmp_path_factory.mktemp("extend")
    bundle = make_bundle(folder / "bundle", micro_model, experts=2, shared=4)
    words = [
        str(bundle),
        "--new",
        str(tones),
        "--others",
        str(tones),
        "--where",
        "etiology=high",
        "--others-tested",
        "3",
    ]
    words += ["--utterances", "2", "--sides", *FROZEN, "tuned"]
    words += ["--cache", str(folder), "--out", str(folder / "extend.json")]
    extend.main(words)
    return words, folder / "extend.json"


def test_every_side_is_measured_on_the_same_utterances_and_once(measured):
    words, path = measured
    results = json.loads(path.read_text(encoding="utf-8"))
    (tested,) = results["tested"].values()
    assert {side["way"] for side in results["sides"]} == FROZEN | {"tuned"}
    assert {len(side["errors"]) for side in results["sides"]} == {len(tested["ids"])}
    for side in results["sides"]:
        assert side["way"] == "tuned" or side["others_after"] == side["others_before"]
    extend.main(words)
    assert json.loads(path.read_text(encoding="utf-8")) == results


def test_a_person_s_own_utterances_are_held_out(tmp_path, micro_model, tones):
    bundle = make_bundle(tmp_path / "bundle", micro_model, experts=0, shared=4)
    speaker = next(u.speaker for u in read_corpus(tones).split("test"))
    own = {u.id for u in read_corpus(tones).utterances if u.speaker == speaker}
    out = tmp_path / "extend.json"
    words = [str(bundle), "--new", str(tones), "--others", str(tones), "--where", f"speaker={speaker}"]
    words += ["--utterances", "1", "--held-out", "1", "--sides", "as it is", "full", "--others-tested", "2"]
    extend.main([*words, "--cache", str(tmp_path), "--out", str(out)])
    results = json.loads(out.read_text(encoding="utf-8"))
    assert [side["way"] for side in results["sides"]] == ["as it is", "full"]
    assert {*results["tested"][f"{speaker} alone"]["ids"]} < own
    weights = sum(p.numel() for p in load_whisper(micro_model).parameters())
    assert results["sides"][1]["bytes"] == 4 * weights


def test_the_summary_is_computed_from_word_errors(measured, tmp_path):
    results = json.loads(measured[1].read_text(encoding="utf-8"))
    rows = {row["way"]: row for row in results["summary"]}
    for side in results["sides"]:
        assert rows[side["way"]]["new_wer"] == pytest.approx(side["new_wer"])
    assert rows["tuned"]["minus_tuned"] is None and rows["as it is"]["minus_tuned"] is None
    for way in FROZEN - {"as it is"}:
        delta = rows[way]["minus_tuned"]
        assert delta["delta"] == pytest.approx(rows[way]["new_wer"] - rows["tuned"]["new_wer"])
        assert delta["low"] <= delta["delta"] <= delta["high"]
    (tmp_path / "again.json").write_text(json.dumps(results | {"summary": []}))
    extend.main(["--out", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text()) == results


def test_a_side_on_other_utterances_is_refused(measured, tmp_path):
    (tmp_path / "r.json").write_text(measured[1].read_text())
    with pytest.raises(DataError, match="high was tested on other utterances"):
        extend.add_side(tmp_path / "r.json", {"new": "high"}, {"ids": []})


def test_the_committed_summary_is_what_its_sides_give():
    results = extend.read_results(extend.RESULTS / "extend.json", extend.EMPTY)
    assert json.loads(json.dumps(extend.summarise(results))) == results["summary"]


def test_tables_name_every_method_and_number_of_utterances(tmp_path):
    row = {"model": "m", "others_before": 0.1, "others_after": 0.2, "bytes": 1234, "seconds": 5.2, "rows": 3}
    gap = {"delta": -0.012, "low": -0.03, "high": 0.001}
    summary = [
        row | {"new": "x", "utterances": 5, "way": "expert", "new_wer": 0.25, "minus_tuned": gap},
        row | {"new": "x", "utterances": 36, "way": "tuned", "new_wer": 0.2, "minus_tuned": None},
        row | {"new": "a person", "utterances": None, "way": "expert", "new_wer": 0.3, "minus_tuned": None},
    ]
    groups = [{"model": "m", "utterances": count, "right": right} for count, right in ((5, 57), (5, 58), (10, 59))]
    (tmp_path / "r.json").write_text(json.dumps({"summary": summary, "groups": groups}))
    path = tmp_path / "r.json"
    assert extension_rows("x", path)[2:] == [
        "| `expert` | 25.0; −1.2 (−3.0 to +0.1) |  |",
        "| all adapter weights tuned, 3e-4 |  | 20.0 |",
    ]
    assert extension_costs(36, path)[2:] == ["| all adapter weights tuned, 3e-4 | 20.0 | 10.0 | 20.0 | 1,234 | 5 |"]
    assert person_rows(path)[2:] == ["| `expert` | 30.0 |"]
    assert group_rows(path)[2:] == ["| m | 57, 58 | 59 |"]
