"""The benchmark runs, and compares like with like: peers compute the same losses as ours where they should."""

import dataclasses
import json

import pytest
import torch

from bench import encoding, joint, kernels, run
from bench.dense import make_dense
from bench.inputs import make_batch, short_lengths, write_clips
from bench.measure import row
from bench.peers import (
    collate_padded,
    embed_padded,
    features_of,
    loop_backward,
    lora_backward,
    make_trainer,
    trainer_dataset,
)
from bench.setting import quick_setting
from bench.table import context_rates, full_table, options_table
from common.data.batches import BatchLoader
from common.data.features import log_mel
from common.model.adapters import expert_matrices
from common.model.recogniser import Recogniser

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the peers' own
]
KEYS = {"group", "row", "ours", "peer", "unit", "ratio", "target", "note"}


@pytest.fixture(scope="module")
def setting():
    return quick_setting()


@pytest.fixture(scope="module")
def contest(setting):
    made = joint.make_contest(setting)
    for parameter in made.blend.parameters():
        if parameter.requires_grad and parameter.ndim == 3:  # LoRA's B starts at zero, and all experts would be equal
            torch.nn.init.normal_(parameter, std=0.05)
    joint.copy_into_peft(made.blend, made.peft, setting.experts)
    return made


def test_measuring_one_group_again_keeps_the_rows_of_the_others(tmp_path):
    path = tmp_path / "out.json"
    run.main(["--quick", "--only", "log-mel", "--out", str(path)])
    before = json.loads(path.read_text(encoding="utf-8"))
    run.main(["--quick", "--only", "extract", "--out", str(path)])
    after = json.loads(path.read_text(encoding="utf-8"))
    assert [entry["group"] for entry in after["rows"]] == sorted(entry["group"] for entry in after["rows"])
    assert [entry for entry in after["rows"] if entry["group"] == "log-mel"] == before["rows"]


def test_some_groups_alone_never_replace_rows_of_another_machine(tmp_path, capsys):
    path = tmp_path / "out.json"
    run.main(["--quick", "--only", "log-mel", "--out", str(path)])
    other = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"device": "another"})
    path.write_text(other, encoding="utf-8")
    with pytest.raises(SystemExit):
        run.main(["--quick", "--only", "log-mel", "--out", str(path)])
    assert "rows of another device" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == other


def test_a_group_that_fails_keeps_its_earlier_rows(tmp_path, monkeypatch):
    def fails(_):
        raise RuntimeError("out of memory")

    path = tmp_path / "out.json"
    run.main(["--quick", "--only", "log-mel", "--out", str(path)])
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(run, "GROUPS", {**run.GROUPS, "log-mel": fails})
    run.main(["--quick", "--only", "log-mel", "--out", str(path)])
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("group", [name for name in run.GROUPS if name not in run.FULL_SIZE_ONLY])
def test_every_group_of_rows_runs_and_gives_the_format(group, tmp_path):
    path = tmp_path / "out.json"
    run.main(["--quick", "--only", group, "--out", str(path)])
    report = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "versions", "rows"} == set(report)
    assert report["rows"]
    for entry in report["rows"]:
        assert set(entry) >= KEYS
        assert min(entry["ours"], entry["peer"], entry["ratio"]) > 0


def test_ratio_above_one_is_better_for_times_and_for_rates():
    shared = {"unit": "", "target": None, "note": ""}
    assert row("time", 1.0, 3.0, **shared)["ratio"] == 3.0
    assert row("rate", 6.0, 3.0, better="more", **shared)["ratio"] == 2.0


def test_rows_that_train_with_a_short_context_state_the_error_rates_of_both_sides(tmp_path):
    results = tmp_path / "regimes.json"
    rates = {("bench", 384, "dense-plain"): 0.119, ("bench", 384, "peft"): 0.107, ("bench", 128, "peft"): 0.3}
    rows = [{"corpus": of[0], "steps": of[1], "regime": of[2], "wer": wer} for of, wer in rates.items()]
    results.write_text(json.dumps({"summary": rows}))
    assert context_rates(results) == "WER of LoRA after 384 steps 11.9% against 10.7%"
    lines = [
        line for line in (*full_table(), *options_table()) if "dynamic" in line or "3–12 s: against Seq2Seq" in line
    ]
    assert lines
    for line in lines:
        assert context_rates() in line or "% WER" in line, line


