"""Extending a finished model: what is added, what stays, what is taken away again, and what is refused."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cli.extend import METHODS
from cli.main import cli
from common.data.corpus import read_corpus, write_index
from common.data.importers.tables import import_table
from common.data.sources import folder_digest
from common.data.tokens import load_codec
from common.decoding.decode import Decoding
from common.errors import DataError, StoreError, UsageError
from common.evaluation.evaluate import decode_corpus
from common.inference.added_experts import model_content, with_added
from common.inference.load_model import open_model
from common.inference.recordings import LoadedRecording, Recording
from common.inference.subtitles import as_csv, table_rows
from common.inference.transcribe import Segment
from common.model.adapters import save_expert
from common.model.added_experts import append_terms
from common.model.bundle import save_recogniser
from common.model.gate import Gate
from common.model.mixture import AddedTerm, add_mixture, mixture_layers
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.pipeline.runs import read_record
from common.report.extension import WAYS as DESCRIBED
from common.report.extension import confusions
from common.storage import open_store
from common.storage.artifacts import commit, make_key, new_attempt
from common.training.added_experts import (
    CHOOSING,
    GATE_WEIGHT,
    WAYS,
    Candidates,
    Trial,
    _new_term,
    candidate_losses,
    choose_weights,
    folds_of,
    simplest_good,
    steps_for,
    ways_to_try,
    without_worse,
)
from stages.extend.choose import make_enrolment
from stages.extend.enrolment import enrolled, groups_of, parse_where, rotation, warn_of_strange_texts
from stages.extend.extension import parent_digest
from tests.common.model.test_added_experts import TARGETS, logits, model
from tests.common.model.test_mixture import randomise
from tests.factories import bundle_info, run_record, write_wav

DECODING = Decoding(batch_size=4, max_new_tokens=4)


def moe_asr(*words):
    """What a command prints.

    Raises:
        MoeAsrError: as the command does.
    """
    result = CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def speech(tones, tmp_path_factory):
    """The tones as a corpus whose speaker s00 is new: all utterances of s00 in train, the others' in test."""
    corpus = read_corpus(tones)
    folder = tmp_path_factory.mktemp("new") / "corpus"
    rows = [
        replace(u, audio_filepath=str(corpus.path(u)), split="train" if u.speaker in ("s00", "s01") else "test")
        for u in corpus.utterances
        if u.speaker in ("s00", "s01", "s02")
    ]
    folder.mkdir(parents=True)
    write_index(folder, rows)
    return folder


@pytest.fixture(scope="module")
def finished(micro_model, tmp_path_factory):
    """A store with a run called micro: a random mixture of three experts and its gate."""
    folder = tmp_path_factory.mktemp("finished") / "store"
    store, key = open_store(folder), make_key("asr", 1, {}, {})
    recogniser = model(micro_model)
    torch.manual_seed(0)
    recogniser.gate = Gate(32, 8, 3)
    recogniser.gate.fit_scale(torch.randn(20, 32))
    attempt = new_attempt(store, key, folder)
    save_recogniser(recogniser, bundle_info(micro_model, rank=2, targets=TARGETS, shared_rank=4), attempt)
    commit(store, key, attempt, started=1.0, seconds=1.0)
    settings = {"seed": 1, "model": {"name": str(micro_model), "language": "en"}, "decode": {"max_new_tokens": 4}}
    record = run_record(name="micro", status="done", config=settings, timeline=[])
    record |= {"tasks": {"asr": {"key": key.digest, "stage": "asr"}}, "keys": {}}
    store.write("micro/run.json", json.dumps(record).encode())
    return folder


@pytest.fixture
def store(finished, tmp_path):
    """A copy of that store."""
    return Path(shutil.copytree(finished, tmp_path / "store"))


@pytest.fixture(autouse=True)
def few_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cli.extend.set_up_logging", lambda **_: None)  # it takes caplog's handler away
    monkeypatch.setattr("common.training.added_experts.STEPS", ((5, 2), (1000, 400)))


def extend(store, speech, *more, model="micro", speaker="s00", method="expert"):
    who = ["--speaker", speaker] if speaker else []
    options = ["--device", "cpu", "--quiet", "--method", method, "--store", store, "--json"]
    options += ["--set", "decode.max_new_tokens=4"]
    return json.loads(moe_asr("extend", model, "--corpus", speech, *who, *options, *more))


def opened(name, store, tmp_path):
    return open_model(str(name), store=open_store(store), cache=tmp_path / "cache", device="cpu")


def texts(model, speech):
    corpus = read_corpus(speech)
    return {row["id"]: row["hypothesis"] for row in decode_corpus(model, corpus, corpus.utterances, DECODING)}


