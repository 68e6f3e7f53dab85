"""Any model by its name: whatever a folder or run holds is opened, and hears what it heard in training's evaluation."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from common.clustering.embeddings import read_tables
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import read_corpus
from common.data.tokens import IGNORED, load_codec
from common.decoding.decode import Decoding
from common.errors import DataError, UsageError
from common.evaluation.evaluate import choose_utterances, decode_corpus
from common.evaluation.score import rates_of
from common.inference.load_model import find_model, open_model, route_batch, transcribe_batch
from common.json_files import read_object, read_rows
from common.model.adapters import save_expert
from common.model.bundle import load_recogniser, save_recogniser
from common.model.mixture import add_mixture, mixture_layers
from common.model.whisper import load_whisper
from common.pipeline.runs import run_record, stage_folders
from common.storage import open_store
from tests.factories import heard_texts, micro_whisper

DECODING = Decoding(batch_size=4, max_new_tokens=6)


@pytest.fixture
def trained(micro_run):
    """A finished run: (store, folder of its model)."""
    return open_store(micro_run[0]), micro_run[1]


def opened(name, cache, store=None, **changes):
    return open_model(str(name), store=store, cache=cache, device="cpu", **changes)


def some(model, tones, count=4):
    """A batch of the corpus's utterances."""
    corpus = read_corpus(tones)
    examples = make_examples(corpus, corpus.utterances[:count], model.codec, context=model.context, margin=model.margin)
    widest = max(example.positions for example in examples)
    examples = [replace(example, positions=widest) for example in examples]
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    return next(iter(loader([list(range(count))])))


def adapter(model, folder, seed=1):
    """A PEFT folder with one random expert, and the model that carries it."""
    whisper = load_whisper(model)
    slot = add_mixture(whisper, targets=("q_proj", "fc1"), num_experts=1, rank=2, alpha=4)
    torch.manual_seed(seed)
    for _, layer in mixture_layers(whisper):
        torch.nn.init.normal_(layer.routed.lora_B, std=0.2)
    save_expert(whisper, 0, folder, base_model=str(model))
    return whisper, slot


def test_a_run_hears_what_its_own_evaluation_heard(trained, tones, tmp_path):
    store, folder = trained
    corpus = read_corpus(tones)
    model = opened("micro", tmp_path, store)
    rows = decode_corpus(model, corpus, choose_utterances(corpus, "test", samples=12), DECODING)
    own = read_rows(folder / "predictions.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in own] and len(rows) == 12
    for mine, theirs in zip(rows, own, strict=True):
        assert {k: mine[k] for k in mine if k != "weights"} == {k: theirs[k] for k in mine if k != "weights"}
        assert mine["weights"] == pytest.approx(theirs["weights"], abs=1e-3)
    assert rates_of(rows) == read_object(folder / "rates.json")["after"]


def test_a_run_is_known_by_name_folder_artifact_and_model_folder(trained, tmp_path):
    store, folder = trained
    root = Path(store.url)
    for name in ("micro", str(root / "micro"), str(folder.parent), str(folder)):
        assert find_model(name, store, tmp_path)[0].resolve() == folder.resolve(), name


@pytest.mark.parametrize(("base", "revision"), [(None, "abc"), ("org/own", "abc"), ("org/other", None)])
def test_the_recorded_revision_is_that_of_the_recorded_base(
    trained, tmp_path, micro_model, monkeypatch, base, revision
):
    monkeypatch.chdir(tmp_path)
    calls = []

    def locate(name, cache, *, revision, endpoint_url):
        calls.append((name, revision))
        return micro_model

    monkeypatch.setattr("common.inference.load_model.locate_model", locate)
    monkeypatch.setattr("common.inference.load_model.with_adapter", lambda whisper, folder: whisper)
    bundle = shutil.copytree(trained[1], tmp_path / "bundle")
    description = read_object(bundle / "recogniser.json")
    (bundle / "recogniser.json").write_text(
        json.dumps(description | {"base": "org/own", "base_digest": "hub:org/own@abc"})
    )
    adapter(micro_model, tmp_path / "adapter")
    settings = read_object(tmp_path / "adapter" / "adapter_config.json")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "org/own", "revision": "abc"})
    )
    for name in ("bundle", "adapter"):
        opened(tmp_path / name, tmp_path, base=base)
    assert calls == [(base or "org/own", revision)] * 2


