"""Queries made to run for ever, to read or write what is not theirs, or to take memory: each ends at its deadline."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import Preempted
from recipes.text_to_sql import sql
from recipes.text_to_sql.query_process import FUNCTIONS
from recipes.text_to_sql.sql import Limits, Outcome, run_queries

SECONDS = 0.4
TENS = "'aaaaaaaaaa'"
LONG = f"replace(replace(replace(replace({TENS},'a',{TENS}),'a',{TENS}),'a',{TENS}),'a',{TENS})"  # 100,000 letters
LONGER = f"({'||'.join([LONG] * 9)})"  # 900,000 letters
ONE_STEP = f"SELECT instr({LONGER}, {LONG} || {LONG} || {LONG} || 'b')"  # one opcode of many seconds
SLOW = [
    ONE_STEP,
    f"SELECT instr({LONGER}, {LONG} || 'b'), x FROM t",
    f"SELECT replace({LONGER}, {LONG} || {LONG} || 'b', 'c') FROM t",
    f"SELECT {LONGER} LIKE '%a%a%a%a%a%a%a%b'",
    f"SELECT {LONGER} GLOB '*a*a*a*a*a*a*a*b'",
    f"SELECT count(*) FROM t WHERE {LONGER} LIKE '%' || x || '%a%a%a%b'",
    f"SELECT trim({LONGER}, {LONG}) FROM t a, t b",
    "SELECT count(*) FROM t a, t b, t c, t d",
    "SELECT a.x FROM t a, t b, t c ORDER BY a.x * b.x",
    "SELECT count(DISTINCT a.x * b.x + c.x) FROM t a, t b, t c",
    "SELECT sum(a.x) OVER (ORDER BY b.x) FROM t a, t b, t c",
    "SELECT group_concat(a.y, b.y) FROM t a, t b",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION SELECT n + 1 FROM r) SELECT count(*) FROM r",
    "WITH RECURSIVE r(s) AS (SELECT 'a' UNION ALL SELECT s || s FROM r) SELECT length(s) FROM r",
    "SELECT * FROM " + ", ".join(f"t t{n}" for n in range(60)),
    "SELECT count(*) FROM " + " NATURAL JOIN ".join(f"t AS t{n}" for n in range(60)),
    "SELECT (SELECT count(*) FROM t a, t b, t c WHERE a.x = t.x) FROM t",
]
REFUSED = [
    "SELECT zeroblob(1000000)",
    "SELECT instr(zeroblob(1000000), randomblob(500000))",
    "SELECT hex(randomblob(1000000))",
    "SELECT printf('%.*c', 900000000, 'x')",
    "SELECT format('%1000000000d', 1)",
    "SELECT load_extension('/tmp/x.so')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('/tmp/x', 'x')",
    "SELECT edit('x')",
    "SELECT fts3_tokenizer('simple')",
    "SELECT sqlite_version()",
    "SELECT sqlite_compileoption_get(1)",
    "SELECT random() FROM t",
    "SELECT current_timestamp",
    "SELECT json_group_array(a.x) FROM t a, t b",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM t WHERE y MATCH 'x'",
    "SELECT * FROM t WHERE y REGEXP 'x'",
    "ATTACH '/etc/passwd' AS p",
    "DETACH main",
    "VACUUM INTO '/tmp/x.db'",
    "PRAGMA hard_heap_limit = 0",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA temp_store_directory = '/tmp'",
    "INSERT INTO t VALUES (1, 'a')",
    "UPDATE t SET x = 1",
    "DELETE FROM t RETURNING x",
    "CREATE TABLE u (x)",
    "CREATE TEMP TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END",
    "CREATE VIRTUAL TABLE v USING fts5(x)",
    "REINDEX",
    "ANALYZE",
    "BEGIN; DELETE FROM t",
    "SAVEPOINT s",
    "EXPLAIN SELECT zeroblob(1)",
    "SELECT 1; DROP TABLE t",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "SELECT " + "+".join("1" for _ in range(5000)),
    "SELECT " + ", ".join("x" for _ in range(5000)) + " FROM t",
    " UNION ALL ".join("SELECT x FROM t" for _ in range(600)),
    "SELECT '" + "a" * 2_000_000 + "'",
    "SELECT '\x00'",
    "SELECT '\ud800'",
    "SELECT x FROM t WHERE x = ?",
    "\x00",
    ";",
    "",
    "   ",
    "/*",
    "\ufeffSELEC",
    '"',
    '{"error": 1}',
    "\n\n",
]
HARMLESS = {
    "SELECT x FROM t WHERE x < 2": ((0,), (1,)),
    "SELECT count(*) FROM t": ((3000,),),
    "SELECT '\u2028', 9e999": (("\u2028", float("inf")),),
}


def test_each_query_ends_in_time_and_alone(table, tmp_path, monkeypatch, tally):
    monkeypatch.chdir(tmp_path)
    seconds, ask = {}, sql.QueryProcess.ask

    def timed(process, query):
        since = time.monotonic()
        outcome = ask(process, query)
        seconds[query] = time.monotonic() - since
        return outcome

    monkeypatch.setattr(sql.QueryProcess, "ask", timed)
    before = table.read_bytes()
    queries = [*SLOW, *HARMLESS, *REFUSED, *SLOW]
    outcomes = run_queries(table, queries, threads=4, limits=Limits(seconds=SECONDS))
    late = [query for query in outcomes if seconds[query] > SECONDS + 2]  # this machine may have other work
    answered = [query for query in REFUSED if not outcomes[query].error]
    assert not late and not answered
    assert {query: outcomes[query].rows for query in HARMLESS} == HARMLESS
    assert table.read_bytes() == before and not list(tmp_path.iterdir())
    tally(len(outcomes), len(late) + len(answered))


def test_functions_that_are_allowed_exist_here_or_are_refused_by_name(table):
    known = {name for (name,) in sqlite3.connect(":memory:").execute("SELECT name FROM pragma_function_list")}
    queries = {
        name: f"SELECT {name}(1, 2, 3, 4, 5, 6, 7, 8, 9)"
        for name in known - FUNCTIONS
        if not name.startswith(("current_", "-"))
    }
    outcomes = run_queries(table, queries.values(), threads=2, limits=Limits(seconds=5))
    assert len(queries) > 20
    for name, query in queries.items():
        assert "not authorized" in outcomes[query].error or "wrong number of arg" in outcomes[query].error, name


def test_a_training_that_is_told_to_stop_does_not_wait_for_its_queries(table):
    since = time.monotonic()
    with pytest.raises(Preempted):
        run_queries(table, [ONE_STEP, "SELECT 1"], threads=2, limits=Limits(), stopping=lambda: True)
    assert time.monotonic() - since < 5


def test_a_process_that_dies_is_an_error_of_its_query_alone(table):
    process = sql.QueryProcess(table, Limits(seconds=20), lambda: False)
    assert process.ask("SELECT 1") == Outcome(((1,),))
    os.kill(process._process.pid, signal.SIGKILL)
    assert "ended its process (exit code -9)" in process.ask("SELECT 2").error
    assert process.ask("SELECT 3") == Outcome(((3,),))
    process.kill()


@pytest.mark.parametrize("signals", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ctrl_c_ends_a_query_at_once_and_no_process_is_left(table, tmp_path, signals):
    code = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from recipes.text_to_sql.sql import Limits, run_queries
print("begun", flush=True)
run_queries(Path({str(table)!r}), [{ONE_STEP!r}, "SELECT 1"], threads=2, limits=Limits(seconds=60))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.5)
        since = time.monotonic()
        process.send_signal(signals)
        assert process.wait(10) != 0 and time.monotonic() - since < 3
    while left := processes_of(process.pid):
        assert time.monotonic() - since < 4, left
        time.sleep(0.1)


def processes_of(session):
    """Processes of a session that are not only waited for."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, theirs = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        processes += [path.parent.name] if int(theirs) == session and state != "Z" else []
    return processes
