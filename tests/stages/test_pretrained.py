"""`asr.pretrain: experts`: the shared expert first, routed experts on top of it, then all jointly."""

import json
import re
import shutil

import pytest
import torch

from common.clustering.embeddings import read_tables
from common.config import validate
from common.data.batches import BatchLoader, epoch_batches
from common.data.tokens import load_codec
from common.errors import ConfigError, Preempted
from common.model.adapters import adapter_matrices, expert_matrices
from common.model.mixture import mixture_layers
from common.pipeline.stage import execute
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages import run_function
from stages.asr.ablation import drop_expert
from stages.asr.build import build
from stages.experts.run import new_adapter
from stages.local_runner import Run, run_pipeline
from stages.settings import speech_examples
from stages.sweep import plan_sweep, regime_settings
from tests.stages.test_local_runner import digests, micro_config, statuses, stop_after


def pretrained(store, model, corpus, **changes):
    return micro_config(store, model, corpus, **{"asr__pretrain": "experts"} | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory, micro_model, tones):
    """A finished run: (store, configuration)."""
    store = tmp_path_factory.mktemp("pretrained") / "store"
    config = pretrained(store, micro_model, tones)
    run_pipeline(config)
    return store, config


@pytest.fixture
def again(made, tmp_path, micro_model, tones):
    """A copy of the finished run."""
    shutil.copytree(made[0], tmp_path / "store")
    return tmp_path / "store", pretrained(tmp_path / "store", micro_model, tones)


def folders(store, stage):
    """The output folders of a stage's tasks in the run."""
    record = json.loads((store / "micro" / "run.json").read_text())
    paths = []
    for task in record["tasks"].values():
        if task["stage"] == stage:
            manifest = inspect(open_store(store), Key(stage, task["key"])).manifest
            paths.append(store / "artifacts" / stage / task["key"] / manifest.attempt)
    return paths


def test_the_shared_expert_comes_first_and_both_are_in_timeline_and_report(made):
    store, _ = made
    record = json.loads((store / "micro" / "run.json").read_text())
    order = [row["stage"] for row in sorted(record["timeline"], key=lambda row: row["started"])]
    assert order == ["extract", "cluster", "gating", "shared", "experts", "experts", "asr"]
    page = (store / "micro" / "report.html").read_text()
    times = re.findall(r"<td>([^<]*)</td>\s*<td class=\"text\">", page.split('id="experts"')[1].split("</table>")[0])
    assert len(times) == 3 and "–" not in times
    assert "trained on top of the shared one" in page and "shared expert, expert 0, expert 1" in page
    report = json.loads((folders(store, "shared")[0] / "report.json").read_text())
    parts = [json.loads((folder / "report.json").read_text()) for folder in folders(store, "experts")]
    assert report["utterances"] == sum(part["utterances"] for part in parts)  # all of the subset, then its clusters


def test_joint_training_starts_from_the_pretrained_weights(made, micro_model):
    store, config = made
    shared, experts = folders(store, "shared"), folders(store, "experts")
    table = read_tables(folders(store, "extract"))
    start = build(config, micro_model, table, folders(store, "gating"), experts, shared=shared)
    for number, folder in [(None, shared[0]), *enumerate(experts)]:
        trained, saved = expert_matrices(start.whisper, number), adapter_matrices(folder)
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip_values(trained, saved))
        assert any(b.any() for _, b in saved.values())  # it has learnt something
    assert all(p.requires_grad for _, layer in mixture_layers(start) for p in layer.shared.parameters())


def zip_values(first, other):
    assert first.keys() == other.keys()
    return [(first[name], other[name]) for name in first]


def test_with_its_routed_experts_zeroed_it_equals_the_shared_expert(made, micro_model):
    from common.model.adapters import load_expert

    store, config = made
    run, shared, experts = Run(config), folders(store, "shared"), folders(store, "experts")
    mixture = build(config, micro_model, read_tables(folders(store, "extract")), [], experts, shared=shared).eval()
    alone = new_adapter(config, micro_model, routed=0, shared_rank=config.lora.shared_rank, seed=1).eval()
    load_expert(alone.whisper, None, shared[0])
    codec = load_codec(micro_model, language="en")
    examples = speech_examples(config, run.corpus, run.corpus.split("dev")[:4], codec)
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    (batch,) = loader(epoch_batches(examples, batch_size=4, shuffle=False))
    mixture.choose_by(logits_NE=torch.randn(4, 2))
    with torch.no_grad():
        (loss_B, _), (expected_B, _) = mixture.utterance_losses(batch), alone.utterance_losses(batch)
        assert (loss_B - expected_B).abs().max() > 1e-4
        for expert in (0, 1):
            drop_expert(mixture, expert)
        torch.testing.assert_close(mixture.utterance_losses(batch)[0], expected_B)


