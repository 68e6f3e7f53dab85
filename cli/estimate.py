"""`moe-asr estimate` and `moe-asr fit-batch`: what a run will cost, and how large its batches may be."""

from __future__ import annotations

import json
from typing import Any

import click

from cli.table import text_table
from common.config import Config
from common.errors import UsageError
from common.harness.runs import recorded_states, run_record
from common.options import config_from, config_options
from common.storage import open_store

# What the original system's authors expected for 683 h with Whisper large-v2.
ORIGINAL_DAYS = {"a100-40": "4 to 5", "a100-80": "3 to 4", "h100-80": "2 to 3"}


@click.command()
@config_options
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), required=True, help="Of training speech.")
@click.option("--mean-seconds", type=click.FloatRange(0.1, 30), default=8.0, show_default=True, help="Per utterance.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="That work at once.")
@click.option("--from", "source", metavar="RUN", help="Take the rates that this finished run measured.")
@click.option("--price", type=click.FloatRange(0), help="Of one GPU hour, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(
    hours: float, mean_seconds: float, gpus: int, source: str | None, price: float | None, as_json: bool, **options: Any
) -> None:
    """GPU hours of each stage for a corpus of --hours.

    With --from, by the throughput of a finished run on the same kind of machine. Without, by counted operations at a
    share of the GPU's peak that is assumed: such figures are marked.

    \b
        moe-asr estimate --hours 683 --gpu h100-80 --price 3.5
        moe-asr estimate --hours 683 --from full
    """
    from common import cost

    config = config_from(options)
    if source:
        rates = measured_rates(config, source)
        rows, basis = cost.from_rates(config, hours=hours, rates=rates), f"measured by run {source}"
    else:
        gpu = str(options["gpu"] or "")
        if gpu not in cost.PEAK:
            raise UsageError(
                f"--gpu {gpu or 'is missing'}: name one of {', '.join(cost.PEAK)}, or give --from RUN with its rates"
            )
        rate = cost.PEAK[gpu] * cost.ASSUMED_SHARE
        shape = cost.SHAPES[shape_name(config.model.name)]
        rows = cost.estimate(config, hours=hours, mean_seconds=mean_seconds, shape=shape, operations_per_second=rate)
        basis = f"ASSUMED: {cost.ASSUMED_SHARE:.0%} of {cost.PEAK[gpu] / 1e12:.0f} Tflop/s; not measured"
    total = sum(row.gpu_hours for row in rows)
    if as_json:
        stages = {row.stage: {"audio_hours": row.audio_hours, "gpu_hours": row.gpu_hours} for row in rows}
        click.echo(json.dumps({"basis": basis, "gpu_hours": total, "days": total / 24 / gpus, "stages": stages}))
        return
    table = [[row.stage, f"{row.audio_hours:,.0f}", f"{row.gpu_hours:,.2f}"] for row in rows]
    click.echo(text_table(("stage", "hours of speech", "GPU hours"), [*table, ["total", "", f"{total:,.2f}"]]))
    click.echo(f"\n{basis}; {cost.describe_positions(config, mean_seconds)}")
    click.echo(f"on {gpus} GPU{'s' if gpus > 1 else ''}: {total / 24 / gpus:.2f} days" + _priced(total, price))
    if not source and options.get("gpu") in ORIGINAL_DAYS:
        click.echo(f"the original system's estimate for 683 h: {ORIGINAL_DAYS[options['gpu']]} days")


def _priced(total: float, price: float | None) -> str:
    return "" if price is None else f", {total * price:,.2f} at {price:g} per GPU hour"


def shape_name(model: str) -> str:
    """The size in a model's name: `openai/whisper-large-v2` → large.

    Raises:
        UsageError: it names none.
    """
    words = model.rstrip("/").rpartition("/")[2].lower().replace(".", "-").replace("_", "-").split("-")
    for name in ("turbo", "tiny", "base", "small", "medium", "large"):
        if name in words:
            return name
    raise UsageError(f"--model {model}: its name tells no size of Whisper; use --from RUN with measured rates")


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
    from stages.pipeline import cache_folder

    config = config_from(options)
    found = search(config, cache_folder(), tokens=tokens, memory=int(memory * 2**30) if memory else None)
    if as_json:
        click.echo(json.dumps({"rows": found.rows, "batch_seconds": found.batch_seconds, "memory": found.memory}))
        return
    place = f"{found.memory / 2**30:.1f} GiB on {found.device}"
    click.echo(f"{found.rows} utterances of 30 s with {tokens} tokens fit into {place}:")
    click.echo(f"  --set asr.batch_seconds={found.batch_seconds:.0f} --set asr.batch_tokens={found.rows * tokens}")
