"""The command line: `python -m recipes.text_to_sql demo|train|predict|evaluate`."""

import json
from pathlib import Path
from typing import Any

import click

from common.console import run_command, set_up_logging
from recipes.text_to_sql.settings import Settings, settings_options

ANSWERING = (
    "data",
    "database",
    "output",
    "experiment_name",
    "eval_batch_size",
    "num_beams",
    "sql_threads",
    "sql_timeout",
    "device",
)
AT_LEAST_ONE = click.IntRange(min=1)
split = click.option("--split", default="test", show_default=True, help="Split of the questions.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Questions in English to SQL: fine-tune a T5, and score its queries by the records that they return."""
    set_up_logging()


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", default=6000, type=AT_LEAST_ONE, show_default=True, help="Pairs to train on.")
@click.option("--dev", default=466, type=AT_LEAST_ONE, show_default=True, help="Pairs to select by.")
@click.option("--test", default=448, type=AT_LEAST_ONE, show_default=True, help="Pairs to report on.")
@click.option("--flights", default=6000, type=AT_LEAST_ONE, show_default=True, help="Flights in the database.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def demo(folder: Path, **counts: int) -> None:
    """Write a flights-like database and questions with their queries, from a committed grammar."""
    from recipes.text_to_sql.flights import write_demo

    write_demo(folder, **counts)


@cli.command()
@settings_options()
def train(**options: Any) -> None:
    """Train, and keep the model that is best on dev."""
    from recipes.text_to_sql.run import train

    click.echo(json.dumps(train(Settings(**options))))


@cli.command()
@settings_options(*ANSWERING)
@split
def predict(split: str, **options: Any) -> None:
    """Write SPLIT.sql and SPLIT.records.jsonl of a trained model."""
    from recipes.text_to_sql.run import predict

    predict(Settings(**options), split)


@cli.command()
@settings_options(*ANSWERING)
@split
@click.option("--predicted", type=click.Path(path_type=Path), help="Score the queries of this file instead.")
def evaluate(split: str, predicted: Path | None, **options: Any) -> None:
    """Print record F1, record EM, SQL EM and the error rate."""
    from recipes.text_to_sql.run import evaluate

    for name, value in evaluate(Settings(**options), split, predicted).items():
        click.echo(f"{name:12} {value:.4f}")


if __name__ == "__main__":
    run_command(cli)
