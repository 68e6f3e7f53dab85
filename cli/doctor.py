"""`moe-asr doctor`: whether this machine, and a store, can do what runs need."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import click

from cli.shared import endpoint_option
from common.console import coloured, echo
from common.errors import UsageError
from common.pipeline.machine_checks import check_machine
from common.storage.doctor import Check, check_store
from stages.local_runner import cache_folder

COLOURS = {"ok": "green", "note": "yellow", "fail": "red"}


@click.command()
@click.option("--store", "store_url", help="Store to check as well: a folder or s3://bucket/prefix.")
@endpoint_option
@click.option("--only-store", is_flag=True, help="Check the store alone, not this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(
    context: click.Context, store_url: str | None, endpoint_url: str | None, only_store: bool, as_json: bool
) -> None:
    """Check versions, device, memory, disk, decoding and a store before a run needs them.

    The exit code is 0 if nothing prevents a run, and 1 otherwise; a note does not prevent runs.

    \b
        moe-asr doctor
        moe-asr doctor --store s3://bucket/runs --json
        moe-asr doctor --store s3://bucket/runs --endpoint-url https://s3.example.com --only-store
    """
    if only_store and store_url is None:
        raise UsageError("--only-store checks nothing without a store: give --store too")
    checks = []
    for check in _findings(store_url, endpoint_url, machine=not only_store):
        checks.append(check)
        if not as_json:
            echo(coloured(f"{check.state:<4}", COLOURS[check.state]), f"  {check.name:<28} {check.detail}")
    failed = [check.name for check in checks if check.state == "fail"]
    if as_json:
        echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=1))
    elif failed:
        echo(f"\n{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}", err=True)
    context.exit(1 if failed else 0)


def _findings(store_url: str | None, endpoint_url: str | None, *, machine: bool) -> Iterator[Check]:
    from common.storage import open_store

    if machine:
        yield from check_machine(cache_folder())
    if store_url is not None:
        yield from check_store(open_store(store_url, endpoint_url=endpoint_url))