@pytest.mark.parametrize(("stage", "step"), [("shared", 2), ("experts", 1), ("asr", 3)])
def test_stopped_and_resumed_training_ends_with_the_same_bits(again, made, stage, step):
    store, config = again
    for name in ("shared", "experts", "asr")[("shared", "experts", "asr").index(stage) :]:
        shutil.rmtree(store / "artifacts" / name)
    run = Run(config)
    task = next(p.task for p in run.plan().planned if p.task.contract.name == stage)
    with pytest.raises(Preempted):
        execute(
            task,
            run_function(stage),
            config,
            run.store,
            corpus=run.corpus,
            scratch=store.parent / "scratch",
            stopping=stop_after(step),
        )
    run_pipeline(config)
    assert digests(store) == digests(made[0])


def test_keys_change_with_the_settings_and_alone_shares_the_gate(again, micro_model, tones):
    store, _ = again

    def fresh(**changes):
        states = statuses(pretrained(store, micro_model, tones, **changes))
        return {label.partition("[")[0] for label, (status, _) in states.items() if status != "done"}

    assert fresh() == set()
    assert fresh(asr__learning_rate=3e-4) == {"asr"}
    assert fresh(asr__routed_rate=0.5) == {"experts", "asr"}
    assert fresh(experts={"epochs": 1, "batch_size": 8, "shared_max_steps": 2}) == {"shared", "experts", "asr"}
    assert fresh(asr__pretrain="alone") == {"experts", "asr"}
    assert fresh(asr__pretrain="gate") == {"asr"}


def test_a_pretrained_shared_expert_without_one_is_refused():
    with pytest.raises(ConfigError, match="shared_expert is off"):
        validate({"asr": {"pretrain": "experts", "shared_expert": False}})


def test_a_sweep_counts_the_steps_of_all_three_parts(made, micro_model, tones, tmp_path):
    config = made[1]
    for clusters in (2, 5):
        settings = regime_settings(config, "pretrained", clusters=clusters, steps=101, pretrain_share=0.5)
        parts = (
            settings["experts.shared_max_steps"],
            settings["experts.max_steps"] * clusters,
            settings["asr.max_steps"],
        )
        assert parts[0] == 25 and sum(parts) == 101
    (run,) = plan_sweep(config, ["pretrained"], seeds=[42], steps=9)
    run_pipeline(run.config)
    record = json.loads((made[0] / run.name / "run.json").read_text())
    manifests = [inspect(open_store(made[0]), Key(t["stage"], t["key"])).manifest for t in record["tasks"].values()]
    steps = {}
    for manifest in manifests:
        steps[manifest.stage] = steps.get(manifest.stage, 0) + manifest.metrics.get("steps", 0)
    assert (steps["shared"], steps["experts"], steps["asr"]) == (2, 2, 5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_single_cluster_trains_one_adapter_for_everybody(micro_model, tmp_path, shared):
    """What was pre-trained alone on all utterances is where joint training starts, if ranks are equal."""
    from common.model.adapters import save_expert

    settings = {"num_experts": 2, "lora": {"rank": 2, "shared_rank": 4, "targets": ["fc1"]}}
    config = validate({**settings, "asr": {"pretrain": "alone", "shared_expert": shared}})
    adapter = new_adapter(config, micro_model, routed=1, shared_rank=0, seed=0)
    save_expert(adapter.whisper, 0, tmp_path, base_model="micro")
    recogniser = build(config, micro_model, None, [], [tmp_path])
    assert recogniser.num_experts == 0
    same = expert_matrices(recogniser.whisper, None), adapter_matrices(tmp_path)
    assert shared or all(torch.equal(a, c) for (a, _), (c, _) in zip_values(*same))
