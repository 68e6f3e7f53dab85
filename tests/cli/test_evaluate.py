"""`moe-asr evaluate` and `moe-asr compare` as typed: what they leave, what they refuse, and nothing half done."""

import json
import re
import shutil
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from cli.evaluate import _slug
from cli.main import cli
from common.data.audio import read_audio
from common.data.corpus import read_corpus, write_index
from common.data.shards import pack_corpus
from common.errors import ConfigError, DataError, UsageError
from common.json_files import read_rows
from common.storage import open_store
from tests.cli.test_main import moe_asr
from tests.common.report.test_report import Page
from tests.factories import write_wav

QUICK = ("--set", "runtime.num_workers=0", "--set", "decode.max_new_tokens=6", "--device", "cpu", "--quiet")


def call(*words):
    """Runs the command in this process; errors come out as they are."""
    cli([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def evaluated(micro_run, tones, tmp_path_factory):
    """Folder of an evaluation of the finished run."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    call("evaluate", "micro", tones, "--store", micro_run[0], "--samples", 12, "--out", out, *QUICK)
    return out


@pytest.fixture(scope="module")
def base(micro_model, tones, tmp_path_factory):
    """Folder of an evaluation of the base model."""
    out = tmp_path_factory.mktemp("base") / "out"
    call("evaluate", micro_model, tones, "--samples", 12, "--out", out, *QUICK)
    return out


def test_an_evaluation_of_a_run_has_the_rates_of_its_summary(evaluated, micro_run):
    evaluation = json.loads((evaluated / "evaluation.json").read_text())
    summary = json.loads((micro_run[0] / "micro" / "summary.json").read_text())
    overall = evaluation["overall"]
    assert overall["wer"] == pytest.approx(summary["wer_after"]) and overall["cer"] == pytest.approx(
        summary["cer_after"]
    )
    assert overall["ci"] == pytest.approx(summary["wer_interval_after"])
    assert overall["wer_unclipped"] == pytest.approx(summary["wer_after_unclipped"])
    for name, group in summary["by_etiology"].items():
        assert evaluation["by_etiology"][name]["wer"] == pytest.approx(group["wer_after"])
    report = json.loads((micro_run[1] / "report.json").read_text())
    assert evaluation["load"] == pytest.approx(report["load"], abs=1e-3)
    assert read_rows(evaluated / "predictions.jsonl")[0]["id"] == read_rows(micro_run[1] / "predictions.jsonl")[0]["id"]


def test_the_base_evaluated_is_the_run_before_training(base, micro_run):
    evaluation = json.loads((base / "evaluation.json").read_text())
    summary = json.loads((micro_run[0] / "micro" / "summary.json").read_text())
    assert evaluation["overall"]["wer"] == pytest.approx(summary["wer_before"])
    assert evaluation["mixture"] is None and evaluation["load"] is None


def test_a_run_decodes_as_it_did_itself_and_a_setting_changes_that(micro_run, tones, tmp_path):
    words = ("evaluate", "micro", tones, "--store", micro_run[0], "--samples", 2, "--device", "cpu", "--quiet",
             "--set", "runtime.num_workers=0")  # fmt: skip
    call(*words, "--out", tmp_path / "own")
    call(*words, "--out", tmp_path / "other", "--set", "decode.max_new_tokens=3")
    tokens = [json.loads((tmp_path / name / "evaluation.json").read_text())["decoding"] for name in ("own", "other")]
    assert [decoding["max_new_tokens"] for decoding in tokens] == [6, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU refuses one")
@pytest.mark.parametrize("option", [("--device", "cuda"), ("--set", "runtime.device=cuda")])
def test_a_device_is_an_option_or_a_setting(tones, micro_model, tmp_path, option):
    with pytest.raises(UsageError, match="no CUDA device"):
        call("evaluate", micro_model, tones, "--out", tmp_path / "out", *option)


def test_the_page_needs_no_network_and_its_players_find_the_audio(base):
    page = Page((base / "report.html").read_text())
    assert "http:" not in page.html and "https:" not in page.html and "@import" not in page.html
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert len(page.all("caption")) == len(page.all("table")) > 0
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a")} <= set(ids)
    players = page.all("audio")
    assert players and all(player["aria-label"] for player in players)
    for player in players:
        path, _, part = player["src"].partition("#t=")
        assert not path.startswith("/") and (base / unquote(path)).is_file()
        assert float(part.split(",")[1]) > float(part.split(",")[0]) == 0


def test_a_packed_corpus_has_its_audio_in_the_page(micro_model, tones, tmp_path):
    pack_corpus(read_corpus(tones), open_store(tmp_path / "packed"), shard_bytes=10**6, scratch=tmp_path)
    call("evaluate", micro_model, tmp_path / "packed", "--samples", 3, "--out", tmp_path / "out", *QUICK)
    sources = [player["src"] for player in Page((tmp_path / "out" / "report.html").read_text()).all("audio")]
    assert sources and all(source.startswith("data:audio/wav;base64,") for source in sources)


def test_hostile_words_stay_text(micro_model, tones, tmp_path):
    evil = '<script>alert(1)</script>"><img src=x>'
    corpus = read_corpus(tones)
    shutil.copytree(tones, tmp_path / "corpus")
    changed = [replace(u, text=f"{evil} {u.text}", speaker=evil + u.speaker, severity=evil) for u in corpus.utterances]
    write_index(tmp_path / "corpus", changed)
    call("evaluate", micro_model, tmp_path / "corpus", "--samples", 4, "--out", tmp_path / "out", *QUICK)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not {"script", "img"} & {tag for tag, _ in page.elements} and "alert(1)" in page.words


def test_the_better_of_two_references_counts(micro_model, tones, base, tmp_path):
    heard = {row["id"]: row["hypothesis"] for row in read_rows(base / "predictions.jsonl")}
    shutil.copytree(tones, tmp_path / "corpus")
    write_index(
        tmp_path / "corpus",
        [replace(u, text_alt=heard.get(u.id) or "nothing") for u in read_corpus(tones).utterances],
    )
    call("evaluate", micro_model, tmp_path / "corpus", "--samples", 12, "--out", tmp_path / "out", *QUICK)
    rows = read_rows(tmp_path / "out" / "predictions.jsonl")
    assert all(row["errors"] == 0 and row["reference_used"] == 1 for row in rows if row["chars"])


def test_long_utterances_are_refused_or_dropped_and_counted(micro_model, tones, tmp_path):
    shutil.copytree(tones, tmp_path / "corpus")
    test = read_corpus(tones).split("test")
    write_index(tmp_path / "corpus", [replace(test[0], duration=31.0), *test[1:4]])
    words = ("evaluate", micro_model, tmp_path / "corpus", "--out", tmp_path / "out", *QUICK)
    with pytest.raises(DataError, match=r"lasts 31\.00 s"):
        call(*words)
    assert not (tmp_path / "out").exists()
    call(*words, "--long-audio", "drop")
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (evaluation["left_out"], evaluation["overall"]["utterances"]) == (1, 3)
    call(*words, "--long-audio", "drop", "--samples", 2, "--overwrite")
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (evaluation["left_out"], evaluation["overall"]["utterances"]) == (1, 2)
    assert "1 utterances omitted" in Page((tmp_path / "out" / "report.html").read_text()).words


def test_long_utterances_are_heard_in_windows_where_that_is_wanted(micro_model, tones, tmp_path):
    test = read_corpus(tones).split("test")[:3]
    joined = np.concatenate([read_audio(tones / u.audio_filepath) for u in test] * 40)
    write_wav(tmp_path / "corpus" / "long.wav", joined[: 34 * 16_000], 16_000)
    for u in test[1:]:
        shutil.copy(tones / u.audio_filepath, tmp_path / "corpus" / f"{u.id}.wav")
    short = [replace(u, audio_filepath=f"{u.id}.wav") for u in test[1:]]
    write_index(tmp_path / "corpus", [replace(test[0], audio_filepath="long.wav", duration=34.0), *short])
    out = tmp_path / "out"
    call("evaluate", micro_model, tmp_path / "corpus", "--long-audio", "windows", "--out", out, *QUICK)
    rows = {row["id"]: row for row in read_rows(out / "predictions.jsonl")}
    assert len(rows) == 3 and rows[test[0].id]["hypothesis"]
    assert json.loads((out / "evaluation.json").read_text())["left_out"] == 0


def test_nothing_is_overwritten_unasked_and_nothing_half_written(micro_model, tones, base, tmp_path):
    words = ("evaluate", micro_model, tones, "--samples", 2, *QUICK)
    out = tmp_path / "out"
    shutil.copytree(base, out)
    before = (out / "evaluation.json").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        call(*words, "--out", out)
    shutil.copytree(tones, tmp_path / "broken")
    for file in (tmp_path / "broken" / "audio").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"\.wav"):
        call("evaluate", micro_model, tmp_path / "broken", "--overwrite", "--out", out, *QUICK)
    assert (out / "evaluation.json").read_bytes() == before
    call(*words, "--out", out, "--overwrite")
    assert json.loads((out / "evaluation.json").read_text())["overall"]["utterances"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"evaluation\.json"):
        call(*words, "--out", tmp_path / "mine", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["broken", "mine", "out"]


def test_bad_requests_get_one_line_and_their_exit_code(micro_model, tones, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(tones, corpus)
    write_index(corpus, read_corpus(tones).split("train"))
    refused = [
        (("nothing", tones), DataError, "model 'nothing' is neither"),
        ((micro_model, "nowhere"), DataError, "nowhere"),
        ((micro_model, corpus), DataError, "no utterances in split 'test': it has train"),
        ((micro_model, tones, "--set", "asr.epochs=3"), UsageError, "asr.epochs=3: only decode, audio"),
        ((micro_model, tones, "--set", "decode.num_beams=0"), ConfigError, "decode.num_beams"),
        ((micro_model, tones, "--language", "de"), DataError, "is for English only"),
    ]
    for words, kind, message in refused:
        with pytest.raises(kind, match=re.escape(message)):
            call("evaluate", *words, "--out", tmp_path / "out", *QUICK)
    assert not (tmp_path / "out").exists()
    done = moe_asr("evaluate", "nothing", tones, cwd=tmp_path)
    assert done.returncode == 65 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_run_compared_with_its_own_evaluation_differs_by_nothing(evaluated, micro_run, capsys):
    call("compare", "micro", "--group", f"again={evaluated}", "--store", micro_run[0], "--json")
    comparison = json.loads(capsys.readouterr().out)
    assert [system["name"] for system in comparison["systems"]] == ["micro", "again"] and comparison["notes"] == []
    assert comparison["systems"][1]["difference"]["wer"] == {"delta": 0, "low": 0, "high": 0, "p": 1, "better": 0.5}
    facts = comparison["systems"][0]["facts"]
    assert facts["trained_parameters"] > 0 and facts["samples_per_second"] > 0 and facts["seconds"] > 0
    assert sum(facts["load"]) == pytest.approx(1) and facts["experts"] == 2
    manifests = [json.loads(path.read_text()) for path in (micro_run[0] / "artifacts").glob("*/*/manifest.json")]
    trained = [manifest["metrics"]["steps"] for manifest in manifests if manifest["stage"] in ("experts", "asr")]
    assert len(trained) == 3 and facts["steps"] == sum(trained)  # two experts, each alone, and all together


def test_the_base_beside_a_run_is_what_it_heard_before(base, micro_run, tmp_path, capsys):
    words = ("compare", "micro", "--store", micro_run[0])
    call(*words, "--with-base", "--json")
    beside = json.loads(capsys.readouterr().out)
    assert beside["reference"] == "micro"  # the base is added, and no more is changed
    call(*words, "--with-base", "--reference", "base", "--out", tmp_path / "out")
    assert "report:" in capsys.readouterr().out
    own = json.loads((tmp_path / "out" / "comparison.json").read_text())
    call(*words, base, "--reference", "out", "--json")
    other = json.loads(capsys.readouterr().out)
    assert own["reference"] == "base" and own["systems"][0]["wer"] == pytest.approx(other["systems"][1]["wer"])
    assert own["systems"][1]["difference"]["wer"] == other["systems"][0]["difference"]["wer"]
    assert beside["systems"][0]["difference"]["wer"]["delta"] == -own["systems"][1]["difference"]["wer"]["delta"]
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert {"result", "etiologies", "training", "setup"} <= {attrs.get("id") for _, attrs in page.elements}


def test_comparisons_that_make_no_sense_are_refused(evaluated, micro_run, micro_model, tones, tmp_path):
    other = tmp_path / "other"
    call("evaluate", micro_model, tones, "--samples", 5, "--out", other, *QUICK)
    store = ("--store", micro_run[0])
    refused = [
        ((), UsageError, "name at least one run"),
        (("gone",), DataError, "'gone' is neither a run nor a folder with evaluation.json; runs in"),
        (("micro", "micro"), UsageError, "micro is named twice"),
        (("micro", "--group", "alone"), UsageError, "--group alone: write it as NAME=RUN,RUN,RUN"),
        (("micro", other), DataError, "other lacks 7 of 12 and has 0 others"),
        (("micro", "--reference", "moon"), UsageError, "--reference moon: not among micro"),
        (("--group", "base=micro", "--with-base"), UsageError, "base is the model before training"),
        ((evaluated, "--with-base"), DataError, "contains no transcripts of its base model"),
    ]
    for words, kind, message in refused:
        with pytest.raises(kind, match=re.escape(message)):
            call("compare", *words, *store)
    call("compare", "micro", other, "--common", *store)
    shutil.rmtree(other)


def test_folders_of_evaluations_keep_letters_of_all_languages():
    assert [_slug(name) for name in ("runs/модель", "模型/", "a b/c:d.e", "...")] == [
        "модель",
        "模型",
        "c_d.e",
        "model",
    ]


def test_results_are_verified_as_the_run_recorded_them(micro_run, tmp_path, capsys):
    """Not as they would be made from a corpus that has grown since, or is gone."""
    store = shutil.copytree(micro_run[0], tmp_path / "store")
    record = json.loads((store / "micro" / "run.json").read_text())
    record["config"]["corpus"]["path"] = str(tmp_path / "gone")
    (store / "micro" / "run.json").write_text(json.dumps(record))
    call("verify", "micro", "--store", store, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in rows} == {"ok"} and len(rows) == len(record["tasks"])
    weights = next((store / "artifacts" / "gating").rglob("gate.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"1 of {len(rows)} results"):
        call("verify", "micro", "--store", store)