def test_audio_without_a_table_is_routed_as_its_embedding_is(trained, tones, tmp_path):
    store, _ = trained
    model = opened("micro", tmp_path, store)
    batch = some(model, tones)
    record = run_record(store, "micro")
    table = read_tables(stage_folders(store, record, "extract", tmp_path))
    vectors = torch.from_numpy(table.rows(list(batch.ids)))
    expected = model.recogniser.set_routing(model.recogniser.gate(vectors), len(batch))
    experts, weights = route_batch(model, batch)
    assert experts == expected.topk_ids_BK.tolist()
    assert torch.allclose(torch.tensor(weights), expected.topk_weights_BK, atol=1e-3)


def test_a_model_that_routes_by_speaker_gives_all_of_a_speakers_utterances_one_routing(trained, tones, tmp_path):
    model = opened("micro", tmp_path, trained[0])
    corpus = read_corpus(tones)
    utterances = choose_utterances(corpus, "test", samples=6)
    alone = decode_corpus(model, corpus, utterances, DECODING)
    by_speaker = replace(model, info=replace(model.info, route_by="speaker"))
    together = decode_corpus(by_speaker, corpus, utterances, DECODING)
    weights = {row["speaker"]: (row["experts"], row["weights"]) for row in together}
    assert all((row["experts"], row["weights"]) == weights[row["speaker"]] for row in together)
    assert len({str(row["weights"]) for row in alone}) > len({str(row["weights"]) for row in together}) == len(weights)


def test_texts_do_not_depend_on_the_batch_they_are_in(trained, tones, tmp_path):
    model = opened("micro", tmp_path, trained[0])
    batch = some(model, tones)
    together = heard_texts(model, batch, DECODING)
    assert together == [heard_texts(model, batch.part(i, i + 1), DECODING)[0] for i in range(len(batch))]
    assert transcribe_batch(model, batch, DECODING).routing == route_batch(model, batch)


def test_a_plain_checkpoint_has_no_gate_and_hears_what_the_run_heard_before_training(
    trained, micro_model, tones, tmp_path
):
    corpus = read_corpus(tones)
    model = opened(micro_model, tmp_path)
    assert model.info is None and model.recogniser.gate is None and not model.recogniser.training
    rows = decode_corpus(model, corpus, choose_utterances(corpus, "test", samples=12), DECODING)
    own = read_rows(trained[1] / "predictions.jsonl")
    assert [row["hypothesis"] for row in rows] == [row["hypothesis_before"] for row in own]


def test_a_peft_folder_is_the_model_with_its_one_expert(micro_model, tones, tmp_path):
    whisper, slot = adapter(micro_model, tmp_path / "adapter")
    model = opened(tmp_path / "adapter", tmp_path)
    batch = some(model, tones)
    plain = opened(micro_model, tmp_path)
    with torch.no_grad():
        merged = model.recogniser.encode_batch(batch)
        base = plain.recogniser.encode_batch(batch)
        plain.recogniser.whisper, plain.recogniser.slot = whisper, slot
        unmerged = plain.recogniser.encode_batch(batch)
    assert torch.allclose(merged, unmerged, atol=1e-4) and not torch.allclose(merged, base, atol=1e-2)


def test_a_full_fine_tune_opens_by_its_bundle_and_by_its_weights_with_a_base_for_the_words(
    micro_model, tones, tmp_path, trained
):
    other = micro_whisper(tmp_path / "other", seed=5)
    recogniser, info = load_recogniser(trained[1], micro_model, torch.device("cpu"))
    recogniser.whisper, recogniser.gate = load_whisper(other), None
    save_recogniser(recogniser, replace(info, adapt="full", num_experts=0, gate=False), tmp_path / "full")
    batch = some(opened(other, tmp_path), tones)
    expected = heard_texts(opened(other, tmp_path), batch, DECODING)
    assert heard_texts(opened(tmp_path / "full", tmp_path), batch, DECODING) == expected
    dense = opened(tmp_path / "full" / "dense", tmp_path, base=str(micro_model))
    assert heard_texts(dense, batch, DECODING) == expected