def test_a_speaker_is_added_used_by_the_table_and_removed_without_a_trace(store, speech, tmp_path):
    files = sorted(path.relative_to(store) for path in store.rglob("*"))
    parent = opened("micro", store, tmp_path)
    before, heard = logits(parent.recogniser), texts(parent, speech)
    made = extend(store, speech)
    assert made["run"] == "micro-s00" and made["method"] == "expert" and made["utterances"] == 6
    assert made["details"]["others"] > 0
    child = opened("micro-s00", store, tmp_path)
    assert torch.equal(logits(child.recogniser), before)
    assert not torch.equal(logits(child.recogniser, [0] * 4), before)
    with_it = texts(child, speech)
    assert {name for name in heard if heard[name] != with_it[name]} <= {n for n in heard if n.startswith("s00")}
    assert texts(with_added(child, speaker="s00"), speech).keys() == heard.keys()
    listed = moe_asr("experts", "list", "micro-s00", "--store", store)
    assert "s00" in listed and "expert" in listed
    assert json.loads(moe_asr("experts", "show", "micro-s00", "s00", "--store", store))["utterances"] == 6

    assert "deleted" in moe_asr("experts", "remove", "micro-s00", "s00", "--store", store)
    left = opened("micro-s00", store, tmp_path)
    assert left.added == () and torch.equal(logits(left.recogniser), before)
    now = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    assert {str(path) for path in now if path not in files} == {"micro-s00/run.json", "micro-s00/README.md"}


def test_the_store_shares_the_model_and_keeps_no_audio_and_no_text(store, speech):
    before = {path for path in store.rglob("*") if path.is_file()}
    extend(store, speech)
    new = [path for path in store.rglob("*") if path.is_file() and path not in before]
    (manifest,) = [json.loads(path.read_text()) for path in new if path.name == "manifest.json"]
    record = read_record(open_store(store), "micro-s00")
    assert [row["key"] for row in manifest["inputs"]["parent"]] == [record["tasks"]["asr"]["key"]]
    names = {path.name for path in new}
    assert names <= {"added.json", "adapter_config.json", "adapter_model.safetensors", "extension.json",
                     "metrics.jsonl", "manifest.json", "run.json", "README.md"}  # fmt: skip
    words = {word for u in read_corpus(speech).utterances for word in u.text.split()}
    told = "".join(path.read_text() for path in new if path.suffix == ".json")
    assert not [word for word in words if f'"{word}' in told or f" {word} " in told]


@pytest.mark.parametrize("method", ["choose", "gates", "neighbour", "shared"])
def test_each_way_makes_an_expert_that_loads(store, speech, tmp_path, method):
    assert extend(store, speech, method=method)["method"] == method
    child = opened("micro-s00", store, tmp_path)
    assert child.added[0].method == method and (child.added[0].start is not None) == (method == "neighbour")
    assert np.isfinite(logits(child.recogniser, [0, -1, 0, -1]).numpy()).all()


def test_a_copy_of_the_shared_expert_in_its_place_changes_nothing_before_training(micro_model):
    recogniser = model(micro_model)
    layers = dict(mixture_layers(recogniser.whisper))
    append_terms(recogniser, {name: AddedTerm() for name in layers})
    append_terms(recogniser, {name: _new_term(layer, "shared", 8, None) for name, layer in layers.items()})
    torch.testing.assert_close(logits(recogniser, [1] * 4), logits(recogniser, [0] * 4), rtol=1e-4, atol=1e-4)


def test_auto_adds_nothing_where_nothing_is_better_and_says_so(store, speech, monkeypatch):
    monkeypatch.setattr("stages.extend.run.simplest_good", lambda before_N, trials, groups: "none")
    made = extend(store, speech, method="auto")
    assert made["run"] is None and set(made["details"]["ways"]) == {"none", "choose", "gates", "neighbour", "shared"}
    assert "nothing is added" in moe_asr("extend", "micro", "--corpus", speech, "--speaker", "s00", "--store", store,
                                         "--quiet", "--device", "cpu")  # fmt: skip
    assert read_record(open_store(store), "micro-s00") is None
    assert "selected on the same held-out utterances" in Path("extensions/micro-s00/s00/report.html").read_text()


def test_two_extensions_of_one_parent_are_two_children(store, speech, tmp_path):
    extend(store, speech)
    extend(store, speech, speaker="s01", method="gates")
    for name in ("s00", "s01"):
        assert [expert.name for expert in opened(f"micro-{name}", store, tmp_path).added] == [name]
    assert extend(store, speech, "--run", "both", model="micro-s00", speaker="s01", method="gates")["run"] == "both"
    assert [expert.name for expert in opened("both", store, tmp_path).added] == ["s00", "s01"]
    moe_asr("experts", "remove", "micro-s00", "s00", "--store", store)  # `both` has it still
    assert [expert.name for expert in opened("both", store, tmp_path).added] == ["s00", "s01"]


