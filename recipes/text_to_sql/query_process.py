"""A process that runs untrusted queries: `recipes.text_to_sql.sql` starts it, and kills it after the time limit.

    python -I -S query_process.py DATABASE '{"rows": …, "bytes": …, "heap": …}'

The first line that it prints says whether the database can be opened. Then each line of its input is a query, as a JSON
string, and each line of its output the query's rows as JSON, or {"error": …}. It ends when its input ends, even while a
query runs. It imports the standard library alone, so that it starts in some 20 ms.
"""

import json
import os
import resource
import signal
import sqlite3
import sys
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import quote

ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
# What depends on nothing but its arguments, reads nothing and makes nothing much larger than them.
_NAMES = (
    "abs avg ceil ceiling coalesce count cume_dist date datetime dense_rank first_value floor glob "
    "group_concat ifnull iif instr julianday lag last_value lead length like lower ltrim max min mod "
    "nth_value ntile nullif percent_rank pow power rank replace round row_number rtrim sign sqrt "
    "strftime substr substring sum time total trim trunc typeof unicode unixepoch upper "
)
FUNCTIONS = frozenset(_NAMES.split())
SIZES = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of a text or blob, also within a query
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
BESIDE_HEAP = 2**29  # bytes of address space for Python and its rows, in addition to SQLite's heap
OUT_OF_MEMORY = "out of memory"


def open_database(path: str, heap: int) -> sqlite3.Connection:
    """A connection that can only read, for queries that can only call FUNCTIONS.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, isolation_level=None)
    for setting in ("query_only = 1", "trusted_schema = 0", "temp_store = MEMORY", f"hard_heap_limit = {heap}"):
        connection.execute(f"PRAGMA {setting}")
    for limit, value in SIZES.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    connection.set_authorizer(authorize)
    return connection


def authorize(action: int, _: str | None, function: str | None, *rest: str | None) -> int:
    """SQLite's authorizer: reading, and functions by name."""
    allowed = action in ACTIONS or (action == sqlite3.SQLITE_FUNCTION and (function or "").lower() in FUNCTIONS)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def answer(connection: sqlite3.Connection, query: str, rows: int, size: int) -> Any:
    """The rows of a query, blobs as hex text, or {"error": …}; errors of the query are not raised.

    Args:
        rows, size: maximum number of rows and of bytes.
    """
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            return {"error": "not a query"}
        fetched: list[list[Any]] = []
        for row in cursor:
            cells = [cell.hex() if isinstance(cell, bytes) else cell for cell in row]
            size -= sum(len(cell) if isinstance(cell, str) else 8 for cell in cells)
            if size < 0:
                return {"error": "too many bytes"}
            if len(fetched) == rows:
                return {"error": "too many rows"}
            fetched.append(cells)
        return fetched
    except MemoryError:
        return {"error": OUT_OF_MEMORY}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        return {"error": str(error) or type(error).__name__}


def read_queries(into: SimpleQueue[str]) -> None:
    """Reads queries from the standard input; ends the process at its end, since no one waits for an answer then."""
    for line in sys.stdin.buffer:
        into.put(json.loads(line))
    os._exit(0)


def main() -> None:
    """Answers the queries of the standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    path, limits = sys.argv[1], json.loads(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits["heap"] + BESIDE_HEAP,) * 2)
    try:
        connection = open_database(path, limits["heap"])
        print("{}", flush=True)
    except sqlite3.Error as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    queries: SimpleQueue[str] = SimpleQueue()
    Thread(target=read_queries, args=[queries], daemon=True).start()
    while True:
        outcome = answer(connection, queries.get(), limits["rows"], limits["bytes"])
        sys.stdout.buffer.write(json.dumps(outcome, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
