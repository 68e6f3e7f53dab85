"""One stage on several GPUs of a machine: a process for each, by torch's elastic launcher, with our exit codes."""

import logging
import signal
import sys
from collections.abc import Mapping, Sequence

from common.errors import MoeAsrError, Preempted, StageFailed
from common.signals import GRACE_SECONDS
from stages.processes import killed


def launch(arguments: Sequence[str], processes: int) -> None:
    """Runs `python -m stages <arguments>` in several processes that train together.

    This equals `torchrun --standalone --nproc-per-node N -m stages …` except for the exit code: torchrun ends with 1
    for every failure, so that a workflow could not distinguish a lost process from a user's error.

    Args:
        arguments: the stage and its options.
        processes: number of processes, one per GPU; any number on a CPU.

    Raises:
        RetryableError: a process was killed or lost its peers; checkpoints are kept.
        Preempted: the processes received a signal to stop and wrote a checkpoint.
        StageFailed: a process failed; the exit code is that of the first, whose message was already printed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # a run continues from its checkpoint when it is run again
        monitor_interval=0.2,
        shutdown_timeout=GRACE_SECONDS + 3,  # each ends by itself before
        signals_to_handle="SIGTERM,SIGINT,SIGALRM",  # each is passed on; the last means at once
    )
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its tables of tracebacks bury the message that matters
    try:
        elastic_launch(settings, sys.executable)("-m", "stages", *arguments)
    except ChildFailedError as failed:
        raise _explain({rank: failure.exitcode for rank, failure in failed.failures.items()}) from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise Preempted("stopped by a signal; the processes had time for a checkpoint") from None


def _explain(codes: Mapping[int, int]) -> MoeAsrError:
    """The error that corresponds to the exit codes of all processes.

    If a process dies, its peers fail too, in random order: a signal is the most specific cause, followed by a user's
    error, which occurs in all processes.
    """
    signals = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if signals:
        rank, number = min(signals.items())
        return killed(f"process {rank}", number)
    known = [code for code in codes.values() if code in (64, 65, 74, 78)]
    if not known and 143 in codes.values():
        return Preempted("stopped by a signal; the processes had time for a checkpoint")
    code = min(known, default=max(codes.values()))
    return StageFailed(f"a process ended with exit code {code}; its own message is above", code)
