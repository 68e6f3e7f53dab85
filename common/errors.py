"""Errors that a user can act on, each with the exit code of its process.

Exit codes follow BSD's sysexits where possible, so that a workflow engine can decide what to retry:
64, 65, 74 and 78 need a correction by the user and are never retried; 75 and 143 are retried.
"""

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 143


class MoeAsrError(Exception):
    """Base of all errors that end in a message on stderr instead of a traceback.

    Args:
        message: one line.
        details: further lines, such as one for each bad row of a table.
    """

    exit_code = EXIT_FAULT

    def __init__(self, message: str = "", details: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.lines = (message, *details)


class UsageError(MoeAsrError):
    """A command line that asks for something impossible (EX_USAGE)."""

    exit_code = 64


class DataError(MoeAsrError):
    """Input data that cannot be used: a corpus, an audio file, a checkpoint (EX_DATAERR)."""

    exit_code = 65


class StoreError(MoeAsrError):
    """A store that refuses for a reason that a retry cannot correct: rights, a missing bucket, a full disk."""

    exit_code = 74


class RetryableError(MoeAsrError):
    """A fault outside the program that may pass: a store that does not answer, a lost peer or GPU (EX_TEMPFAIL)."""

    exit_code = 75


class ConfigError(MoeAsrError):
    """A configuration that does not validate, or asks for more than the GPU's memory (EX_CONFIG)."""

    exit_code = 78


class StageFailed(MoeAsrError):  # noqa: N818 - as the user reads it
    """A stage in a process of its own that failed; its exit code becomes ours."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Preempted(MoeAsrError):  # noqa: N818 - what happened, not what is wrong
    """The process was told to end (SIGTERM, or Ctrl-C in a stage); what is finished is saved."""

    exit_code = EXIT_PREEMPTED