def test_training_evaluation_and_transcription_start_the_decoder_alike(micro_model, tones, tmp_path, monkeypatch):
    """One codec builds both: what precedes the text in training is what decoding starts with, and has one start."""
    model = opened(micro_model, tmp_path)
    codec = load_codec(micro_model)
    assert model.codec.prompt == codec.prompt and codec.prompt.count(codec.prompt[0]) == 1
    corpus = read_corpus(tones)
    examples = make_examples(corpus, corpus.utterances, codec, context="dynamic", margin=64)
    for example in examples:
        assert example.inputs[: len(codec.prompt)] == codec.prompt
        assert list(example.inputs).count(codec.prompt[0]) == 1
        assert codec.prompt[0] not in example.labels and example.labels[-1] == codec.end
        spoken = [label for label in example.labels if label != IGNORED]
        assert codec.decode(spoken) == next(u.text for u in corpus.utterances if u.id == example.id)
    first = []
    decoder = model.recogniser.whisper.model.decoder
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: first.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    heard_texts(model, some(model, tones, 2), DECODING)
    handle.remove()
    assert first[0] == [list(codec.prompt)] * 2


def test_another_base_than_that_of_training_is_told(trained, tmp_path, caplog):
    other = micro_whisper(tmp_path / "other", seed=9)
    with caplog.at_level(logging.WARNING):
        opened("micro", tmp_path, trained[0])
        assert not caplog.messages
        opened("micro", tmp_path, trained[0], base=str(other))
    assert "trained on another base" in caplog.messages[0]


def test_what_is_no_model_is_refused_in_one_line(trained, micro_model, tmp_path):
    store, folder = trained
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"'nothing' is neither a folder, nor a run.*; runs in .*: micro"):
        opened("nothing", tmp_path, store)
    with pytest.raises(DataError, match="contains no model"):
        opened(tmp_path / "empty", tmp_path)
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    info = json.loads((gone / "recogniser.json").read_text())
    (gone / "recogniser.json").write_text(json.dumps(info | {"base": "models/elsewhere"}))
    with pytest.raises(DataError, match="was trained on models/elsewhere, not found here: give --base"):
        opened(gone, tmp_path)
    assert opened(gone, tmp_path, base=str(micro_model)).info is not None


def test_a_damaged_or_pickled_adapter_is_refused(micro_model, tmp_path):
    folder = tmp_path / "adapter"
    adapter(micro_model, folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(DataError, match=r"contains no adapter_model.safetensors"):
        opened(folder, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(weights[:200])
    with pytest.raises(DataError, match="is damaged"):
        opened(folder, tmp_path)
    tensors = load(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"does not fit its base: .*\.lora_A\.weight is in one of them only"):
        opened(folder, tmp_path)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match=r"adapter_config.json cannot be read"):
        opened(folder, tmp_path)


def test_an_unfinished_run_is_refused(trained, tmp_path):
    store, _ = trained
    copy = tmp_path / "store"
    shutil.copytree(store.url, copy)
    shutil.rmtree(next((copy / "artifacts" / "asr").iterdir()))
    with pytest.raises(DataError, match=r"asr of run micro is not done \(not made yet\)"):
        opened("micro", tmp_path, open_store(copy))


def test_a_context_is_used_with_its_margin_reported_or_refused(trained, micro_model, tmp_path, caplog):
    def contexts(name, **changes):
        caplog.clear()
        model = opened(name, tmp_path, trained[0], **changes)
        return (model.context, model.margin), caplog.text

    short = ("dynamic", 64)
    assert contexts(micro_model)[0][0] == "30s" and "audio context" not in caplog.text
    used, text = contexts(micro_model, context="dynamic")
    assert used == short and "is meant for Whisper's audio context of 30 s" in text
    assert contexts(trained[1]) == (short, "")
    used, text = contexts(trained[1], context="30s")
    assert used[0] == "30s" and "was trained with an audio context of the utterance's own length and 1.3 s" in text
    assert contexts(trained[1], margin=65)[0] == ("dynamic", 65) and "as requested" in caplog.text
    for name, changes in ((micro_model, {"margin": 256}), (trained[1], {"margin": 64, "context": "30s"})):
        with pytest.raises(UsageError, match="has no margin"):
            opened(name, tmp_path, trained[0], **changes)
