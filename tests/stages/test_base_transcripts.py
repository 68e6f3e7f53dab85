"""The base model decodes the test set once in a store, and again where its texts may differ."""

import json

import pytest

from common.storage import open_store
from common.storage.manifest import MANIFEST
from stages.asr import run as asr
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import micro_config

LITTLE = {"asr__pretrain": "none", "asr__epochs": 1, "num_experts": 1}


@pytest.fixture(scope="module")
def first(tmp_path_factory, micro_model, tones):
    """A store with a finished run, and that run's rows."""
    store = tmp_path_factory.mktemp("base") / "store"
    run_pipeline(micro_config(store, micro_model, tones, run="first", **LITTLE))
    return store, base_rows(store, "first")


@pytest.fixture
def passes(monkeypatch):
    """What is decoded: `base` or `trained`, once a test set."""
    seen, decode = [], asr._decode

    def counting(joint, name, *args, **kwargs):
        seen.append(name.split()[2])
        return decode(joint, name, *args, **kwargs)

    monkeypatch.setattr(asr, "_decode", counting)
    return seen


def base_rows(store, run):
    """What predictions.jsonl of a run says of the base model."""
    key = json.loads((store / run / "run.json").read_text())["tasks"]["asr"]["key"]
    (path,) = (store / "artifacts" / "asr" / key).glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: (row["hypothesis_before"], row["errors_before"]) for row in rows}


def entries(store):
    return sorted((store / "artifacts" / "base").glob(f"*/{MANIFEST}"))


@pytest.mark.parametrize(
    "changes",
    [
        {"asr__learning_rate": 1e-2, "seed": 7, "audio__margin": 128, "audio__long_audio": "drop"},
        {"asr__adapt": "full"},
        {"decode": {"max_new_tokens": 6, "normaliser": "published"}},
    ],
)
def test_what_changes_no_text_of_the_base_model_decodes_it_no_more(first, passes, micro_model, tones, changes):
    store, rows = first
    run_pipeline(micro_config(store, micro_model, tones, run="-".join(["again", *changes]), **LITTLE | changes))
    assert passes == ["trained"]
    new_rows = base_rows(store, "-".join(["again", *changes]))
    assert {name: text for name, (text, _) in new_rows.items()} == {name: text for name, (text, _) in rows.items()}
    assert new_rows == rows or "decode" in changes


@pytest.mark.parametrize(
    "changes",
    [{"decode": {"max_new_tokens": 5}}, {"decode": {"max_new_tokens": 6, "num_beams": 2}}],
)
def test_other_decoding_options_decode_it_again(first, passes, micro_model, tones, changes):
    store, _ = first
    before = len(entries(store))
    run_pipeline(micro_config(store, micro_model, tones, run=f"other{before}", **LITTLE | changes))
    assert passes == ["trained", "base"]
    assert len(entries(store)) == before + 1


def test_another_base_model_or_another_corpus_is_decoded_again(tmp_path, first, passes, micro_model, tones):
    from tests.factories import micro_corpus, micro_whisper

    store, _ = first
    run_pipeline(micro_config(store, micro_whisper(tmp_path / "other", seed=1), tones, run="model", **LITTLE))
    corpus = micro_corpus(tmp_path / "corpus", seed=3)
    run_pipeline(micro_config(store, micro_model, corpus, run="corpus", **LITTLE))
    assert passes == ["trained", "base"] * 2


@pytest.mark.parametrize("how", ["altered", "cut", "no manifest"])
def test_damaged_transcripts_are_made_again(tmp_path, passes, micro_model, tones, how):
    store = tmp_path / "store"
    run_pipeline(micro_config(store, micro_model, tones, run="first", **LITTLE))
    (manifest,) = entries(store)
    (path,) = manifest.parent.glob("*/transcripts.jsonl")
    text = path.read_text()
    if how == "altered":
        path.write_text(text.replace('"text": "', '"text": "~', 1)[: len(text)])
    elif how == "cut":
        path.write_text(text[:20])
    else:
        manifest.unlink()
    run_pipeline(micro_config(store, micro_model, tones, run="second", asr__learning_rate=1e-2, **LITTLE))
    assert passes == ["trained", "base"] * 2
    assert base_rows(store, "second") == base_rows(store, "first")
    run_pipeline(micro_config(store, micro_model, tones, run="third", asr__learning_rate=1e-3, **LITTLE))
    assert passes == ["trained", "base"] * 2 + ["trained"]


def test_two_writers_leave_one_result(tmp_path):
    from common.pipeline.shared_results import SharedResults
    from common.storage.artifacts import make_key

    results, key = SharedResults(open_store(tmp_path / "store"), tmp_path), make_key("base", 1, {}, {})
    assert results.find(key) is None
    for text in ("one", "two"):
        results.add(key, lambda folder, text=text: (folder / "a").write_text(text) and None, started=0.0)
    assert (results.find(key) / "a").read_text() == "one"
    with pytest.raises(ZeroDivisionError):
        results.add(make_key("base", 2, {}, {}), lambda folder: 1 / 0, started=0.0)
    assert len(list((tmp_path / "store" / "artifacts" / "base").glob("*/*"))) == 2
