"""`moe-asr`: the whole pipeline and what belongs to it."""

import json
from typing import Any

import click

from cli.clusterings import clusterings
from cli.corpus import corpus
from cli.doctor import doctor
from cli.estimate import estimate, fit_batch
from cli.evaluate import compare, evaluate
from cli.export import export, merge
from cli.extend import experts, extend
from cli.model import model
from cli.runs import gc, logs, plot, runs, show_plan, status, verify
from cli.segment import segment
from cli.submit import submit
from cli.sweep import sweep
from cli.table import summary_table
from cli.transcribe import transcribe
from common import __version__
from common.config import to_yaml
from common.console import echo, run_command, set_up_logging
from common.options import config_from, config_options


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moe-asr")
def cli() -> None:
    """Mixtures of LoRA experts on Whisper, for speech that ordinary recognisers get wrong.

    \b
        moe-asr corpus synth data/demo         synthesise a small corpus
        moe-asr run --mode demo                extract, cluster, gating, asr, report
        moe-asr run --mode demo --dry-run      what is done, what is not, and why
        moe-asr submit --gpu h100-80 …         the same on a Kubernetes cluster with Argo
    """


@cli.command()
@config_options
@click.option("--resume", is_flag=True, help="Continue a run that has another configuration.")
@click.option("--dry-run", is_flag=True, help="Print what would run, and why, without running it.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(resume: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Run the stages that are not done, in order, and print the word error rates before and after training.

    \b
        moe-asr run --mode demo
        moe-asr run --corpus data/mine --model openai/whisper-small --gpu auto --run mine
        moe-asr run --skip-pretraining --num-experts 8 --set asr.epochs=3
    """
    from stages.local_runner import run_pipeline

    config = config_from(options)
    if dry_run:
        show_plan(config, as_json=as_json)
        return
    set_up_logging(config.runtime.log_file, quiet=config.runtime.quiet)
    summary = run_pipeline(config, resume=resume)
    echo(json.dumps(summary, indent=1) if as_json else summary_table(summary))


@cli.group("config")
def config_group() -> None:
    """Show the configuration."""


@config_group.command("show")
@config_options
def config_show(**options: Any) -> None:
    """Print the resolved configuration, as YAML that --config reads.

    \b
        moe-asr config show --mode demo > my.yaml
    """
    echo(to_yaml(config_from(options)), nl=False)


for command in (
    doctor,
    corpus,
    model,
    estimate,
    fit_batch,
    evaluate,
    compare,
    transcribe,
    export,
    merge,
    extend,
    experts,
    sweep,
    clusterings,
    submit,
    status,
    runs,
    verify,
    logs,
    gc,
    plot,
):
    cli.add_command(command)
corpus.add_command(segment)


def main() -> None:
    """Entry point of the console command."""
    run_command(cli)


if __name__ == "__main__":
    main()
