"""`moe-asr estimate` and `moe-asr fit-batch`: what a run will cost, and how large its batches may be."""

import json
from typing import Any

import click

from cli.table import text_table
from common.config import Config
from common.console import echo
from common.cost import Pace, measured_pace
from common.errors import UsageError
from common.options import config_from, config_options
from common.pipeline.plan import active_stages
from common.pipeline.runs import recorded_states, run_record
from common.progress import clock
from common.storage import open_store


@click.command()
@config_options
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), required=True, help="Hours of training speech.")
@click.option(
    "--gpus", type=click.IntRange(1), default=1, show_default=True, help="Number of GPUs or CPUs used at once."
)
@click.option("--from", "source", metavar="RUN", required=True, help="Finished run whose pace is used.")
@click.option("--price", type=click.FloatRange(0), help="Price of one hour of a GPU or CPU, in any currency.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def estimate(hours: float, gpus: int, source: str, price: float | None, as_json: bool, **options: Any) -> None:
    """Estimate the time of each stage for a corpus of --hours, from a finished run on the same kind of machine.

    Limits of steps (asr.max_steps) and of utterances (subsets.asr_samples and the like) are applied. For an existing
    corpus, `moe-asr run --dry-run` gives a more exact estimate.

    \b
        moe-asr estimate --hours 683 --from mine
        moe-asr estimate --hours 683 --from mine --gpus 4 --price 3.5
    """
    from common.cost import costs
    from stages import STAGES

    config = config_from(options)
    pace = run_pace(config, source)
    active = [contract.name for contract in active_stages(STAGES, config)]
    rows = costs(config, stages=active, hours=hours, pace=pace)
    total = sum(row.hours for row in rows)
    device = {"cpu": "CPU", "cuda": "GPU"}.get(pace.device, "device")
    basis = f"measured by run {source}"
    if as_json:
        stages = {row.stage: {"audio_hours": row.audio_hours, "hours": row.hours} for row in rows}
        figures = {"basis": basis, "device": pace.device, "hours": total, "days": total / 24 / gpus, "stages": stages}
        cost = {} if price is None else {"price": price, "cost": total * price}
        echo(json.dumps(figures | cost))
        return
    table = [[row.stage, f"{row.audio_hours:,.2f}", f"{row.hours:,.2f}"] for row in rows]
    header = ("stage", "hours of speech", f"{device} hours")
    echo(text_table(header, [*table, ["total", "", f"{total:,.2f}"]]))
    echo(f"\n{basis}")
    spent = clock(3600 * total / gpus)
    echo(f"on {gpus} {device}{'s' if gpus > 1 else ''}: {spent}" + _priced(total, price, device))


def _priced(total: float, price: float | None, device: str) -> str:
    return "" if price is None else f", {total * price:,.2f} at {price:g} per {device} hour"


def run_pace(config: Config, name: str) -> Pace:
    """What a finished run measured.

    Raises:
        UsageError: no stage of the run has recorded its work.
    """
    store = open_store(config.store, endpoint_url=config.endpoint_url)
    states = recorded_states(store, run_record(store, name))
    pace = measured_pace(
        (key.stage, state.manifest.seconds, state.manifest.metrics) for _, key, state in states if state.manifest
    )
    if not pace.rates:
        raise UsageError(f"--from {name}: no stage of this run measured its throughput; is it finished?")
    return pace


@click.command("fit-batch")
@config_options
@click.option(
    "--tokens",
    type=click.IntRange(2, 448),
    default=128,
    show_default=True,
    help="Number of text tokens of each utterance.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    help="Maximum memory in GiB. Nine tenths of the device's by default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fit_batch(tokens: int, memory: float | None, as_json: bool, **options: Any) -> None:
    """Run steps of joint training until memory is full, and print the largest batch that fits.

    \b
        moe-asr fit-batch --model openai/whisper-large-v3 --gpu auto
    """
    from stages.fit_batch import fit_batch as search
    from stages.local_runner import cache_folder

    config = config_from(options)
    fit = search(config, cache_folder(), tokens=tokens, memory=int(memory * 2**30) if memory else None)
    if as_json:
        echo(json.dumps({"rows": fit.rows, "batch_seconds": fit.batch_seconds, "memory": fit.memory}))
        return
    place = f"{fit.memory / 2**30:.1f} GiB on {fit.device}"
    echo(f"{fit.rows} utterances of 30 s with {tokens} tokens fit into {place}:")
    echo(f"  --set asr.batch_seconds={fit.batch_seconds:.0f} --set asr.batch_tokens={fit.rows * tokens}")
