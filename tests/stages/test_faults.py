"""A run on a folder meets real signals at random training steps, other runs, a full disk, poison: what is lost, what is
said, and that it ends as if nothing had happened.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.clustering.embeddings import read_tables
from common.errors import DataError, Preempted, StoreError
from common.signals import StopFlag
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages.local_runner import Run, run_pipeline
from tests.stages.test_kill import quick_config
from tests.stages.test_local_runner import digests

STEPS = {"gating": 4, "experts": 1, "asr": 4}  # optimiser steps that each stage does at least
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path.cwd())}

# A stage's command that sends itself a signal after the n-th optimiser step.
SIGNALLED = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
at, number, *words = sys.argv[1:]
steps = iter(range(1, 10**9))
def signal_at(*_):
    if next(steps) == int(at):
        os.kill(os.getpid(), int(number))
register_optimizer_step_post_hook(signal_at)
from stages.__main__ import main
sys.argv[1:] = words
main()
"""


def often_saved(store, model, corpus):
    """The quick run with a checkpoint after every step; runtime settings are part of no key."""
    config = quick_config(store, model, corpus)
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"checkpoint_minutes": 1e-6})})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_model, tones):
    """The store of an uninterrupted run."""
    store = tmp_path_factory.mktemp("finished") / "store"
    run_pipeline(quick_config(store, micro_model, tones))
    return store


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it to be broken."""
    return shutil.copytree(finished, tmp_path / "store")


def write_config(config, folder):
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def losses(store, stage):
    """Every row that each piece of a stage logged; what a killed try left beside it is no part of the piece."""
    manifests = (Path(store) / "artifacts" / stage).glob("*/manifest.json")
    attempts = {path.parent: json.loads(path.read_text())["attempt"] for path in manifests}
    return {piece.name: (piece / attempt / "metrics.jsonl").read_text() for piece, attempt in attempts.items()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("stage", STEPS)
def test_a_signal_at_a_random_training_step_changes_no_loss_and_no_weight(
    finished, again, stage, number, tmp_path, micro_model, tones
):
    for manifest in (again / "artifacts" / stage).glob("*/manifest.json"):
        shutil.rmtree(manifest.parent)
    config = often_saved(again, micro_model, tones)
    step = random.Random(f"{stage}{number}").randint(1, STEPS[stage])
    words = [stage, "--config", str(write_config(config, tmp_path))]
    stopped = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(step), str(int(number)), *words],
        env=ENVIRONMENT | {"MOE_ASR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if number == signal.SIGTERM:
        assert stopped.returncode == 143, stopped.stderr
        assert f"stopped by a signal at step {step}" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert list((again / "artifacts" / stage).glob("*/checkpoints/*/manifest.json"))
    else:
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    run_pipeline(config)
    assert losses(again, stage) == losses(finished, stage)
    assert digests(again) == digests(finished)


def test_runs_side_by_side_on_one_store_share_equal_work_and_mix_nothing(finished, tmp_path, micro_model, tones):
    """Two with one seed race for the same keys; a third has another seed."""
    store = tmp_path / "store"
    seeds = {"one": 42, "two": 42, "seven": 7}
    racers = []
    for name, seed in seeds.items():
        config = quick_config(store, micro_model, tones).model_copy(update={"run": name, "seed": seed})
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "cli.main", "run", "--config", str(write_config(config, tmp_path / name))]
        environment = ENVIRONMENT | {"MOE_ASR_CACHE": str(tmp_path / name / "cache")}
        racers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for racer in racers:
        _, told = racer.communicate(timeout=280)
        assert racer.returncode == 0, told.decode()

    def stored(name, place=store):
        tasks = json.loads((place / name / "run.json").read_text())["tasks"]
        return {
            label: (task["key"], inspect(open_store(place), Key(task["stage"], task["key"]), deep=True).manifest.digest)
            for label, task in tasks.items()
        }

    alone = tmp_path / "alone"
    run_pipeline(quick_config(alone, micro_model, tones).model_copy(update={"run": "seven", "seed": 7}))
    assert stored("one") == stored("two") == stored("micro", finished)
    assert stored("seven") == stored("seven", alone)
    assert not {key for key, _ in stored("seven").values()} & {key for key, _ in stored("one").values()}


def test_a_run_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(finished, small_disk, micro_model, tones):
    folder, remount = small_disk
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    (folder / "filler").write_bytes(bytes(free - 150_000))
    config = quick_config(folder / "store", micro_model, tones)
    with pytest.raises(StoreError, match=r"disk is full.*free some space") as told:
        run_pipeline(config)
    assert "\n" not in str(told.value)
    for artifact in (folder / "store").glob("artifacts/*/*"):
        state = inspect(open_store(folder / "store"), Key(artifact.parent.name, artifact.name), deep=True)
        assert state.status in ("missing", "done")
    remount("size=64m")
    run_pipeline(config)
    assert digests(folder / "store") == digests(finished)


def test_a_store_that_is_mounted_read_only_can_be_looked_at_and_says_why_no_run_is_possible(
    finished, small_disk, micro_model, tones
):
    folder, remount = small_disk
    remount("size=64m")
    shutil.copytree(finished, folder / "store")
    remount()
    config = quick_config(folder / "store", micro_model, tones)
    assert Run(config).plan(deep=True).finished
    with pytest.raises(StoreError, match="read-only") as told:
        run_pipeline(config)
    assert told.value.exit_code == 74


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_a_base_model_that_is_only_a_pickle_is_refused(tmp_path, micro_model, tones):
    model = shutil.copytree(micro_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"contains no \*\.safetensors"):
        run_pipeline(quick_config(tmp_path / "store", model, tones))


def test_a_table_that_hides_a_pickle_is_refused(tmp_path):
    (tmp_path / "ids.json").write_text('["a"]')
    np.save(tmp_path / "embeddings.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"embeddings"):
        read_tables([tmp_path])


def test_a_checkpoint_that_is_replaced_by_a_pickle_costs_a_warning_and_a_fresh_start(
    finished, again, tmp_path, micro_model, tones
):
    for manifest in (again / "artifacts" / "gating").glob("*/manifest.json"):
        shutil.rmtree(manifest.parent)
    config = often_saved(again, micro_model, tones)
    task = next(p.task for p in Run(config).plan().planned if p.task.contract.name == "gating")
    folder = again / task.key.prefix / "checkpoints" / "000000001-0000000000000000abcd"
    folder.mkdir(parents=True)
    bomb = pickle.dumps(Bomb())
    for name in ("state.safetensors", "state.json"):
        (folder / name).write_bytes(bomb)
    from common.files import file_hash

    files = {path.name: {"size": len(bomb), "sha256": file_hash(path)} for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "step": 1, "files": files}))
    run_pipeline(config)
    assert digests(again) == digests(finished)


def test_two_signals_at_once_are_one_wish_and_later_ones_end_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("common.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("common.signals.signal.alarm", lambda seconds: 0)
    flag = StopFlag()
    flag.handle(signal.SIGTERM, None)
    now[0] += 1
    flag.handle(signal.SIGTERM, None)  # as SLURM and systemd tell all processes, and the parent its children
    assert flag()
    with pytest.raises(KeyboardInterrupt):
        flag.handle(signal.SIGINT, None)
    with pytest.raises(Preempted):
        flag.handle(signal.SIGALRM, None)
    now[0] += 10
    with pytest.raises(Preempted):
        flag.handle(signal.SIGTERM, None)
