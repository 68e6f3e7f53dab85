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
from stages.pipeline import Run, read_record
from tests.stages.test_pipeline import micro_config

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def config_file(folder: Path, model, corpus, **changes) -> tuple[Path, Run]:
    """A regular mixture (random gate and experts): extract and asr alone."""
    config = micro_config(
        folder / "store", model, corpus, asr__pretrained=False, subsets__embeddings_percent=100, **changes
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder / "config.yaml", Run(config)


def start(stage: str, file: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages", stage, "--config", str(file), *options],
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
    one = run.plan().planned[-1]
    assert one.task.contract.name == "asr"
    assert one.status == "done", one.reason
    return run.store.local_path(f"{one.task.key.prefix}{one.manifest.attempt}")


def curve(folder: Path) -> list[float]:
    """All losses in turn, and of the training's rows the cross-entropies too."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "ce") if name in row]


def test_two_processes_learn_as_one_with_the_same_global_batch(tmp_path, micro_model, tones):
    """Two batches per step, by accumulation or by two processes; the store holds one writer's files alone."""
    curves = {}
    for processes, accumulate in ((1, 2), (2, 1)):
        file, run = config_file(
            tmp_path / str(processes), micro_model, tones, asr__gradient_accumulation_steps=accumulate, asr__epochs=1
        )
        assert ran("extract", file)[0] == 0
        code, said = ran("asr", file, "--processes", str(processes))
        assert code == 0, said
        folder = finished(run)
        curves[processes] = curve(folder)
        attempts = [path for path in folder.parent.iterdir() if path.is_dir() and path.name != "checkpoints"]
        assert attempts == [folder]
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    assert len(curves[1]) > 4


def test_a_killed_process_ends_the_job_with_a_code_to_retry_and_running_again_goes_on(tmp_path, micro_model, tones):
    file, run = config_file(
        tmp_path, micro_model, tones, asr__epochs=40, runtime__checkpoint_minutes=0.001, asr__patience=40
    )
    assert ran("extract", file)[0] == 0
    process = start("asr", file, "--processes", "2")
    prefix = next(p.task.key.prefix for p in run.plan().planned if p.task.contract.name == "asr")
    checkpoints = run.store.local_path(f"{prefix}checkpoints")
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("*/manifest.json"))):
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == 75, said
    assert "killed by SIGKILL" in said
    assert any(checkpoints.glob("*/manifest.json"))
    assert read_record(run.store, "micro") is None  # the stage alone keeps no run's record
    assert [p.status for p in run.plan().planned] == ["done", "todo"]


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
