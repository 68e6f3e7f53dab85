"""Runs queries that nobody has vetted: read-only, in threads, each with its own deadline and a limit on its result.

A query is one SELECT. Whatever else it tries (a write, ATTACH, a PRAGMA, two statements), however long, large or
broken it is: the outcome is an error of that query, and nothing else notices.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from common.errors import DataError
from common.files import new_file

Cell = str | int | float | None
Row = tuple[Cell, ...]

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
STEPS_PER_CHECK = 50_000  # of SQLite's virtual machine, some milliseconds: how often a deadline is looked at
CELL_BYTES = 1_000_000  # longest string or blob, also of intermediate results that no deadline can interrupt
HEAP_BYTES = 2**30  # of all running queries together: sorting a cross join would take all memory (or the disk)
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may take: seconds from its start, rows and bytes of its result."""

    seconds: float = 60.0
    rows: int = 50_000
    bytes: int = 10_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """A query's rows, or why it has none. Blobs are given as hex text."""

    rows: tuple[Row, ...] = ()
    error: str = ""


def run_query(database: Path, query: str, limits: Limits, abandoned: threading.Event) -> Outcome:
    """Runs one query on a connection of its own; never raises for what the query does."""
    deadline = time.monotonic() + limits.seconds
    connection = _open(database)
    try:
        connection.set_progress_handler(lambda: time.monotonic() > deadline or abandoned.is_set(), STEPS_PER_CHECK)
        cursor = connection.execute(query)
        if cursor.description is None:
            return Outcome(error="not a query")
        return _collect(cursor, limits)
    except MemoryError:
        return Outcome(error=OUT_OF_MEMORY)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        late = time.monotonic() > deadline
        return Outcome(error=f"stopped after {limits.seconds:g} s" if late else str(error))
    finally:
        connection.close()


def _collect(cursor: sqlite3.Cursor, limits: Limits) -> Outcome:
    rows: list[Row] = []
    size = 0
    for row in cursor:
        cells = tuple(cell.hex() if isinstance(cell, bytes) else cell for cell in row)
        size += sum(len(cell) if isinstance(cell, str) else 8 for cell in cells)
        if len(rows) == limits.rows or size > limits.bytes:
            return Outcome(error=f"over {limits.rows} rows" if size <= limits.bytes else f"over {limits.bytes} bytes")
        rows.append(cells)
    return Outcome(tuple(rows))


def _open(database: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, isolation_level=None)
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA hard_heap_limit = {HEAP_BYTES}")
    except sqlite3.Error as error:
        raise DataError(f"database {database}: {error}") from None
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, CELL_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)
    return connection


def run_queries(
    database: Path,
    queries: Iterable[str],
    *,
    threads: int,
    limits: Limits,
    known: Mapping[str, Outcome] | None = None,
    abandoned: threading.Event | None = None,
) -> dict[str, Outcome]:
    """Runs each distinct query once, in threads.

    Args:
        known: outcomes of an earlier time that are taken over.
        abandoned: ends all queries at once when it is set; their outcomes are then of no use.

    Returns:
        query → outcome; the same whatever the number of threads.

    Raises:
        DataError: the database cannot be opened.
    """
    wanted = dict.fromkeys(queries)
    found = {query: known[query] for query in wanted if known and query in known}
    new = [query for query in wanted if query not in found]
    abandoned = abandoned or threading.Event()
    run = partial(run_query, database, limits=limits, abandoned=abandoned)
    with ThreadPoolExecutor(max(1, min(threads, len(new)))) as pool:
        try:
            found |= zip(new, pool.map(run, new), strict=True)
        except BaseException:
            abandoned.set()
            raise
    # The heap is shared: one query's greed may have failed another. Alone, each answers for itself.
    return found | {query: run(query) for query in new if found[query].error == OUT_OF_MEMORY}


def gold_outcomes(
    database: Path, queries: Sequence[str], *, threads: int, limits: Limits, cache: Path
) -> dict[str, Outcome]:
    """Outcomes of gold queries, computed once for a database and kept in the folder `cache` by digest."""
    wanted = list(dict.fromkeys(queries))
    with database.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps([asdict(limits), wanted]).encode())
    path = cache / f"{digest.hexdigest()}.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            return {
                query: Outcome(tuple(map(tuple, json.loads(line)))) for query, line in zip(wanted, lines, strict=True)
            }
    outcomes = run_queries(database, wanted, threads=threads, limits=limits)
    if not any(outcome.error for outcome in outcomes.values()):  # a slow moment must not last
        write_records(path, [outcomes[query] for query in wanted])
    return outcomes


def write_records(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes one line for each query: its rows as JSON, or {"error": …}."""
    write_lines(
        path, (json.dumps({"error": one.error} if one.error else one.rows, ensure_ascii=False) for one in outcomes)
    )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, whole or not at all."""
    with new_file(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
