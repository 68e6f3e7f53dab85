"""Attempts: what an interrupted stage leaves, what `status` shows of it, and whose time a manifest holds."""

import json
import shutil
import time

import pytest

from common.errors import DataError, RetryableError
from common.pipeline import attempts
from common.pipeline.attempts import attempt_at, attempts_at, describe_attempt
from common.storage import open_store
from common.storage.artifacts import Key

KEY = Key("asr", "0" * 32)


def test_a_running_attempt_is_recorded_and_its_time_counts_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "EVERY", 0.01)
    store = open_store(tmp_path)
    with pytest.raises(DataError), attempt_at(store, KEY) as attempt:
        attempt.activity.begin("training", 21, 60, "steps")
        until = time.monotonic() + 10
        while not attempts_at(store, KEY) and time.monotonic() < until:
            time.sleep(0.01)
        (seen,) = attempts_at(store, KEY)
        assert describe_attempt(seen, now=seen["updated"]) == "training: 21 of 60 steps"
        raise DataError("a user's error")
    (last,) = attempts_at(store, KEY)
    assert last["seconds"] >= seen["seconds"]
    assert describe_attempt(last, now=last["updated"] + 600) == "stopped 10 min ago, training: 21 of 60 steps"
    with attempt_at(store, KEY) as attempt:
        assert (attempt.number, attempt.first, attempt.earlier) == (2, last["started"], last["seconds"])
        assert attempt.seconds >= last["seconds"]


def test_a_store_that_fails_is_not_asked_again_and_damaged_records_are_left_out(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(RetryableError), attempt_at(store, KEY):
        raise RetryableError("no answer")
    store.write(f"{KEY.prefix}checkpoints/attempt-1.json", b"{")
    store.write(f"{KEY.prefix}checkpoints/attempt-2.json", b'{"started": 1, "updated": 2}')
    store.write(f"{KEY.prefix}checkpoints/attempt-3.json", b"[" * 100_000)
    assert attempts_at(store, KEY) == []


def test_interrupted_scoring_keeps_training_and_its_time_is_added_up(
    micro_run, tmp_path, micro_model, tones, monkeypatch, capsys
):
    from common.errors import Preempted
    from stages.local_runner import Run, finish, run_one
    from tests.cli.test_evaluate import call
    from tests.stages.test_local_runner import digests, micro_config, stop_after

    monkeypatch.setenv("MOE_ASR_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "store"
    shutil.copytree(micro_run[0], store)
    (whole,) = (store / "artifacts" / "asr").glob("*/manifest.json")
    before = json.loads(whole.read_text())
    whole.unlink()
    run = Run(micro_config(store, micro_model, tones))
    (planned,) = [p for p in run.plan().planned if p.status != "done"]
    with pytest.raises(Preempted, match="training is saved; scoring will start again"):
        run_one(run, planned, stop_after(before["metrics"]["steps"] + 1))
    run.record["timeline"] = []
    run.save("stopped", run.plan())
    call("status", "micro", "--store", store)
    assert "scoring the trained model: 12 of 12 utterances" in capsys.readouterr().out
    (first,) = attempts_at(run.store, planned.task.key)
    made = run_one(run, planned, lambda: False)
    assert (made.metrics["attempts"], made.started) == (2, first["started"]) and made.seconds > first["seconds"]
    ours, theirs = made.metrics["throughput"], before["metrics"]["throughput"]
    assert [ours[name] for name in ("samples", "audio_seconds")] == [theirs[n] for n in ("samples", "audio_seconds")]
    run.note(planned.task, made, ran=True)
    assert finish(run, run.plan())["seconds"]["asr"] == round(made.seconds, 2)
    assert digests(store) == digests(micro_run[0])
    call("status", "micro", "--store", store)
    assert "in 2 attempts" in capsys.readouterr().out
    assert attempts_at(run.store, planned.task.key) == []