def test_a_speaker_who_is_there_is_replaced_by_option_only(store, speech, tmp_path):
    extend(store, speech)
    with pytest.raises(UsageError, match="--replace"):
        extend(store, speech, model="micro-s00", method="gates")
    extend(store, speech, "--replace", "--run", "micro-s00", model="micro-s00", method="gates")
    assert [(expert.name, expert.method) for expert in opened("micro-s00", store, tmp_path).added] == [("s00", "gates")]
    with pytest.raises(UsageError, match="already exists in"):
        extend(store, speech, "--run", "micro-s00", speaker="s01", method="gates")
    with pytest.raises(UsageError, match="is the model itself"):
        extend(store, speech, "--run", "micro")


def test_a_plain_whisper_is_extended_too(store, speech, micro_model, tmp_path):
    assert extend(store, speech, "--run", "plain", model=micro_model)["run"] == "plain"
    child, whole = opened("plain", store, tmp_path), opened(micro_model, store, tmp_path)
    assert torch.equal(logits(child.recogniser), logits(whole.recogniser))
    assert not torch.equal(logits(child.recogniser, [0] * 4), logits(whole.recogniser))
    with pytest.raises(DataError, match="allows expert"):
        extend(store, speech, "--run", "other", model=micro_model, method="gates")


def test_an_extended_whisper_keeps_its_language_task_and_context(store, speech, micro_model, tmp_path, monkeypatch):
    monkeypatch.setattr(  # micro is for English only
        "common.inference.load_model.load_codec", lambda folder, **_: load_codec(folder, language="en")
    )
    treated = []
    monkeypatch.setattr("stages.inputs.within_limits", lambda corpus, long, cache: treated.append(long) or corpus)
    usage = ["--language", "de", "--task", "translate", "--set", "audio.context=dynamic"]
    assert extend(store, speech, "--run", "german", *usage, model=micro_model)["run"] == "german"
    wanted = [(str(micro_model), "de", "translate", "cpu")]
    assert [(long.model, long.language, long.task, long.device) for long in treated] == wanted
    german = opened("german", store, tmp_path)
    assert (german.spoken, german.task, german.language, german.context) == ("de", "translate", "en", "dynamic")
    with pytest.raises(UsageError, match="en: model german was trained for de"):
        extend(store, speech, "--language", "en", model="german", speaker="s01")


def test_a_group_gets_an_expert_by_its_column(store, speech, tmp_path):
    made = extend(store, speech, "--where", "etiology=low", "--name", "deep", speaker=None, method="gates")
    assert made["run"] == "micro-deep" and made["column"] == "etiology"
    child = opened("micro-deep", store, tmp_path)
    assert texts(child, speech).keys() == {u.id for u in read_corpus(speech).utterances}


def test_an_unknown_name_is_an_error_with_the_nearest_one(store, speech, tmp_path):
    extend(store, speech)
    child = opened("micro-s00", store, tmp_path)
    with pytest.raises(UsageError, match="did you mean s00"):
        with_added(child, expert="s0")
    with pytest.raises(UsageError, match="nothing was added"):
        with_added(opened("micro", store, tmp_path), speaker="s00")
    with pytest.raises(UsageError, match="no expert 's01'"):
        moe_asr("experts", "show", "micro-s00", "s01", "--store", store)
    with pytest.raises(DataError, match="did you mean s0"):
        extend(store, speech, speaker="s0O")


