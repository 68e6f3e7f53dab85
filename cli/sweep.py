"""`moe-asr sweep`: several regimes on one corpus, with the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.table import text_table
from common.console import echo, set_up_logging
from common.errors import UsageError
from common.files import is_taken
from common.options import config_from, config_options, parse_setting
from common.storage import open_store

if TYPE_CHECKING:
    from stages.sweep import SweepRun


@click.command()
@config_options
@click.option("--regimes", default="mixture,dense", show_default=True, help="Names of regimes, separated by commas.")
@click.option("--seeds", default="", help="Seeds, separated by commas.  [default: --seed]")
@click.option("--max-steps", type=click.IntRange(min=1), required=True, help="Total optimiser steps of each run.")
@click.option(
    "--pretrain-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of the steps that pre-trains experts before joint training.",
)
@click.option(
    "--for", "own", multiple=True, nargs=2, metavar="REGIME SECTION.KEY=VALUE", help="Setting for one regime only."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for comparison.json and compare.html.")
@click.option("--dry-run", is_flag=True, help="Print the runs without running them.")
def sweep(
    regimes: str,
    seeds: str,
    max_steps: int,
    pretrain_share: float,
    own: Sequence[tuple[str, str]],
    out: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Run several regimes with the same number of optimiser steps, pre-training included, and compare them.

    Regimes: mixture, speaker, etiology, one-group, shuffled, regular, dense, dense-plain, pretrained, alone, loss,
    hard, adalora, full. Runs are called NAME-REGIME-sSEED, where --run gives NAME; finished runs are skipped.

    \b
        moe-asr sweep --mode demo --regimes mixture,dense --seeds 0,1,2 --max-steps 300
    """
    from common.report.compare import RESULT
    from stages.sweep import plan_sweep, run_sweep

    if out:
        is_taken(out, overwrite=True, mark=RESULT)
    config = config_from(options)
    set_up_logging(config.runtime.log_file, quiet=config.runtime.quiet)
    settings: dict[str, dict[str, Any]] = {}
    for regime, text in own:
        path, value = parse_setting(text)
        settings.setdefault(regime, {})[path] = value
    runs = plan_sweep(
        config,
        [name.strip() for name in regimes.split(",") if name.strip()],
        seeds=parse_seeds(seeds) or [config.seed],
        steps=max_steps,
        pretrain_share=pretrain_share,
        settings=settings,
        dry=dry_run,
    )
    if dry_run:
        echo(plan_table(runs))
        return
    run_sweep(runs)
    echo(comparison(runs, out))


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` → [0, 1, 2].

    Raises:
        UsageError: not such numbers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"--seeds {text}: give different whole numbers with commas between, as 0,1,2")
    return [int(part) for part in parts]


def plan_table(runs: Sequence[SweepRun]) -> str:
    """Run, steps of the shared expert, of each routed one and of joint training."""
    rows = [
        (
            run.name,
            str(run.config.experts.shared_max_steps or "-"),
            str(run.config.experts.max_steps or "-"),
            str(run.config.asr.max_steps),
        )
        for run in runs
    ]
    return text_table(("run", "steps of the shared expert", "of each routed expert", "joint steps"), rows)


def comparison(runs: Sequence[SweepRun], out: Path | None) -> str:
    """The regimes side by side as `moe-asr compare` shows them, each by the mean of its seeds."""
    from common.evaluation.compare import compare
    from common.evaluation.results import before_training, read_result
    from common.report.compare import table_rows, write_comparison
    from stages.local_runner import cache_folder

    first = runs[0].config
    store, cache = open_store(first.store, endpoint_url=first.endpoint_url), cache_folder()
    systems: dict[str, list[Any]] = {}
    for run in runs:
        systems.setdefault(run.regime, []).append(read_result(run.name, store=store, cache=cache))
    base = before_training(systems[runs[0].regime][0])
    made = compare({"base": [base], **systems}, reference=runs[0].regime)
    lines = [text_table(*table_rows(made)), "", f"{made['utterances']} utterances of {made['speakers']} speakers"]
    lines += [f"note: {note}" for note in made["notes"]]
    if out:
        write_comparison(made, out, overwrite=True)
        lines.append(f"report: {out / 'compare.html'}")
    return "\n".join(lines)
