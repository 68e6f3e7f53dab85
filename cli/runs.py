"""Commands that look at runs and stores."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from cli.submit import namespace_option, show_workflow, show_workflow_logs
from cli.table import text_table
from common.config import Config, validate
from common.errors import DataError, StoreError
from common.options import config_from, config_options
from common.store import Store, open_store
from stages.pipeline import Run, read_record

store_options = (
    click.option("--store", "store_url", default="runs", show_default=True, help="Folder or s3://bucket/prefix."),
    click.option("--endpoint-url", help="Of an S3-compatible store."),
)


def with_store(function: Any) -> Any:
    """Adds --store and --endpoint-url."""
    for option in store_options:
        function = option(function)
    return function


def show_plan(config: Config, *, as_json: bool, deep: bool = False) -> None:
    """Prints state and reason of every task."""
    run = Run(config)
    made = run.plan(deep=deep)
    rows = [(p.task.label, p.status, p.reason, p.task.key.digest) for p in made.planned]
    rows += [(c.name, "todo", "its pieces are known once the stage before it is done", "") for c in made.open_ended]
    if as_json:
        click.echo(
            json.dumps([dict(zip(("task", "status", "reason", "key"), row, strict=True)) for row in rows], indent=1)
        )
        return
    words = {"done": "done", "todo": "to do", "again": "to do again"}
    width = max(len(row[0]) for row in rows)
    for task, state, reason, key in rows:
        click.echo(f"{task:<{width}}  {words[state]:<11}  {key[:8]:<8}  {reason}")


@click.command()
@config_options
@click.option("--verify", "deep", is_flag=True, help="Also re-hash every file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(deep: bool, as_json: bool, **options: Any) -> None:
    """Says for each stage and shard: done, to do or to do again, and why."""
    show_plan(config_from(options), as_json=as_json, deep=deep)


def run_record(store: Store, name: str) -> dict[str, Any]:
    """run.json of a run; `runs/demo` and `demo` both name it.

    Raises:
        DataError: there is no such run.
    """
    found = read_record(store, Path(name).name)
    if found is None:
        names = ", ".join(run_names(store)) or "none"
        raise DataError(f"no run {Path(name).name!r} in {store.url}; runs there: {names}")
    return found


def run_names(store: Store) -> list[str]:
    """Names of all runs of a store."""
    keys = (entry.key for entry in store.list(""))
    return sorted({key.split("/")[0] for key in keys if key.count("/") == 1 and key.endswith("/run.json")})


cluster_option = click.option("--cluster", is_flag=True, help="Ask the cluster: RUN is a run's or a workflow's name.")


@click.command()
@click.argument("run")
@with_store
@cluster_option
@namespace_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    run: str, store_url: str, endpoint_url: str | None, cluster: bool, namespace: str | None, as_json: bool
) -> None:
    """Shows how far a run is, on this machine or on a cluster."""
    if cluster or namespace:
        show_workflow(run, namespace, as_json=as_json)
        return
    store = open_store(store_url, endpoint_url=endpoint_url)
    record = run_record(store, run)
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    updated = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["updated"]))
    click.echo(f"run {record['name']}: {record['status']}, last news {updated}, moe-asr {record['version']}")
    finished = {(r["stage"], r["shard"]): r for r in record["timeline"]}
    rows = []
    for label, task in record["tasks"].items():
        shard = label.partition("[")[2].rstrip("]") or None
        row = finished.get((task["stage"], shard))
        rows.append((label, task["key"][:8], f"{row['seconds']:.0f} s on {row['host']}" if row else "not done"))
    click.echo(text_table(("task", "key", "result"), rows))


@click.group()
def runs() -> None:
    """The runs of a store."""


@runs.command("list")
@with_store
def runs_list(store_url: str, endpoint_url: str | None) -> None:
    """Lists the runs of a store."""
    store = open_store(store_url, endpoint_url=endpoint_url)
    rows = []
    for name in run_names(store):
        record = run_record(store, name)
        key = f"{name}/summary.json"
        summary = json.loads(store.read(key)) if store.size(key) is not None else {}
        rates = [f"{summary[k]:.1%}" if k in summary else "-" for k in ("wer_before", "wer_after")]
        rows.append(
            (name, record["status"], time.strftime("%Y-%m-%d %H:%M", time.localtime(record["updated"])), *rates)
        )
    click.echo(text_table(("run", "status", "last news", "WER before", "WER after"), rows))


@click.command()
@click.argument("run")
@with_store
def verify(run: str, store_url: str, endpoint_url: str | None) -> None:
    """Re-hashes everything that a run has made."""
    store = open_store(store_url, endpoint_url=endpoint_url)
    record = run_record(store, run)
    made = Run(validate(record["config"] | {"store": store_url, "endpoint_url": endpoint_url})).plan(deep=True)
    bad = [p for p in made.planned if p.status != "done"]
    for p in made.planned:
        click.echo(f"{p.task.label:<12} {'whole' if p.status == 'done' else p.status}  {p.reason}")
    if bad:
        raise DataError(f"{len(bad)} of {len(made.planned)} results are missing or damaged: run it again to make them")


@click.command()
@click.argument("run")
@click.argument("stage", required=False)
@with_store
@cluster_option
@namespace_option
def logs(
    run: str, stage: str | None, store_url: str, endpoint_url: str | None, cluster: bool, namespace: str | None
) -> None:
    """Prints the log of a run, or the lines of one stage."""
    if cluster or namespace:
        show_workflow_logs(run, stage, namespace)
        return
    store = open_store(store_url, endpoint_url=endpoint_url)
    run_record(store, run)
    key = f"{Path(run).name}/logs/run.log"
    if store.size(key) is None:
        raise DataError(f"run {run} in {store.url} has no log yet")
    for line in store.read(key).decode("utf-8", "replace").splitlines():
        if stage is None or f" {stage}" in line:
            click.echo(line)


@click.command()
@with_store
@click.option("--delete", is_flag=True, help="Really delete; without it, only say what would go.")
@click.option("--older-than", default=24.0, show_default=True, help="Hours that an unfinished attempt may be idle.")
def gc(store_url: str, endpoint_url: str | None, delete: bool, older_than: float) -> None:
    """Finds what no manifest refers to: attempts that lost, checkpoints of finished stages."""
    from common.artifacts import garbage

    store = open_store(store_url, endpoint_url=endpoint_url)
    entries = garbage(store, older_than_hours=older_than)
    for entry in entries:
        click.echo(f"{'deleted' if delete else 'would delete'} {entry.key} ({entry.size:,} bytes)")
        if delete:
            store.delete(entry.key)
    total = sum(entry.size for entry in entries)
    click.echo(f"{len(entries)} files, {total:,} bytes" + ("" if delete else "; --delete removes them"))


@click.group()
def store() -> None:
    """Stores of artifacts."""


@store.command("doctor")
@click.argument("url")
@click.option("--endpoint-url", help="Of an S3-compatible store.")
def store_doctor(url: str, endpoint_url: str | None) -> None:
    """Tries on a store what the pipeline relies on, and says what it promises."""
    from common.doctor import check_store

    failed = 0
    for name, ok, detail in check_store(open_store(url, endpoint_url=endpoint_url)):
        click.echo(f"{'ok  ' if ok else 'FAIL'}  {name:<28} {detail}")
        failed += not ok
    if failed:
        raise StoreError(f"{failed} checks failed on {url}: do not keep runs there")


@click.command()
@click.argument("what", type=click.Choice(("clusters", "gating", "experts", "asr")))
@click.argument("run")
@with_store
@click.option("--out", type=click.Path(path_type=Path), default=Path("plots"), show_default=True)
def plot(what: str, run: str, store_url: str, endpoint_url: str | None, out: Path) -> None:
    """Draws the metrics of a run's stage alone."""
    from common.plots import plot_asr, plot_clusters, plot_experts, plot_gating

    store = open_store(store_url, endpoint_url=endpoint_url)
    folders = stage_folders(store, run_record(store, run), {"clusters": "cluster"}.get(what, what))
    out.mkdir(parents=True, exist_ok=True)
    single = {"clusters": plot_clusters, "gating": plot_gating, "asr": plot_asr}
    drawn = plot_experts(folders, out) if what == "experts" else single[what](folders[0], out)
    for path in drawn:
        click.echo(path)


def stage_folders(store: Store, record: dict[str, Any], stage: str) -> list[Path]:
    """Local folders of a stage's finished pieces.

    Raises:
        DataError: it is not done.
    """
    from common.artifacts import Key, fetch, inspect
    from stages.pipeline import cache_folder

    folders = []
    for label, task in record["tasks"].items():
        if task["stage"] == stage:
            key = Key(stage, task["key"], {})
            state = inspect(store, key)
            if state.manifest is None or state.status != "done":
                raise DataError(f"{label} of run {record['name']} is not done")
            folders.append(fetch(store, key, state.manifest, cache_folder() / "inputs" / stage / key.digest))
    if not folders:
        raise DataError(f"run {record['name']} has no stage {stage}")
    return folders