def test_an_interrupted_extension_goes_on_to_the_same_bits(store, speech, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    shutil.copytree(store, whole)
    extend(whole, speech)
    from common.training import added_experts

    real, calls = added_experts.train, []

    def stopped(*args, **options):
        calls.append(1)
        stopping = (lambda: True) if len(calls) == 2 else options["stopping"]
        return real(*args, **options | {"stopping": stopping})

    monkeypatch.setattr(added_experts, "train", stopped)
    with pytest.raises(Exception, match="stopped by a signal"):
        extend(store, speech)
    extend(store, speech)
    weights = [next(folder.rglob("extend/*/*/adapter_model.safetensors")).read_bytes() for folder in (store, whole)]
    assert weights[0] == weights[1]


def test_a_dry_run_says_what_it_would_do(store, speech):
    said = moe_asr("extend", "micro", "--corpus", speech, "--speaker", "s00", "--store", store, "--dry-run", "--quiet",
                   "--device", "cpu")  # fmt: skip
    assert "6 utterances" in said and "to do" in said
    assert read_record(open_store(store), "micro-s00") is None
    extend(store, speech, method="gates")
    options = ["--method", "gates", "--set", "decode.max_new_tokens=4", "--device", "cpu", "--store", store]
    planned = ["extend", "micro", "--corpus", speech, "--speaker", "s00", *options, "--dry-run", "--quiet"]
    assert moe_asr(*planned).rstrip().endswith(": done")
    assert moe_asr(*planned, "--set", "decode.num_beams=2", "--run", "beams").rstrip().endswith(": to do"), (
        "its rates would be others"
    )


def changed(speech, folder, change):
    """The corpus with some utterances changed or (None) omitted."""
    corpus = read_corpus(speech)
    folder.mkdir()
    write_index(folder, [new for u in corpus.utterances if (new := change(u)) is not None])
    return folder


def test_silence_is_left_out_and_nothing_but_silence_is_an_error(store, speech, tmp_path, caplog):
    write_wav(tmp_path / "silence.wav", np.zeros(16_000), 16_000)

    def mute(u, names):
        silent = replace(u, audio_filepath=str(tmp_path / "silence.wav"), duration=1.0)
        return silent if u.speaker == "s00" and u.id in names else u

    some = changed(speech, tmp_path / "some", lambda u: mute(u, ("s00-00",)))
    assert extend(store, some, method="gates")["utterances"] == 5
    assert "1 utterances are silent" in caplog.text and "only 5 utterances" in caplog.text
    every = changed(speech, tmp_path / "every", lambda u: mute(u, [f"s00-0{n}" for n in range(6)]))
    with pytest.raises(DataError, match="all 6 utterances of the enrolment are silent"):
        extend(store, every, "--run", "other")


def test_one_utterance_is_enough_for_a_way_that_is_named_and_too_few_for_auto(store, speech, tmp_path, caplog):
    single = changed(speech, tmp_path / "one", lambda u: u if u.speaker != "s00" or u.id == "s00-00" else None)
    assert extend(store, single, method="auto")["run"] is None
    assert "nothing can be held out" in caplog.text
    made = extend(store, single, method="gates")
    assert made["run"] == "micro-s00" and made["gain"] is None


def test_no_utterance_test_utterances_and_an_overlap_are_refused(speech, tmp_path):
    corpus = read_corpus(speech)
    with pytest.raises(DataError, match="no utterance of speaker 's99'"):
        enrolled(corpus, "speaker", "s99")
    with pytest.raises(DataError, match="in split test"):
        enrolled(corpus, "speaker", "s02")
    twice = replace(corpus.utterances[0], id="again", split="test")
    with pytest.raises(DataError, match="same stretch"):
        enrolled(replace(corpus, utterances=(*corpus.utterances, twice)), "speaker", "s00")


def test_texts_that_belong_to_other_audio_are_told(speech, caplog):
    own = enrolled(read_corpus(speech), "speaker", "s00")
    warn_of_strange_texts(own, [1.0] * 5 + [0.0])
    assert f"1 of 6 texts fit their own audio no better than another utterance's ({own[5].id})" in caplog.text


@pytest.mark.parametrize("fault", ["two voices", "another language"])
def test_what_is_not_one_voice_in_the_models_language_changes_nobody_else(store, speech, tmp_path, fault):
    corpus = read_corpus(speech)
    rows = [replace(u, audio_filepath=str(corpus.path(u))) for u in corpus.utterances]
    if fault == "two voices":
        rows = [replace(u, speaker="s00") if u.speaker == "s01" else u for u in rows]
    else:
        rows = [replace(u, text="ein schöner Tag") if u.speaker == "s00" else u for u in rows]
    folder = tmp_path / "odd"
    folder.mkdir()
    write_index(folder, rows)
    parent = opened("micro", store, tmp_path)
    made = extend(store, folder)
    assert made["utterances"] == (12 if fault == "two voices" else 6)
    assert made["details"]["others"] > 0 and made["details"]["wer_after"] is not None
    assert torch.equal(logits(opened("micro-s00", store, tmp_path).recogniser), logits(parent.recogniser))


def test_where_and_sessions():
    assert parse_where("etiology=a=b") == ("etiology", "a=b")
    for text in ("etiology", "etiology=", "etio=a"):
        with pytest.raises(UsageError, match="--where"):
            parse_where(text)


def test_cross_validation_keeps_speakers_or_sessions_together(speech):
    corpus = read_corpus(speech)
    assert groups_of(corpus.utterances) == [u.speaker for u in corpus.utterances]
    own = [replace(u, audio_filepath=f"day{n % 2}/{n}.wav") for n, u in enumerate(enrolled(corpus, "speaker", "s00"))]
    assert groups_of(own) == ["day0", "day1"] * 3
    uneven = [replace(u, audio_filepath=f"day{n // 5}/{n}.wav") for n, u in enumerate(own)]
    assert groups_of(uneven) == [u.audio_filepath for u in uneven], "one utterance would be held out from five"
    other = rotation(own)
    assert all(own[a].text != own[b].text for a, b in enumerate(other))


def test_exports_of_an_extension_are_exact(store, speech, tmp_path):
    from peft import PeftModel

    extend(store, speech)
    child = opened("micro-s00", store, tmp_path)
    expected = logits(child.recogniser, [0] * 4)
    moe_asr("export", "micro-s00", "--to", "merged", "--speaker", "s00", "--out", "merged", "--store", store)
    merged = Recogniser(load_whisper(Path("merged"))).eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    moe_asr("export", "micro-s00", "--to", "peft", "--out", "peft", "--store", store)
    table = json.loads(Path("peft/routing.json").read_text())
    assert table["added"] == {"s00": {"column": "speaker", "value": "s00"}} and "s00" not in table["adapters"]
    alone = PeftModel.from_pretrained(load_whisper(Path(table["base"])), "peft/s00").merge_and_unload()
    torch.testing.assert_close(logits(Recogniser(alone).eval()), expected, rtol=1e-4, atol=1e-4)
    moe_asr("export", "micro-s00", "--to", "vllm", "--out", "vllm", "--store", store)
    assert "s00=s00" in Path("vllm/README.md").read_text()


def test_disjoint_extensions_are_merged_exactly(store, speech, tmp_path):
    extend(store, speech)
    extend(store, speech, speaker="s01", method="gates")
    moe_asr("merge", "micro-s00", "micro-s01", "--out", "both", "--store", store)
    both = opened("both", store, tmp_path)
    assert [expert.name for expert in both.added] == ["s00", "s01"]
    for number, name in enumerate(("s00", "s01")):
        alone = opened(f"micro-{name}", store, tmp_path)
        assert torch.equal(logits(both.recogniser, [number, -1] * 2), logits(alone.recogniser, [0, -1] * 2))
    with pytest.raises(UsageError, match="two have an expert"):
        moe_asr("merge", "both", "micro-s00", "--out", "again", "--store", store)
    with pytest.raises(UsageError, match="part of that folder"):
        extend(store, speech, "--replace", "--run", "third", model="both")


def test_the_card_tells_added_experts_by_count_alone_and_compare_wants_an_evaluation(store, speech):
    (store / "micro" / "README.md").write_text("# The model\n")
    extend(store, speech)
    card = (store / "micro-s00" / "README.md").read_text()
    assert card.startswith("# The model\n") and "after training: 1." in card and "s00" not in card
    with pytest.raises(DataError, match="moe-asr evaluate micro-s00"):
        moe_asr("compare", "micro-s00", "--store", store)


def test_the_report_holds_the_gain_the_ways_and_confusions(store, speech):
    extend(store, speech, "--curve", "--out", "page", method="gates")
    page = Path("page/report.html").read_text()
    for text in ("Gain, points", "gates", "Confusions", "unchanged to the last bit"):
        assert text in page
    extend(store, speech, "--curve", "--out", "page", method="gates")
    assert Path("page/report.html").read_text() == page, "made when the texts were at hand"
    extend(store, speech, "--out", "page", speaker="s01", method="gates")
    extend(store, speech, "--curve", "--out", "page", method="gates")
    assert "s00" in Path("page/report.html").read_text() and "Confusions" not in Path("page/report.html").read_text()
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="was not made by this command"):
        extend(store, speech, "--out", "notes", "--run", "late")
    assert read_record(open_store(store), "late") is None


