"""What a dry run says of the work ahead, against what the work was."""

import json
import shutil

import pytest

from cli.runs import show_plan
from stages.forecast import forecasts, stage_work
from stages.local_runner import Run
from tests.stages.test_local_runner import micro_config


def manifests(store):
    """stage → its manifests."""
    by_stage = {}
    for path in (store / "artifacts").glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        by_stage.setdefault(manifest["stage"], []).append(manifest)
    return by_stage


def ahead(config):
    run = Run(config)
    return forecasts(run, run.plan())


def test_utterances_and_steps_are_those_that_the_run_then_took(micro_run, tmp_path, micro_model, tones):
    expected = ahead(micro_config(tmp_path / "empty", micro_model, tones))
    assert set(expected) == {"extract[0]", "cluster", "gating", "experts", "asr"}
    made = manifests(micro_run[0])
    assert expected["asr"].work.steps == made["asr"][0]["metrics"]["steps"]
    assert expected["extract[0]"].work.utterances == made["extract"][0]["metrics"]["utterances"]
    assert expected["experts"].work.utterances == sum(manifest["metrics"]["utterances"] for manifest in made["experts"])
    throughput = made["asr"][0]["metrics"]["throughput"]
    assert expected["asr"].work.amount == pytest.approx(throughput["audio_seconds"])
    assert {forecast.seconds for forecast in expected.values()} == {None}  # nothing was measured in this store


def test_times_are_in_proportion_to_what_was_measured_and_checkpoints_shorten_them(
    micro_run, tmp_path, micro_model, tones, capsys
):
    shutil.copytree(micro_run[0], tmp_path / "store")
    longer = micro_config(tmp_path / "store", micro_model, tones, asr__epochs=4)
    (measured,) = manifests(tmp_path / "store")["asr"]
    scoring = measured["metrics"]["scoring"]["seconds"]
    first = ahead(longer)["asr"]
    assert first.work.steps == 2 * measured["metrics"]["steps"]
    assert first.seconds == pytest.approx(2 * (measured["seconds"] - scoring) + scoring)

    run = Run(longer)
    (asr,) = [p.task for p in run.plan().planned if p.status != "done"]
    half = first.work.steps // 2
    run.store.write(f"{asr.key.prefix}checkpoints/{half:09d}-ab/manifest.json", b"{}")
    run.store.write(f"{asr.key.prefix}checkpoints/{half + 1:09d}-ab/state.json", b"{}")  # torn: no manifest
    again = ahead(longer)["asr"]
    assert again.seconds == pytest.approx(measured["seconds"], rel=0.15) and again.seconds < first.seconds
    show_plan(longer, as_json=False)
    printed = capsys.readouterr().out
    assert f"checkpoint at step {half} of {first.work.steps}, about" in printed and printed.count("about") == 1
    show_plan(longer, as_json=True)
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["asr"]["saved"] == half and "steps" not in rows["cluster"]


def test_limits_of_steps_are_kept(tmp_path, micro_model, tones):
    config = micro_config(tmp_path, micro_model, tones, asr__max_steps=5)
    limited = ahead(config)["asr"].work
    whole = ahead(micro_config(tmp_path, micro_model, tones))["asr"].work
    assert limited.steps == 5 and limited.amount == pytest.approx(whole.amount * 5 / whole.steps)


def test_experts_share_the_work_by_the_number_of_their_shards(tmp_path, micro_model, tones):
    run = Run(micro_config(tmp_path, micro_model, tones, num_experts=4, experts__max_steps=2))
    whole, half = (stage_work(run, "experts", label, shards) for label, shards in (("experts", 0), ("experts[0]", 2)))
    assert (half.utterances, half.steps) == (whole.utterances // 2, 2)
