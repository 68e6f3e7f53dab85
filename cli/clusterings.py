"""`moe-asr clusterings`: other layers, poolings and clusterings for the groups of a run's gate."""

import json
from collections.abc import Sequence

import click

from cli.shared import device_option, with_store
from cli.table import text_table
from common.console import echo
from common.json_files import Row
from common.storage import open_store

FIGURES = {"clusters": "clusters", "noise": "noise_share", "silhouette": "silhouette"}
FIGURES |= {"ARI etiology": "etiology", "ARI speaker": "speaker"}


@click.command()
@click.argument("run")
@click.argument("corpus")
@with_store
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="Additional encoder layer to compare; repeatable. The audio is encoded again.",
)
@click.option(
    "--pooling", "poolings", multiple=True, type=click.Choice(("mean", "max", "meanstd")), help="Pooling to compare."
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=2000, show_default=True, help="Maximum number of utterances."
)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def clusterings(
    run: str,
    corpus: str,
    store_url: str,
    endpoint_url: str | None,
    layers: tuple[int, ...],
    poolings: tuple[str, ...],
    samples: int,
    device: str,
    as_json: bool,
) -> None:
    """Compare encoder layers, poolings and clusterings for the groups of a finished RUN's gate, on its CORPUS.

    \b
        moe-asr clusterings mine data/mine
        moe-asr clusterings mine data/mine --layer 8 --layer -1 --pooling mean --pooling meanstd
    """
    from stages.clusterings import run_clusterings
    from stages.local_runner import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    report = run_clusterings(
        run,
        store,
        cache_folder(),
        corpus=corpus,
        endpoint_url=endpoint_url,
        layers=layers,
        poolings=poolings,
        samples=samples,
        device=device,
    )
    echo(json.dumps(report, indent=1) if as_json else _tables(report))


def _tables(report: Sequence[Row]) -> str:
    rows = [(_way(row), *(_figure(row.get(name)) for name in FIGURES.values())) for row in report]
    return text_table(("clustering", *FIGURES), rows)


def _way(row: Row) -> str:
    name = f"layer {row['layer']} {row['pooling']}, {row['reduce']}, {row['algorithm']}" + " (own)" * row["own"]
    return f"{name}: {row['problem']}" if "problem" in row else name


def _figure(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