def test_confusions_are_those_with_the_reference_that_was_scored():
    row = {"reference": "twenty one", "reference_alt": "21", "reference_used": 1, "hypothesis": "22"}
    assert confusions([row]) == {("21", "22"): 1}


def test_pods_add_a_table_of_speakers_and_one_run_names_them_all(store, speech, tmp_path, monkeypatch):
    from stages.extend import pods

    served = []

    @contextmanager
    def serving(telemetry, port, *_):
        yield
        served.append((port, 'moe_asr_tasks_total{result="run"}' in telemetry.stage("extend").values()))

    monkeypatch.setattr("stages.extend.extension.serving", serving)
    variables = {
        "STORE": store, "PARENT": "micro", "CORPUS": speech, "METHOD": "gates", "RUN": "voices", "NONCE": "1",
        "SPEAKERS": '["s00", "s01"]', "OUTPUTS": tmp_path / "outputs", "MODE": "quick",
        "SETTINGS": "runtime.device=cpu\nruntime.quiet=true\nruntime.metrics_port=9470",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))

    def planned():
        pods.plan_all()
        return json.loads((tmp_path / "outputs" / "extend.json").read_text())

    first = planned()
    assert [item["who"] for item in first] == ["s00", "s01"]
    with pytest.raises(DataError, match="extend the model again"):
        pods.join_all()
    for item in first:
        monkeypatch.setenv("MOE_ASR_MEMO", item["memo"])
        pods.make_one(item["who"])
    assert served == [(9470, True)] * 2
    assert [item["memo"] for item in planned()] == [item["memo"] for item in first]
    pods.join_all()
    assert [expert.name for expert in opened("voices", store, tmp_path).added] == ["s00", "s01"]
    assert read_record(open_store(store), "micro-s00") is None
    monkeypatch.setenv("MOE_ASR_SPEAKERS", '["s01"]')
    for step in (pods.plan_all, pods.join_all):
        with pytest.raises(UsageError, match=r"already has added experts \(s00\).*parent=voices run=voices"):
            step()
    monkeypatch.setenv("MOE_ASR_PARENT", "voices")
    pods.plan_all()
    monkeypatch.setenv("MOE_ASR_PARENT", "micro")
    for text in ("s00", "[]", '["s00", "s00"]', '["s00", "speaker=s00"]'):
        monkeypatch.setenv("MOE_ASR_SPEAKERS", text)
        with pytest.raises(UsageError, match="speakers"):
            pods.plan_all()
    monkeypatch.setenv("MOE_ASR_SPEAKERS", '["etiology=low"]')
    monkeypatch.setenv("MOE_ASR_RUN", "micro")
    with pytest.raises(UsageError, match="is the model itself"):
        pods.plan_all()
    store_of = open_store(store)
    store_of.write("other/run.json", store_of.read("micro/run.json").replace(b'"micro"', b'"other"'))
    monkeypatch.setenv("MOE_ASR_RUN", "other")
    with pytest.raises(UsageError, match="is no extension of micro"):
        pods.plan_all()


