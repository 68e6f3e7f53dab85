"""A run with AdaLoRA: resumed equals uninterrupted, and what it leaves is read, exported and merged like any other."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from cli.main import cli
from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.sources import open_corpus
from common.errors import Preempted, UsageError
from common.evaluation.score import Decoding
from common.export.formats import probe
from common.inference.load_model import open_model
from common.model.adapters import read_adapter
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.storage import open_store
from stages.local_runner import Run, run_pipeline
from tests.factories import heard_texts
from tests.stages.test_local_runner import digests, micro_config, run_task, stop_after


def adaptive(store, model, corpus, **changes):
    """18 steps, in which ranks are taken away after steps 2 to 13."""
    return micro_config(
        store, model, corpus, asr__adapt="adalora", adalora={"interval": 1}, asr__learning_rate=3e-3, **changes
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, micro_model, tones):
    """(store, folder of the model, summary)."""
    store = tmp_path_factory.mktemp("adalora") / "store"
    summary = run_pipeline(adaptive(store, micro_model, tones))
    return store, next(store.glob("artifacts/asr/*/*/recogniser.json")).parent, summary


@pytest.mark.parametrize("step", [4, 13, 15])  # while ranks are taken away, at the last time, and after
def test_stopped_and_resumed_training_ends_with_the_same_bits(made, tmp_path, micro_model, tones, step):
    config = adaptive(tmp_path, micro_model, tones)
    run = Run(config)
    task = run.plan().planned[0].task
    with pytest.raises(Preempted):
        run_task(run, task, tmp_path / "s", stop_after(step))
    run_pipeline(config)
    assert digests(tmp_path) == digests(made[0])


def test_the_budget_is_kept_over_all_layers(made):
    ranks = json.loads((made[1] / "ranks.json").read_text())
    config = json.loads((made[1] / "shared/adapter_config.json").read_text())
    assert sum(ranks.values()) == 2 * len(ranks)  # lora.rank on average
    assert max(ranks.values()) == config["r"] <= math.ceil(1.5 * 2)
    tensors = read_adapter(made[1] / "shared")
    for name, rank in ranks.items():
        kept = tensors[f"base_model.model.{name}.lora_B.weight"].abs().sum(0) > 0
        assert int(kept.sum()) == rank


def test_only_weights_of_the_final_budget_can_be_selected(made):
    rows = [json.loads(line) for line in (made[1] / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "wer" in row) for row in rows if row["split"] == "dev"] == [(9, False), (18, True)]


def test_read_back_it_hears_what_the_run_heard(made, tmp_path, tones):
    rows = [json.loads(line) for line in (made[1] / "predictions.jsonl").read_text().splitlines()]
    opened = open_model("micro", store=open_store(made[0]), cache=tmp_path, device="cpu", precision="fp32")
    corpus = open_corpus(str(tones), tmp_path)
    wanted = {row["id"] for row in rows}
    utterances = [u for u in corpus.split("test") if u.id in wanted]
    examples = make_examples(corpus, utterances, opened.codec, context=opened.context, margin=opened.margin)
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    heard = {}
    for batch in loader(epoch_batches(examples, batch_size=16, shuffle=False)):
        heard |= zip(batch.ids, heard_texts(opened, batch, Decoding(16, 6)), strict=True)
    assert heard == {row["id"]: row["hypothesis"] for row in rows}


def moe_asr(*words):
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_it_is_exported_by_its_runs_name(made, tmp_path, micro_model):
    store = made[0]
    for target in ("merged", "peft"):
        done = moe_asr("export", "micro", "--store", store, "--to", target, "--out", tmp_path / target)
        assert done.exception is None, done.output
        assert json.loads((tmp_path / target / "export.json").read_text())["format"] == target
    ours = open_model("micro", store=open_store(store), cache=tmp_path, device="cpu")
    dense = open_model(str(tmp_path / "merged"), store=None, cache=tmp_path, device="cpu")
    peft = PeftModel.from_pretrained(load_whisper(micro_model), tmp_path / "peft" / "adapter")
    expected = probe(ours.recogniser, ours.codec, {})
    for other in (dense.recogniser, Recogniser(peft.get_base_model())):
        torch.testing.assert_close(probe(other, ours.codec, {}), expected, rtol=1e-4, atol=1e-3)


def test_runs_are_merged_by_their_names(made, tmp_path):
    store = made[0]
    words = ("merge", "micro", made[1], "--store", store, "--out", tmp_path / "merged")
    done = moe_asr(*words, "--weights", "0.25,0.75")
    assert done.exception is None, done.output
    assert "merged: rank 6" in done.output
    ours, both = (
        open_model(str(path), store=None, cache=tmp_path, device="cpu") for path in (made[1], tmp_path / "merged")
    )
    actual, expected = (probe(model.recogniser, model.codec, {0: 1.0}) for model in (both, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)  # the mean of a model with itself
    again = moe_asr(*words)
    assert isinstance(again.exception, UsageError) and "--overwrite" in str(again.exception)
    assert moe_asr(*words, "--overwrite").exception is None
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["weights"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "micro", "--to", "peft", "--expert", "0"), "keeps all experts"),
        (("export", "micro", "--to", "merged", "--quantization", "int8"), "is for --to ctranslate2"),
        (("export", "micro", "--to", "merged", "--weights", "a,b"), "write numbers with commas"),
        (("export", "micro", "--to", "merged", "--expert", "1"), "no experts to choose from"),
        (("merge", "micro"), "give two models or more"),
        (("merge", "micro", "micro", "--weights", "1"), "1 numbers for 2 models"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(made, tmp_path, words, message):
    done = moe_asr(*words, "--store", made[0], "--out", tmp_path / "out")
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
    assert list(tmp_path.iterdir()) == []
