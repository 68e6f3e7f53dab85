"""Runs tasks of a stage in separate processes, in parallel on several GPUs, and stops them together."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common.config import Config, to_yaml
from common.errors import EXIT_PREEMPTED, Preempted, RetryableError, StageFailed
from common.pipeline.plan import Planned


def parallel_slots(config: Config) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each process that may train at once; empty strings on CPU."""
    import torch

    device = config.runtime.device
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the user's choice: its names, not their places in it
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(gpus)]
    if device.startswith("cuda:"):  # counts among all that are visible
        return [",".join(names)] * (config.runtime.parallel_experts or 1)
    wanted = config.runtime.parallel_experts or max(1, gpus)
    return [names[i % gpus] if gpus else "" for i in range(wanted)]


def run_in_processes(
    config: Config,
    planned: Sequence[Planned],
    slots: Sequence[str | None],
    *,
    scratch: Path,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Runs tasks of a stage in parallel, one process each, at most one per slot.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each process; None does not change it.
        scratch: folder in which the configuration is passed to the processes.
        stopping: once true, running processes are stopped with a checkpoint, and no more are started.

    Raises:
        RetryableError: a task failed with a temporary fault or was killed; the others are finished first.
        StageFailed: the first task that failed otherwise; the others are finished first.
        Preempted: `stopping` became true.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # torch keeps freed memory, which the other processes need
    # The processes are configured by their options, not by a pod's variables.
    own = {name: value for name, value in os.environ.items() if name not in ("MOE_ASR_STORE", "MOE_ASR_WORKFLOW")}
    free = list(enumerate(slots))
    port = config.runtime.metrics_port
    file = scratch / f"{config.run}-{os.getpid()}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_yaml(config), encoding="utf-8")
    at_once = threading.Event()  # a second signal: no more checkpoints

    def run_task(planned: Planned) -> int:
        if stopping():
            return EXIT_PREEMPTED
        number, device = free.pop()
        try:
            command = [sys.executable, "-m", "stages", planned.task.contract.name, "--config", str(file)]
            command += [] if planned.task.shard is None else ["--shard", str(planned.task.shard)]
            if port:  # this process keeps the first; each slot has its own
                command += ["--metrics-port", str(port + 1 + number)]
            visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
            return _run_until(command, own | visible, stopping, at_once)
        finally:
            free.append((number, device))

    # A Ctrl-C at the terminal would reach processes beside our SIGTERM, and a second signal ends a stage at once: what
    # these threads start inherits their mask. It stays in our process group, to be killed or hung up with us.
    alone = partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with ThreadPoolExecutor(len(slots), initializer=alone) as pool:
            try:
                codes = list(pool.map(run_task, planned))
            except BaseException:
                at_once.set()
                raise
    finally:
        file.unlink(missing_ok=True)
    for planned_one, code in zip(planned, codes, strict=True):
        if code and not (stopping() and code in (EXIT_PREEMPTED, -signal.SIGTERM)):
            if code < 0:
                raise killed(planned_one.task.label, -code)
            message = f"{planned_one.task.label} ended with exit code {code}; its own message is above"
            raise RetryableError(message) if code == RetryableError.exit_code else StageFailed(message, code)
    if any(codes):
        raise Preempted("stopped by a signal; what was under way had time for a checkpoint")


def killed(who: str, number: int) -> RetryableError:
    """The error for a process that a signal ended."""
    name = signal.Signals(number).name
    return RetryableError(f"{who} was killed by {name}: run it again to continue from its checkpoint")


def _run_until(
    command: Sequence[str], environment: Mapping[str, str], stopping: Callable[[], bool], at_once: threading.Event
) -> int:
    """Runs a command to its end and returns its exit code; tells it to stop by SIGTERM, and at once by SIGALRM."""
    sent = 0
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                wanted = 2 if at_once.is_set() else int(stopping())
                if wanted > sent:
                    process.send_signal(signal.SIGALRM if wanted == 2 else signal.SIGTERM)
                    sent = wanted