def test_batched_loss_mixture_equals_both_loops_over_peft_adapters(contest, setting):
    ours = joint.ours_backward(contest.loss, contest.batch)
    for all_rows in (False, True):
        theirs = loop_backward(
            contest.peft, contest.gate, contest.features_BMF, contest.batch, setting.top_k, all_rows=all_rows
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_loop_equal_ours(contest, setting):
    for module in (contest.loss, contest.peft, contest.gate):
        module.zero_grad()
    joint.ours_backward(contest.loss, contest.batch)
    loop_backward(contest.peft, contest.gate, contest.features_BMF, contest.batch, setting.top_k, all_rows=False)
    ours, theirs = dict(contest.loss.gate.named_parameters()), dict(contest.gate.named_parameters())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-2, atol=1e-5)
    name = "model.encoder.layers.0.fc1"
    layer = contest.loss.whisper.get_submodule(name)
    peft = contest.peft.get_base_model().get_submodule(name)
    for expert in range(setting.experts):
        theirs_grad = peft.lora_A[str(expert)].weight.grad
        expected = torch.zeros_like(layer.routed.lora_A[expert]) if theirs_grad is None else theirs_grad
        torch.testing.assert_close(layer.routed.lora_A.grad[expert], expected, rtol=1e-2, atol=1e-5)


def test_blend_of_one_expert_equals_one_plain_peft_lora(setting):
    single = joint.make_contest(dataclasses.replace(setting, experts=1, top_k=1))
    ours = joint.ours_backward(single.blend, single.batch)
    theirs = lora_backward(single.lora, single.features_BMF, single.batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt", ["LoRA", "full"])
def test_the_trainers_loss_equals_ours_on_the_same_batch(adapt, setting, tmp_path):
    examples = write_clips(tmp_path, setting.dense_model, short_lengths(2), context="30s")
    recogniser = make_dense(adapt, setting).eval()
    trainer, _ = make_trainer(recogniser.whisper, trainer_dataset(examples, 80), setting, tmp_path / "trainer")
    batch = next(iter(BatchLoader(examples, num_workers=0, device=setting.device)([[0, 1]])))
    inputs = collate_padded(trainer_dataset(examples, 80), end=recogniser.whisper.config.eos_token_id)
    if recogniser.slot is not None:
        recogniser.set_routing(None, len(batch))
    with torch.no_grad():
        theirs = trainer.compute_loss(recogniser.whisper, inputs)
        ours = recogniser(batch)[0] / batch.weight
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_trainer_reads_what_the_loader_reads_of_a_recording(setting, tmp_path):
    (whole,) = write_clips(tmp_path, setting.dense_model, [4.0], context="30s")
    part = dataclasses.replace(whole, offset=1.0, duration=2.0)
    (batch,) = BatchLoader([part], num_workers=0, device=setting.device)([[0]])
    (row,) = trainer_dataset([part], 128)
    expected_MF = log_mel(batch.audio_BS, 128)[0].cpu()
    torch.testing.assert_close(torch.as_tensor(row["input_features"]), expected_MF, rtol=1e-3, atol=1e-3)


def test_embeddings_equal_the_padded_encoders_where_nothing_is_padded(setting, tmp_path):
    examples = write_clips(tmp_path, setting.model, [30.0, 30.0], context="30s")
    recogniser = Recogniser(joint.make_whisper(setting.model, setting.device)).eval()
    loader = BatchLoader(examples, num_workers=0, device=setting.device)
    ours, _ = encoding.embed(recogniser, examples, loader, setting)
    theirs = torch.from_numpy(embed_padded(recogniser.whisper, examples, setting))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_peers_spectrograms_equal_ours(setting):
    batch = make_batch(setting.model, [30.0, 4.0], setting.device)
    torch.testing.assert_close(log_mel(batch.audio_BS, 80), features_of(batch, setting.device), rtol=1e-3, atol=1e-3)


def test_adapters_copied_into_peft_are_ours(contest):
    layer, ours = next(iter(expert_matrices(contest.blend.whisper, 1).items()))
    for letter, matrix in zip("AB", ours, strict=True):
        theirs = contest.peft.state_dict()[f"base_model.model.{layer}.lora_{letter}.1.weight"]
        assert torch.equal(matrix, theirs)


def test_kernels_are_timed_and_a_choice_is_judged(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.kernels", "--quick", "--cpu"])
    kernels.main()
    assert "of 1 choices are right" in capsys.readouterr().out
