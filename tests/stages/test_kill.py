"""A run that is killed between any two writes leaves every artifact absent or whole, and goes on to the same end."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import common.files
import common.storage.local
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import digests, micro_config

RESUMED = 6  # of the states that a kill can leave, this many are run to the end


def quick_config(store, model, corpus):
    """The micro run with as little training as shows every kind of write."""
    subsets = {"embeddings_percent": 100, "experts_percent": 30, "asr_percent": 50, "dev_samples": 6, "test_samples": 6}
    return micro_config(store, model, corpus, subsets=subsets, asr__epochs=1, asr__select_samples=2, gating__epochs=1)


def run_and_die(config, folder, at):
    """Runs the command in a process that kills itself at its n-th lasting effect."""
    (folder / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "cli.main", "run", "--config", "c.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), "PYTHONWARNINGS": "ignore"}
    killed = subprocess.run(
        command, cwd=folder, env=environment | {"MOE_ASR_DIE_AT_STORE_OP": str(at)}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.fixture(scope="module")
def states(tmp_path_factory, micro_model, tones):
    """Copies of the store at every write boundary of a run, the last one finished."""
    folder = tmp_path_factory.mktemp("states")
    store = folder / "store"
    store.mkdir()
    seen = []

    def remember():
        shutil.copytree(store, folder / f"{len(seen):04d}", symlinks=True)
        seen.append(folder / f"{len(seen):04d}")

    with pytest.MonkeyPatch.context() as patch:
        for module in (common.files, common.storage.local):
            patch.setattr(module, "moment", remember)
        run_pipeline(quick_config(store, micro_model, tones))
    remember()
    return seen


def test_after_a_kill_at_any_write_every_artifact_is_absent_or_whole(states):
    assert len(states) > 50
    for state in states:
        for folder in state.glob("artifacts/*/*"):
            artifact = inspect(open_store(state), Key(folder.parent.name, folder.name), deep=True)
            assert artifact.status in ("missing", "done"), (state, folder, artifact.reason)


@pytest.mark.parametrize("part", range(RESUMED))
def test_a_run_goes_on_from_any_state_to_the_same_weights_and_scores(states, part, tmp_path, micro_model, tones):
    state = states[(len(states) - 1) * (2 * part + 1) // (2 * RESUMED)]
    store = tmp_path / "store"
    shutil.copytree(state, store, symlinks=True)
    run_pipeline(quick_config(store, micro_model, tones))
    assert digests(store) == digests(states[-1])


@pytest.mark.parametrize("at", [9, 60])
def test_kill_9_in_the_middle_and_the_same_command_again(states, at, tmp_path, micro_model, tones):
    config = quick_config(tmp_path / "store", micro_model, tones)
    run_and_die(config, tmp_path, at)
    run_pipeline(config)
    assert digests(tmp_path / "store") == digests(states[-1])
