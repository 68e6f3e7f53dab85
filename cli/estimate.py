"""`moe-asr estimate` and `moe-asr fit-batch`: what a run will cost, and how large its batches may be."""

from __future__ import annotations

import json
from typing import Any

import click

from cli.table import text_table
from common.config import Config
from common.console import echo
from common.errors import UsageError
from common.options import config_from, config_options
from common.pipeline.runs import recorded_states, run_record
from common.storage import open_store


@click.command()
@config_options
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), required=True, help="Hours of training speech.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPUs that work at once.")
@click.option("--from", "source", metavar="RUN", required=True, help="Finished run whose pace is taken.")
@click.option("--price", type=click.FloatRange(0), help="Price of one GPU hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(hours: float, gpus: int, source: str, price: float | None, as_json: bool, **options: Any) -> None:
    """GPU hours of each stage for a corpus of --hours, at the pace of a finished run on the same kind of machine.

    \b
        moe-asr estimate --hours 683 --from mine
        moe-asr estimate --hours 683 --from mine --gpus 4 --price 3.5
    """
    from common import cost

    config = config_from(options)
    rows = cost.from_rates(config, hours=hours, rates=measured_rates(config, source))
    basis = f"measured by run {source}"
    total = sum(row.gpu_hours for row in rows)
    if as_json:
        stages = {row.stage: {"audio_hours": row.audio_hours, "gpu_hours": row.gpu_hours} for row in rows}
        echo(json.dumps({"basis": basis, "gpu_hours": total, "days": total / 24 / gpus, "stages": stages}))
        return
    table = [[row.stage, f"{row.audio_hours:,.0f}", f"{row.gpu_hours:,.2f}"] for row in rows]
    echo(text_table(("stage", "hours of speech", "GPU hours"), [*table, ["total", "", f"{total:,.2f}"]]))
    echo(f"\n{basis}")
    echo(f"on {gpus} GPU{'s' if gpus > 1 else ''}: {total / 24 / gpus:.2f} days" + _priced(total, price))


def _priced(total: float, price: float | None) -> str:
    return "" if price is None else f", {total * price:,.2f} at {price:g} per GPU hour"


def measured_rates(config: Config, name: str) -> dict[str, float]:
    """Seconds of speech per second and GPU of each stage of a finished run, the mean of its pieces.

    Raises:
        UsageError: the run measured none.
    """
    store = open_store(config.store, endpoint_url=config.endpoint_url)
    found: dict[str, list[float]] = {}
    for _, key, state in recorded_states(store, run_record(store, name)):
        manifest = state.manifest
        if manifest is None:
            continue
        pace = manifest.metrics.get("throughput", {})
        rate = pace.get("audio_seconds_per_second", 0) / pace.get("processes", 1)
        rate = rate or (manifest.metrics.get("audio_seconds", 0) / max(manifest.seconds, 1e-9))
        if rate:
            found.setdefault(key.stage, []).append(rate)
    if not found:
        raise UsageError(f"--from {name}: no stage of this run measured its throughput; is it finished?")
    return {stage: sum(rates) / len(rates) for stage, rates in found.items()}


@click.command("fit-batch")
@config_options
@click.option("--tokens", type=click.IntRange(2, 448), default=128, show_default=True, help="Of each text.")
@click.option(
    "--memory", type=click.FloatRange(min=0, min_open=True), help="GiB to stay within; nine tenths by default."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit_batch(tokens: int, memory: float | None, as_json: bool, **options: Any) -> None:
    """Tries steps of joint training until memory is full, and prints the largest batch that fits.

    \b
        moe-asr fit-batch --model openai/whisper-large-v3 --gpu auto
    """
    from stages.fit import fit_batch as search
    from stages.local_runner import cache_folder

    config = config_from(options)
    found = search(config, cache_folder(), tokens=tokens, memory=int(memory * 2**30) if memory else None)
    if as_json:
        echo(json.dumps({"rows": found.rows, "batch_seconds": found.batch_seconds, "memory": found.memory}))
        return
    place = f"{found.memory / 2**30:.1f} GiB on {found.device}"
    echo(f"{found.rows} utterances of 30 s with {tokens} tokens fit into {place}:")
    echo(f"  --set asr.batch_seconds={found.batch_seconds:.0f} --set asr.batch_tokens={found.rows * tokens}")
