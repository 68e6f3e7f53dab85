"""Two processes that train together: the curve of one process, one writer, exit codes that say what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config import to_yaml
from common.errors import Preempted, RetryableError
from stages.launch import _explain
from stages.local_runner import Run, read_record, run_one
from tests.stages.test_local_runner import micro_config

TWO_BATCHES = {"asr__gradient_accumulation_steps": 2}
TRAINING = TWO_BATCHES | {"asr__epochs": 5, "asr__patience": 5}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def config_file(folder: Path, model, corpus, **changes) -> tuple[Path, Run]:
    """A regular mixture (random gate and experts), and its extraction done: asr alone is left."""
    config = micro_config(
        folder / "store", model, corpus, asr__pretrain="none", subsets__embeddings_percent=100, **changes
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    run = Run(config)
    run_one(run, run.plan().planned[0], lambda: False)
    return folder / "config.yaml", run


def start(stage: str, file: Path, *options: str) -> subprocess.Popen:
    """A stage alone, or the whole `run`."""
    program = ["cli.main", "run"] if stage == "run" else ["stages", stage]
    return subprocess.Popen(
        [sys.executable, "-m", *program, "--config", str(file), *options],
        env=ENVIRONMENT | {"MOE_ASR_CACHE": str(file.parent / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )


def ran(stage: str, file: Path, *options: str) -> tuple[int, str]:
    process = start(stage, file, *options)
    said = process.communicate()[1]
    return process.returncode, said


def finished(run: Run) -> Path:
    """The folder of the asr stage's committed output."""
    planned = run.plan().planned[-1]
    assert planned.task.contract.name == "asr"
    assert planned.status == "done", planned.reason
    return run.store.local_path(f"{planned.task.key.prefix}{planned.manifest.attempt}")


def curve(folder: Path) -> list[float]:
    """All losses in turn, and of the training's rows the cross-entropies too."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "ce") if name in row]


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory, micro_model, tones):
    """The curve of a training that nobody stopped."""
    _, run = config_file(tmp_path_factory.mktemp("one"), micro_model, tones, **TRAINING)
    run_one(run, run.plan().planned[-1], lambda: False)
    points = curve(finished(run))
    assert len(points) > 10
    return points


def test_two_processes_learn_as_one_whoever_starts_them(tmp_path, micro_model, tones, by_one_process):
    """They share a step's batches; the store holds one writer's files alone."""
    for name in ("asr", "run"):
        file, run = config_file(tmp_path / name, micro_model, tones, **TRAINING)
        code, said = ran(name, file, "--processes", "2")
        assert code == 0, said
        folder = finished(run)
        assert curve(folder) == pytest.approx(by_one_process, rel=1e-3)  # Adam magnifies sums in another order
        attempts = [path for path in folder.parent.iterdir() if path.is_dir() and path.name != "checkpoints"]
        assert attempts == [folder]
    assert read_record(run.store, "micro")["status"] == "done"


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_training_that_was_stopped_goes_on_with_another_number_of_processes(
    tmp_path, micro_model, tones, before, after, by_one_process
):
    file, run = config_file(tmp_path, micro_model, tones, **TRAINING)
    process = start("asr", file, "--processes", str(before), "--set", "runtime.checkpoint_minutes=0.0001")
    wait_for_checkpoint(process, checkpoints_of(run))
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 143, said
    code, said = ran("asr", file, "--processes", str(after))
    assert code == 0, said
    assert curve(finished(run)) == pytest.approx(by_one_process, rel=1e-3)


@pytest.mark.parametrize("given", [("--processes", "3"), ("--processes", "2", "--device", "cuda:0")])
def test_processes_that_cannot_share_a_step_are_refused_at_once(tmp_path, micro_model, tones, given):
    file, _ = config_file(tmp_path, micro_model, tones, **TWO_BATCHES)
    code, said = ran("asr", file, *given)
    assert code == 78
    assert f"{given[1]} processes" in said


def test_a_killed_process_ends_the_job_with_a_code_to_retry_and_running_again_goes_on(tmp_path, micro_model, tones):
    file, run = config_file(
        tmp_path, micro_model, tones, **TWO_BATCHES, asr__epochs=40, runtime__checkpoint_minutes=0.001, asr__patience=40
    )
    process = start("asr", file, "--processes", "2")
    checkpoints = checkpoints_of(run)
    wait_for_checkpoint(process, checkpoints)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert "killed by SIGKILL" in said
    assert any(checkpoints.glob("*/manifest.json"))
    assert read_record(run.store, "micro") is None  # the stage alone keeps no run's record
    assert [p.status for p in run.plan().planned] == ["done", "todo"]


def checkpoints_of(run: Run) -> Path:
    """Where the asr stage keeps its checkpoints."""
    prefix = next(p.task.key.prefix for p in run.plan().planned if p.task.contract.name == "asr")
    return run.store.local_path(f"{prefix}checkpoints")


def wait_for_checkpoint(process: subprocess.Popen, checkpoints: Path) -> None:
    """Until a checkpoint is whole, or the process has ended."""
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("*/manifest.json"))):
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The training processes below the launcher, in the order in which they were started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(int(line.split()[0]) for line in listed.splitlines() if "-m stages asr" in line)


@pytest.mark.parametrize(
    ("codes", "kind", "code"),
    [
        ({0: 70, 1: -9}, RetryableError, 75),  # whose peer was killed fails too
        ({0: 65, 1: 65}, None, 65),
        ({0: 70, 1: 65}, None, 65),
        ({0: 143, 1: 143}, Preempted, 143),
        ({0: 75}, None, 75),
    ],
)
def test_the_processes_exit_codes_become_one(codes, kind, code):
    error = _explain(codes)
    assert error.exit_code == code
    assert kind is None or isinstance(error, kind)
