"""Runs untrusted queries: read-only, in separate processes, each with a deadline and limits.

A query is one SELECT. Anything else (a write, ATTACH, a PRAGMA, two statements) and queries that are too long, too
large or malformed are an error of that query only, without effect on others.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from common.errors import DataError, Preempted, RetryableError
from common.files import new_file

Cell = str | int | float | None
ResultRow = tuple[Cell, ...]

PROGRAM = Path(__file__).with_name("query_process.py")
HEAP_BYTES = 2**28  # of SQLite's memory for each running query: sorting a cross join would take all (or the disk)
START_SECONDS = 60.0  # maximum until a process answers: 0.02 on an idle machine
CHECK_SECONDS = 0.25  # interval at which a waiting thread checks for a stop


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one query: seconds from its start, rows and bytes of its result."""

    seconds: float = 60.0
    rows: int = 50_000
    bytes: int = 10_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """A query's rows, or its error. Blobs are given as hex text."""

    rows: tuple[ResultRow, ...] = ()
    error: str = ""


class QueryProcess:
    """Runs queries in a separate process, one after another. A late query ends the process; the next query starts a new
    one.

    A query cannot be interrupted otherwise: a single step of SQLite (`instr` on long texts) can take minutes.
    """

    def __init__(self, database: Path, limits: Limits, stopping: Callable[[], bool]) -> None:
        """
        Args:
            stopping: asked while waiting; true ends a running query.
        """
        self.database, self.limits, self.stopping = database, limits, stopping
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, query: str) -> Outcome:
        """The outcome of a query.

        Raises:
            DataError: the database cannot be opened.
            RetryableError: no process can be started.
            Preempted: `stopping` became true.
        """
        process = self._process or self._start()
        deadline = time.monotonic() + self.limits.seconds
        try:
            assert process.stdin
            with suppress(BrokenPipeError):  # it has ended, which reading reports
                process.stdin.write(json.dumps(query).encode() + b"\n")
                process.stdin.flush()
            line = self._read_line(process, deadline)
            outcome = json.loads(line)
        except TimeoutError:
            self.kill()
            return Outcome(error=f"stopped after {self.limits.seconds:g} s")
        except EOFError:
            code = self.kill()
            return Outcome(error=f"it ended its process (exit code {code})")
        return self._outcome(outcome)

    def kill(self) -> int | None:
        """Kills the process and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with suppress(BrokenPipeError):  # what it did not read
            process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        limits = {"rows": self.limits.rows, "bytes": self.limits.bytes, "heap": HEAP_BYTES}
        command = [sys.executable, "-I", "-S", str(PROGRAM), str(self.database), json.dumps(limits)]
        try:
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            said = json.loads(self._read_line(process, time.monotonic() + START_SECONDS))
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.kill()
            raise RetryableError(f"a process for queries does not start: {error or type(error).__name__}") from None
        if problem := said.get("error"):
            self.kill()
            raise DataError(f"database {self.database}: {problem}")
        return process

    def _read_line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """A line from the process. Raises TimeoutError, EOFError, or Preempted if `stopping` is true."""
        assert process.stdout
        waiting, pieces = select.poll(), [b""]
        waiting.register(process.stdout, select.POLLIN)
        while not pieces[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if waiting.poll(1000 * min(left, CHECK_SECONDS)):
                pieces.append(os.read(process.stdout.fileno(), 2**20))
                if not pieces[-1]:
                    raise EOFError("it ended")
            elif self.stopping():
                raise Preempted("stopped by a signal while queries ran; what the training last saved is kept")
        return b"".join(pieces)

    def _outcome(self, outcome: Any) -> Outcome:
        if isinstance(outcome, list):
            return Outcome(tuple(map(tuple, outcome)))
        error, limits = str(outcome["error"]), self.limits
        over = {"too many rows": f"over {limits.rows} rows", "too many bytes": f"over {limits.bytes} bytes"}
        return Outcome(error=over.get(error, error))


def run_queries(
    database: Path,
    queries: Iterable[str],
    *,
    threads: int,
    limits: Limits,
    known: Mapping[str, Outcome] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Outcome]:
    """Runs each distinct query once, several at a time.

    Args:
        threads: number of queries at a time.
        known: earlier outcomes that are reused.
        stopping: true ends all queries at once.

    Returns:
        query → outcome; the same whatever the number of threads.

    Raises:
        DataError: the database cannot be opened.
        RetryableError: no process can be started.
        Preempted: `stopping` became true.
    """
    wanted = dict.fromkeys(queries)
    outcomes = {query: known[query] for query in wanted if known and query in known}
    new: SimpleQueue[str] = SimpleQueue()
    for query in (query for query in wanted if query not in outcomes):
        new.put(query)
    failed = threading.Event()

    def work() -> None:
        process = QueryProcess(database, limits, lambda: failed.is_set() or stopping())
        try:
            with suppress(Empty):
                while not failed.is_set():
                    query = new.get_nowait()
                    outcomes[query] = process.ask(query)
        finally:
            process.kill()

    with ThreadPoolExecutor(max(1, min(threads, new.qsize()))) as pool:
        tasks = [pool.submit(work) for _ in range(min(threads, new.qsize()))]
        try:
            for task in tasks:
                task.result()
        except BaseException:  # Ctrl-C too
            failed.set()
            raise
    return {query: outcomes[query] for query in wanted}


def write_records(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes one line for each query: its rows as JSON, or {"error": …}."""
    write_lines(
        path,
        (
            json.dumps({"error": outcome.error} if outcome.error else outcome.rows, ensure_ascii=False)
            for outcome in outcomes
        ),
    )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, whole or not at all."""
    with new_file(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