def test_transcripts_are_corrected_in_a_table_and_read_back(store, speech, tmp_path):
    corpus = read_corpus(speech)
    paths = [corpus.path(u) for u in corpus.utterances[:3]]
    options = ["--model", "micro", "--store", store, "--device", "cpu", "--quiet", "--no-fall-back"]
    moe_asr("transcribe", *paths, *options, "--format", "csv", "--out", "table", "--set", "decode.max_new_tokens=8")
    lines = Path("table/transcripts.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == "audio_filepath,offset,end,text,speaker,split,as_written" and len(lines) > 1


def test_existing_experts_are_chosen_by_enrolment_and_nothing_is_written(store, speech, tmp_path):
    from stages.extend.choose import chosen_by, read_enrolment

    before = set(store.rglob("*"))
    folder = tmp_path / "enrol"
    folder.mkdir()
    corpus = read_corpus(speech)
    for u in corpus.utterances[:2]:
        shutil.copyfile(corpus.path(u), folder / f"{u.id}.wav")
        (folder / f"{u.id}.txt").write_text(u.text)
    chosen = chosen_by(opened("micro", store, tmp_path), folder)
    assert chosen.voice == 0 and chosen.added[0].utterances == 2
    assert sum(weight for _, weight in chosen.added[0].weights) <= 1 + 1e-6
    options = ["--model", "micro", "--store", store, "--device", "cpu", "--quiet", "--no-fall-back", "--enrol", folder]
    options += ["--set", "decode.max_new_tokens=4"]
    said = moe_asr("transcribe", corpus.path(corpus.utterances[3]), *options)
    (text,) = decode_corpus(chosen, corpus, corpus.utterances[3:4], DECODING)
    assert said.split() == text["hypothesis"].split()
    with pytest.raises(UsageError, match="--enrol chooses experts"):
        moe_asr("transcribe", corpus.path(corpus.utterances[3]), *options, "--expert", "0")
    assert set(store.rglob("*")) == before
    text = folder / f"{u.id}.txt"
    text.write_bytes(b"\xef\xbb\xbf" + u.text.encode())
    assert [read.text for read in read_enrolment(folder).utterances][-1] == u.text
    text.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_enrolment(folder)
    text.unlink()
    with pytest.raises(DataError, match="beside it"):
        chosen_by(opened("micro", store, tmp_path), folder)


@pytest.mark.parametrize("expert", [0, 2])
def test_the_gates_log_probabilities_count_in_a_choice_unless_the_speech_is_unlike_all_groups(
    expert, store, speech, tmp_path
):
    corpus = read_corpus(speech)
    model = opened("micro", store, tmp_path)
    with torch.no_grad():
        model.recogniser.gate.net[-1].bias[expert] += 1000.0
    enrolment = make_enrolment(model, corpus, corpus.utterances[:3])
    log_prob_NE = enrolment.log_prob_NE
    assert log_prob_NE[:, expert] == pytest.approx(math.log(3)) and log_prob_NE.shape == (3, 3)
    assert Candidates(enrolment).best([0, 1, 2]) == expert
    deaf = candidate_losses(replace(enrolment, log_prob_NE=None), [1, 2])
    losses_NC = candidate_losses(enrolment, [1, 2])
    assert np.allclose(deaf[:, :-1] - losses_NC[:, :-1], GATE_WEIGHT * log_prob_NE[[1, 2]])
    assert np.array_equal(deaf[:, -1], losses_NC[:, -1])  # the shared expert alone
    model.recogniser.gate.limit.fill_(-1e30)
    assert not make_enrolment(model, corpus, corpus.utterances[:3]).log_prob_NE.any()


def test_weights_are_those_of_the_likeliest_expert():
    loss_NC = np.array([[30.0, 10.0, 20.0], [30.0, 11.0, 20.0]])
    assert choose_weights(loss_NC) == {1: pytest.approx(1.0)}
    assert choose_weights(loss_NC[:, ::-1]) == {1: pytest.approx(1.0)}
    assert choose_weights(np.array([[5.0, 5.0, 1.0]])) == {}  # the shared expert alone


def test_a_choice_uses_utterances_from_the_whole_enrolment_and_measures_each_once(monkeypatch):
    measured = []

    def measure(_, numbers):
        measured.extend(numbers)
        return np.array([[1.0, float(number < 40), 1.0] for number in numbers])

    monkeypatch.setattr("common.training.added_experts.candidate_losses", measure)
    candidates = Candidates(None)
    assert candidates.best(range(40, 60)) == 1 and candidates.best([3, 5]) == 0
    assert len(measured) == CHOOSING + 2 and measured[0] == 40 and measured[CHOOSING - 1] == 59
    assert candidates.weights([3]) == {0: pytest.approx(1 / 3), 1: pytest.approx(1 / 3)}
    assert len(measured) == CHOOSING + 2
    before = set(measured)
    assert candidates.losses(range(60)).shape == (CHOOSING, 3)  # as many as in a fold, however many are known
    assert len(measured) == len(set(measured)) and 0 in {*measured} - before


def test_the_simplest_way_within_a_standard_error_of_the_best_is_taken():
    before = np.full(8, 1.0)
    noise = np.tile([0.1, -0.1], 4)
    gates, expert = (Trial([], values) for values in (before - 0.5, before - 0.51 + noise))
    names = [str(n) for n in range(8)]
    assert simplest_good(before, {"gates": gates, "expert": expert}, names) == "gates"
    assert simplest_good(before, {"gates": Trial([], before - 0.1), "expert": expert}, names) == "expert"
    assert simplest_good(before, {"gates": Trial([], before + 0.1)}, names) == "none"


def test_the_command_and_the_report_know_every_method():
    assert ["auto", *WAYS] == list(METHODS) and tuple(DESCRIBED) == ("none", *WAYS)


def test_methods_that_another_one_replaces_are_not_compared():
    assert ways_to_try(WAYS, 20) == ["choose", "gates", "neighbour", "shared"]
    assert ways_to_try(WAYS, 21) == ["choose", "gates", "shared"]
    assert ways_to_try(["choose", "expert", "neighbour"], 21) == ["choose", "expert", "neighbour"]
    assert ways_to_try(["expert"], 5) == ["expert"]


def test_a_method_that_is_clearly_worse_on_the_first_part_is_given_up():
    generator = np.random.default_rng(0)
    names = [f"u{n}" for n in range(20)]
    unknown = np.full(10, np.nan)  # the second part, not measured yet
    noise = generator.normal(0, 0.1, 10)
    best = np.concatenate([np.ones(10), unknown])
    near = np.concatenate([1.01 + noise, unknown])
    worse = np.concatenate([1.3 + noise, unknown])
    trials = {"gates": Trial([], worse), "expert": Trial([], near), "neighbour": Trial([], best)}
    assert list(without_worse(trials, names)) == ["expert", "neighbour"]
    few = {way: Trial([], np.where(np.arange(20) < 5, trial.loss_N, np.nan)) for way, trial in trials.items()}
    assert list(without_worse(few, names)) == list(trials)


def test_steps_grow_with_the_utterances_from_the_fewest_to_the_most(monkeypatch):
    monkeypatch.setattr("common.training.added_experts.STEPS", ((2, 3), (10, 11), (20, 61)))
    assert [steps_for(n) for n in (1, 2, 10, 15, 20, 500)] == [3, 3, 11, 36, 61, 61]


def test_folds_never_part_a_group():
    folds = folds_of(["a", "b", "a", "c", "b", "a"], 2)
    assert sorted(map(tuple, folds)) == [(0, 2, 5), (1, 3, 4)]
    assert folds_of(["a"] * 3, 2) == [[0, 1, 2]]


def test_a_full_disk_is_told_and_leaves_no_run(finished, speech, small_disk):
    folder, _ = small_disk
    shutil.copytree(finished, folder / "store")
    with pytest.raises(StoreError, match="full"):
        fill(folder)
        extend(folder / "store", speech)
    assert not (folder / "store" / "micro-s00").exists()


def fill(folder):
    """Leaves a few kilobytes of a small file system."""
    left = shutil.disk_usage(folder).free - 8192
    (folder / "filler").write_bytes(b"0" * max(0, left))


def test_a_corrected_table_is_a_corpus_that_tells_how_much_was_corrected(speech, tmp_path):
    own = read_corpus(speech).utterances[0]
    recording = Recording(Path(own.audio_filepath), "take", Path("take"))
    loaded = LoadedRecording(recording, np.zeros(round(own.duration * 16_000), np.float32))
    half = own.duration / 2
    segments = [
        Segment(start, end, text, (), (), (), 0.0)
        for start, end, text in ((0.0, half, "=one two"), (half, own.duration, "three"))
    ]
    rows = table_rows(segments, loaded, "F07")
    rows[1]["text"] = "three four"
    (tmp_path / "table.csv").write_text(as_csv(rows), encoding="utf-8-sig")
    made = import_table(tmp_path / "table.csv", tmp_path / "corpus")
    assert [u.text for u in made.corpus.utterances] == ["=one two", "three four"]
    assert {u.speaker for u in made.corpus.utterances} == {"F07"} == {row["speaker"] for row in rows}
    assert sum(u.duration for u in made.corpus.utterances) == pytest.approx(own.duration, abs=0.01)
    assert any("nobody corrected: 1 of 2" in note for note in made.notes)


def test_a_model_in_a_bucket_is_extended_there(finished, speech, s3_server, bucket, tmp_path):
    address = f"s3://{bucket}/runs"
    store = open_store(address, endpoint_url=s3_server.endpoint)
    store.put_folder(finished, "")
    before = {entry.key for entry in store.list("")}
    made = extend(address, speech, "--endpoint-url", s3_server.endpoint, method="gates")
    assert made["run"] == "micro-s00"
    child = open_model("micro-s00", store=store, cache=tmp_path / "other", device="cpu")
    assert [expert.name for expert in child.added] == ["s00"]
    new = {entry.key for entry in store.list("")} - before
    assert not [key for key in new if "/asr/" in key or "checkpoints" in key]


def test_somebody_elses_adapter_is_extended_too(store, speech, micro_model, tmp_path):
    whisper = load_whisper(micro_model)
    add_mixture(whisper, targets=TARGETS, num_experts=1, rank=2, alpha=4)
    randomise(whisper)
    save_expert(whisper, 0, tmp_path / "theirs", base_model=str(micro_model))
    before = logits(opened(tmp_path / "theirs", store, tmp_path).recogniser)
    assert extend(store, speech, "--run", "ours", model=tmp_path / "theirs")["run"] == "ours"
    child = opened("ours", store, tmp_path)
    assert torch.equal(logits(child.recogniser), before)
    assert not torch.equal(logits(child.recogniser, [0] * 4), before)


@pytest.mark.parametrize("file", ["own/adapter_config.json", "own/recogniser.json", "base/config.json",
                                  "base/generation_config.json", "base/model.safetensors"])  # fmt: skip
def test_the_key_has_all_that_decides_what_the_model_computes(tmp_path, file):
    """And neither its added experts, nor what was measured, nor where the base was found."""

    def digest():
        model_content.cache_clear()
        folder_digest.cache_clear()
        return parent_digest(SimpleNamespace(folder=tmp_path / "own", base=tmp_path / "base"))

    for name in (file, "base/model.safetensors", "own/report.json", "own/added/a/adapter_config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"lora_alpha": 4, "base": "here"}')
    before = digest()
    for name in ("own/report.json", "own/added/a/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    if file.startswith("own"):
        (tmp_path / file).write_text('{"lora_alpha": 4, "base": "there"}')
    assert digest() == before
    (tmp_path / file).write_text('{"lora_alpha": 8}')
    assert digest() != before
