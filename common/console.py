"""Shared by all commands: logging, one-line errors, exit codes."""

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from common.errors import EXIT_FAULT, EXIT_INTERRUPTED, ConfigError, MoeAsrError, RetryableError, StoreError, UsageError
from common.escape import escaped

LOST = {"AcceleratorError", "DistBackendError", "DistNetworkError"}  # torch's, when hardware or a peer fails


def set_up_logging(log_file: str | None = None, *, quiet: bool = False) -> None:
    """Sends log lines to stderr and, if `log_file` is given, to this file."""
    handlers: list[logging.Handler] = [_Stderr()]
    if log_file:
        try:
            handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise StoreError(f"--log-file {log_file}: {error.strerror}") from None
    for handler in handlers:
        handler.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    for noisy in ("numba", "matplotlib", "httpx", "urllib3", "botocore", "boto3", "s3transfer", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class LineFormatter(logging.Formatter):
    """Formats each message as one line, whatever text it quotes, so that untrusted text cannot forge log lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = escaped(record.message, one_line=True)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return escaped(super().formatException(ei))


class _Stderr(logging.Handler):
    """Writes around a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = self.format(record)
        if record.levelno >= logging.WARNING and sys.stderr.isatty():
            line = _styled(line, "red" if record.levelno >= logging.ERROR else "yellow")
        tqdm.write(line, file=sys.stderr)


class Coloured(str):
    """Escaped text with terminal colour codes around it."""

    __slots__ = ()


def coloured(text: str, colour: str) -> Coloured:
    """The text in a terminal colour, for `echo`, which removes the colour if the output is not a terminal.

    The text is plain if $NO_COLOR is set (no-color.org) or the terminal does not support colours.
    """
    return Coloured(_styled(escaped(text, one_line=True), colour))


def _styled(text: str, colour: str) -> str:
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, fg=colour)


def echo(*parts: object, err: bool = False, nl: bool = True) -> None:
    """Prints the parts one after the other, escaped, because the output of commands contains text from corpora, stores
    and models.
    """
    shown = (part if isinstance(part, Coloured) else escaped(str(part)) for part in parts)
    click.echo("".join(shown), err=err, nl=nl)


def run_command(command: click.Command) -> None:
    """Runs a click command and ends the process with the exit code of the result."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no UTF-8, a terminal's encoding may be ASCII
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.lastResort = _Stderr(logging.WARNING)  # of commands that set up no logging
    logging.lastResort.setFormatter(LineFormatter("%(levelname)s: %(message)s"))
    try:
        code = command(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        echo(shown.getvalue(), err=True, nl=False)
        sys.exit(64)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except MoeAsrError as error:
        _fail(error.exit_code, *error.lines)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(UsageError.exit_code, f"{error.filename}: {error.strerror}: check the path")
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT):
            _crash()
        place = error.filename or "a file"
        _fail(StoreError.exit_code, f"{place}: {error.strerror}; free space or correct the rights, then run it again")
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: torch is not imported for this
        if "OutOfMemoryError" in kinds:
            _fail(ConfigError.exit_code, f"{error}; set smaller batches (docs/memory.md)")
        if kinds & LOST and "assert" not in str(error):  # an assertion on the device is our fault
            echo(traceback.format_exc(), err=True, nl=False)
            _fail(
                RetryableError.exit_code,
                "a GPU or the connection to another process failed (traceback above): run the command again",
            )
        _crash()


def _crash() -> NoReturn:
    """Reports an error of the program itself: prints the traceback and returns a separate exit code, which clusters do
    not retry.
    """
    echo(traceback.format_exc(), err=True, nl=False)
    sys.exit(EXIT_FAULT)


def _fail(code: int, *lines: str) -> NoReturn:
    message, *details = (escaped(line, one_line=True) for line in lines)
    _tell_cluster("\n  ".join([message, *details]))
    if logging.getLogger().handlers:
        for line in (f"error: {message}", *details):
            logging.getLogger("moe-asr").error("%s", line)
    else:
        echo(coloured("error:", "red"), "\n  ".join([f" {message}", *details]), err=True)
    sys.exit(code)


def _tell_cluster(message: str) -> None:
    """In a pod, writes the reason to the termination message, which Kubernetes and Argo show for the container."""
    path = Path(os.environ.get("MOE_ASR_TERMINATION_LOG") or os.devnull)
    with contextlib.suppress(OSError):
        path.write_bytes(message.encode()[:4000])
