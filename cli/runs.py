"""Commands that look at runs and stores."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cli.shared import with_store
from cli.submit import namespace_option, show_workflow, show_workflow_logs
from cli.table import text_table
from common.config import Config
from common.console import coloured, echo
from common.errors import DataError
from common.files import MAX_FILE, NotFound, make_folders
from common.json_files import parse_object
from common.pipeline.attempts import attempts_at, describe_attempt
from common.pipeline.runs import recorded_states, run_names, run_record, stage_folders
from common.progress import clock
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from common.storage.store import Store
from stages.local_runner import Run, cache_folder

log = logging.getLogger(__name__)


def show_plan(config: Config, *, as_json: bool) -> None:
    """Prints state and reason of every task and, where it is not done, what it amounts to."""
    from stages.forecast import forecasts

    run = Run(config)
    made = run.plan(deep=run.rehashes)
    expected = forecasts(run, made)
    rows = [(p.task.label, p.status, p.reason, p.task.key.digest) for p in made.planned]
    rows += [(c.name, "todo", "its tasks are known once the stage before it is done", "") for c in made.open_ended]
    if as_json:
        names = ("task", "status", "reason", "key")
        tasks = [dict(zip(names, row, strict=True)) for row in rows]
        more = {task: forecast.row() for task, forecast in expected.items()}
        echo(json.dumps([row | more.get(row["task"], {}) for row in tasks], indent=1))
        return
    words = {"done": ("done", "green"), "todo": ("to do", "yellow"), "stale": ("stale", "red")}
    width = max(len(row[0]) for row in rows)
    for task, state, reason, key in rows:
        word, colour = words[state]
        reason += f": {expected[task].describe()}" if task in expected else ""
        echo(f"{task:<{width}}  ", coloured(f"{word:<5}", colour), f"  {key[:8]:<8}  {reason}")


cluster_option = click.option("--cluster", is_flag=True, help="Query the cluster. RUN names a run or a workflow.")


@click.command()
@click.argument("run")
@with_store
@cluster_option
@namespace_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    run: str, store_url: str, endpoint_url: str | None, cluster: bool, namespace: str | None, as_json: bool
) -> None:
    """Show how far a run is, on this machine or on a cluster.

    \b
        moe-asr status demo
        moe-asr status moe-asr-x7k2p --cluster -n speech
    """
    if cluster or namespace:
        show_workflow(run, namespace, as_json=as_json)
        return
    store = open_store(store_url, endpoint_url=endpoint_url)
    record = run_record(store, run)
    if as_json:
        echo(json.dumps(record, indent=1))
        return
    updated = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["updated"]))
    echo(f"run {record['name']}: {record['status']}, last update {updated}, moe-asr {record['version']}")
    finished = {(r["stage"], r["shard"]): r for r in record["timeline"]}
    rows = []
    for label, task in record["tasks"].items():
        shard = label.partition("[")[2].rstrip("]") or None
        row = finished.get((task["stage"], shard))
        done = row and row.get("key", task["key"]) == task["key"]  # records of older versions name no key
        rows.append((label, task["key"][:8], _result(row) if row and done else _unrecorded(store, task)))
    echo(text_table(("task", "key", "result"), rows))


def _result(row: Mapping[str, Any]) -> str:
    """How long a finished task took, and where."""
    attempts = row.get("attempts", 1)
    return f"{clock(row['seconds'])} on {row['host']}" + (f", in {attempts} attempts" if attempts > 1 else "")


def _unrecorded(store: Store, task: Mapping[str, Any]) -> str:
    """The result of a task that a workflow's record does not tell yet, or what its last attempt does or did."""
    key = Key(task["stage"], task["key"])
    state = inspect(store, key)
    if state.status == "done" and state.manifest:
        return _result({"seconds": state.manifest.seconds, "host": state.manifest.host})
    attempts = attempts_at(store, key)
    return describe_attempt(attempts[-1], now=time.time()) if attempts else "not done"


@click.group()
def runs() -> None:
    """List the runs of a store."""


@runs.command("list")
@with_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def runs_list(store_url: str, endpoint_url: str | None, as_json: bool) -> None:
    """List the runs of a store.

    \b
        moe-asr runs list --store s3://bucket/runs
    """
    store = open_store(store_url, endpoint_url=endpoint_url)
    listed = [_run_facts(store, name) for name in run_names(store)]
    if as_json:
        echo(json.dumps(listed, indent=1))
        return
    rows = []
    for run in listed:
        rates = ["-" if run[key] is None else f"{run[key]:.1%}" for key in ("wer_before", "wer_after")]
        news = "-" if run["updated"] is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run["updated"]))
        rows.append((run["run"], run["status"], news, *rates))
    echo(text_table(("run", "status", "last update", "WER before", "WER after"), rows))


