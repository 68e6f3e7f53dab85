"""Handling of SIGTERM and Ctrl-C: a stage writes a checkpoint and ends, and its loader processes end with it.

`handle_signals` is for the training process; `stop_with` and `signals_held` are for the loader processes that it
starts. SIGALRM ends the process at once, without another checkpoint.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

from common.errors import Preempted

STOPS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 5  # in which SIGTERM may come twice
STOPPED = "stopped by a signal; run the same command again to continue from what was saved last"
GRACE_SECONDS = 25  # from SIGTERM to giving up; Kubernetes kills after 30 by default, our workflow after 60


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C; training checkpoints and ends. The second one ends at once.

    A second SIGTERM within seconds counts as the same signal: SLURM, systemd and the parent process signal all
    processes.
    """

    def __init__(self) -> None:
        self.since: float | None = None  # when it was set

    def __call__(self) -> bool:
        return self.since is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.since is not None and number == signal.SIGTERM and time.monotonic() - self.since < ECHO_SECONDS:
            return
        if self.since is not None or number == signal.SIGALRM:
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted(STOPPED)
        self.since = time.monotonic()
        signal.alarm(GRACE_SECONDS)


@contextmanager
def handle_signals() -> Iterator[StopFlag]:
    """Turns SIGTERM and SIGINT into a flag while the block runs (in the main thread; elsewhere only the flag)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.signal(number, flag.handle) for number in numbers}
    try:
        yield flag
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with(owner: int) -> None:
    """Ends this process only on a SIGTERM from its owner, which a separate thread waits for.

    Stopping a job often signals all its processes, but the training needs its loader until the checkpoint.

    Args:
        owner: process id.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # as inherited; in the thread too
    threading.Thread(target=_wait_for, args=(owner,), daemon=True).start()


def _wait_for(owner: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != owner:
        pass
    os._exit(0)


@contextmanager
def signals_held() -> Iterator[None]:
    """Blocks the stop signals while the block runs, also in the processes that are started."""
    resource_tracker.ensure_running()  # multiprocessing's own; when it starts, it lets the signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
