"""`moe-asr doctor`: whether this machine, and a store, can do what runs need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import click

from common.console import coloured
from common.machine import Finding, check_machine
from stages.pipeline import cache_folder

COLOURS = {"ok": "green", "note": "yellow", "fail": "red"}


@click.command()
@click.option("--store", "store_url", help="Also try what runs rely on in this folder or s3://bucket/prefix.")
@click.option("--endpoint-url", help="Of an S3-compatible store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, store_url: str | None, endpoint_url: str | None, as_json: bool) -> None:
    """Tries versions, device, memory, disk, decoding and a store, before a run does.

    Ends with 0 where nothing stops a run, with 1 where something does; a note stops nothing.

    \b
        moe-asr doctor
        moe-asr doctor --store s3://bucket/runs --json
    """
    found = []
    for one in _findings(store_url, endpoint_url):
        found.append(one)
        if not as_json:
            word = coloured(f"{one.state:<4}", COLOURS[one.state])
            click.echo(f"{word}  {one.name:<28} {one.detail}")
    failed = [one.name for one in found if one.state == "fail"]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(one) for one in found]}, indent=1))
    elif failed:
        click.echo(f"\n{len(failed)} of {len(found)} checks failed: {', '.join(failed)}", err=True)
    context.exit(1 if failed else 0)


def _findings(store_url: str | None, endpoint_url: str | None) -> Iterator[Finding]:
    from common.storage import open_store
    from common.storage.doctor import check_store

    yield from check_machine(cache_folder())
    if store_url is not None:
        for name, held, detail in check_store(open_store(store_url, endpoint_url=endpoint_url)):
            yield Finding(f"store: {name}", "ok" if held else "fail", detail)