def _run_facts(store: Store, name: str) -> dict[str, Any]:
    """Name, status, time of the last news and, of a finished run, its error rates; `damaged` where it is unreadable."""
    facts = {"run": name, "status": "damaged", "updated": None, "wer_before": None, "wer_after": None}
    try:
        record = run_record(store, name)
        facts |= {key: record[key] for key in ("status", "updated")}
        summary = parse_object(store.read(f"{name}/summary.json"), f"{store.url}/{name}/summary.json")
        rates = {rate: summary.get(rate) for rate in ("wer_before", "wer_after")}
    except NotFound:  # not finished yet
        return facts
    except DataError as error:
        log.warning("%s", error)
        return facts | {"status": "damaged"}
    return facts | {rate: value for rate, value in rates.items() if isinstance(value, float)}


@click.command()
@click.argument("run")
@with_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(run: str, store_url: str, endpoint_url: str | None, as_json: bool) -> None:
    """Re-hash all results of a run.

    \b
        moe-asr verify demo
    """
    store = open_store(store_url, endpoint_url=endpoint_url)
    results = []
    for label, _, seen in recorded_states(store, run_record(store, run), deep=True):
        results.append((label, "ok" if seen.status == "done" else seen.status, seen.reason))
    bad = [label for label, state, _ in results if state != "ok"]
    if as_json:
        names = ("task", "state", "reason")
        echo(json.dumps([dict(zip(names, row, strict=True)) for row in results], indent=1))
    for label, state, reason in results if not as_json else ():
        echo(f"{label:<12} ", coloured(state, "green" if state == "ok" else "red"), f"  {reason}")
    if bad:
        raise DataError(
            f"{len(bad)} of {len(results)} results are missing or damaged: run `moe-asr run` with this run's "
            "configuration to recreate them"
        )


@click.command()
@click.argument("run")
@click.argument("stage", required=False)
@with_store
@cluster_option
@namespace_option
def logs(
    run: str, stage: str | None, store_url: str, endpoint_url: str | None, cluster: bool, namespace: str | None
) -> None:
    """Print the log of a run, or the lines of one stage.

    \b
        moe-asr logs demo asr
        moe-asr logs moe-asr-x7k2p experts --cluster -n speech
    """
    if cluster or namespace:
        show_workflow_logs(run, stage, namespace)
        return
    store = open_store(store_url, endpoint_url=endpoint_url)
    run_record(store, run)
    key = f"{Path(run).name}/logs/run.log"
    if store.size(key) is None:
        raise DataError(f"run {run} in {store.url} has no log yet")
    for line in store.read(key, MAX_FILE).decode("utf-8", "replace").splitlines():
        if stage is None or f" {stage}" in line:
            echo(line)


@click.command()
@with_store
@click.option("--delete", is_flag=True, help="Delete these files. By default they are only listed.")
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Hours that an unfinished attempt may be idle before it is garbage.",
)
def gc(store_url: str, endpoint_url: str | None, delete: bool, older_than: float) -> None:
    """Find files that no manifest refers to: unused attempts, checkpoints of finished stages.

    \b
        moe-asr gc
        moe-asr gc --older-than 48 --delete
    """
    from common.storage.garbage import garbage

    store = open_store(store_url, endpoint_url=endpoint_url)
    entries = garbage(store, older_than_hours=older_than)
    for entry in entries:
        echo(f"{'deleted' if delete else 'would delete'} {entry.key} ({entry.size:,} bytes)")
        if delete:
            store.delete(entry.key)
    total = sum(entry.size for entry in entries)
    echo(f"{len(entries)} files, {total:,} bytes" + ("" if delete else "; --delete removes them"))


@click.command()
@click.argument("what", type=click.Choice(("clusters", "gating", "experts", "asr")))
@click.argument("run")
@with_store
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("plots"), show_default=True, help="Folder to write."
)
def plot(what: str, run: str, store_url: str, endpoint_url: str | None, out: Path) -> None:
    """Draw the metrics of one stage of a run.

    \b
        moe-asr plot asr demo --out plots
    """
    from common.report.plots import plot_asr, plot_clusters, plot_experts, plot_gating

    store = open_store(store_url, endpoint_url=endpoint_url)
    folders = stage_folders(store, run_record(store, run), {"clusters": "cluster"}.get(what, what), cache_folder())
    make_folders(out)
    single = {"clusters": plot_clusters, "gating": plot_gating, "asr": plot_asr}
    drawn = plot_experts(folders, out) if what == "experts" else single[what](folders[0], out)
    for path in drawn:
        echo(path)
