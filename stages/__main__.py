"""`python -m stages <stage>`: one stage alone, as containers and parallel experts run it."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from common import __version__
from common.config import Config, flatten, validate
from common.console import echo, run_command, set_up_logging
from common.errors import DataError, UsageError
from common.options import Option, click_option, config_from, config_options
from common.pipeline.contract import Contract
from common.pipeline.plan import Planned
from common.pipeline.runs import read_record, run_names, settings_alone
from common.signals import handle_signals
from common.storage import open_store
from stages import STAGES, pod
from stages.launch import launch
from stages.local_runner import Run, follow_one, run_one

log = logging.getLogger(__name__)
RANK = os.environ.get("RANK")  # of this process in one training; set by torchrun
# A stage's own section gives its options; these come from an earlier stage's that decides its input.
BORROWED = {"cluster": {"--pooling": "extract.pooling", "--layer": "extract.layer"}}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="stages")
def stages() -> None:
    """Run one stage; its inputs are the outputs of the earlier stages with the same configuration.

    Without --mode and --config, the configuration of the newest run in --store (default: runs) is used, except for
    `runtime` and locations; give those with --corpus and --model. Where $MOE_ASR_STORE is set, as in a workflow's pods,
    the whole configuration comes from MOE_ASR_* variables instead (docs/cluster.md).
    """


def stage_command(contract: Contract) -> click.Command:
    """The command of one stage: options of its section, and all those of `moe-asr run`."""
    own = own_options(contract)

    @click.option("--shard", type=int, help="Shard of a stage that fans out. All shards by default.")
    @config_options
    def command(shard: int | None, **options: Any) -> None:
        given = {option.path: options.pop(option.name) for option in own}
        given = {path: value for path, value in given.items() if value is not None}
        run_stage(contract, shard, options, given)

    for option in own:
        command = click_option(option)(command)
    return click.command(contract.name, help=f"{contract.name}: {contract.summary}.")(command)


def own_options(contract: Contract) -> list[Option]:
    """The options of the stage's own section, without those that every command has."""
    section = Config.model_fields[contract.section].annotation
    taken = {"--reduce", "--reduce-dim", "--min-cluster-size", "--mixture", "--top-k", "--adapt"}
    taken |= {"--shared-expert", "--gradient-checkpointing", "--gradient-accumulation-steps", "--eval-every-n-epochs"}
    flags = {f"--{name.replace('_', '-')}": f"{contract.section}.{name}" for name in section.model_fields}  # type: ignore[union-attr]
    return [Option(flag, path) for flag, path in (flags | BORROWED.get(contract.name, {})).items() if flag not in taken]


def run_stage(contract: Contract, shard: int | None, options: dict[str, Any], own: dict[str, Any]) -> None:
    """Runs the tasks of a stage that are not done; joint training by `runtime.processes` processes together."""
    config = pod.config_from_variables() if pod.in_pod() else stage_config(options, own)
    set_up_logging(config.runtime.log_file, quiet=config.runtime.quiet)
    run = Run(config, pod.variable("MODEL") or None)
    plan = run.plan()
    of_stage = [p for p in plan.planned if p.task.contract.name == contract.name]
    if any(stage.name == contract.name for stage in plan.open_ended) or not of_stage:
        reason = "this configuration does not need it" if not contract.active(config) else "an earlier stage is missing"
        raise DataError(f"{contract.name} cannot run: {reason}; `moe-asr run --dry-run` shows what is done")
    if shard is not None:
        if not 0 <= shard < len(of_stage):
            raise UsageError(f"--shard {shard}: {contract.name} has tasks 0 to {len(of_stage) - 1}")
        of_stage = [of_stage[shard]]
    processes = contract.processes(config)
    if processes > 1 and RANK is None and any(p.status != "done" for p in of_stage):
        launch(sys.argv[1:], processes)
        return
    with run.serving(), handle_signals() as stopping:
        for planned in of_stage:
            if int(RANK or 0):
                follow_one(run, planned, stopping)
            else:
                _run_task(planned, run, stopping)


def _run_task(planned: Planned, run: Run, stopping: Callable[[], bool]) -> None:
    memo = pod.variable("MEMO")
    done = planned.manifest if planned.status == "done" else None
    manifest = done or run_one(run, planned, stopping, {"memo": memo} if memo else None)
    task = planned.task
    prefix = f"{task.key.prefix}{manifest.attempt}"
    where = run.store.local_path(prefix) or f"{run.store.url.rstrip('/')}/{prefix}"
    echo(f"{task.label}: {where}")
    if pod.in_pod():
        pod.write_output("result", {"digest": manifest.digest, "seconds": round(manifest.seconds, 1)})


def stage_config(options: dict[str, Any], own: dict[str, Any]) -> Config:
    """From the options; starting from the newest run's configuration where neither mode nor file is given.

    Raises:
        UsageError: that run had another corpus or model than the options say; a record may come from anybody, so what
            it names is not used, only told.
    """
    if options.get("mode") or options.get("config_file"):
        return config_from(options, own)
    record = newest_record(options.get("store") or "runs", options.get("endpoint_url"))
    if record is None:
        return config_from(options, own)
    config = config_from(options, own, base=validate({**settings_alone(record), "run": record["name"]}))
    recorded, now = (dict(flatten(tree)) for tree in (record["config"], config.model_dump(mode="json")))
    for option, path in (("corpus", "corpus.path"), ("model", "model.name")):
        given = options.get(option) is not None or any(s.startswith(f"{path}=") for s in options.get("settings", ()))
        if not given and recorded.get(path) != now[path]:
            raise UsageError(
                f"--{option} is missing: run {record['name']} had {recorded.get(path)!r}, but locations are not taken "
                f"from a store; give --{option}, or --mode or --config"
            )
    return config


def newest_record(store_url: str, endpoint_url: str | None) -> dict[str, Any] | None:
    """run.json of the run that was updated last; damaged ones are passed over with a warning."""
    if "://" not in store_url and not Path(store_url).is_dir():
        return None
    store = open_store(store_url, endpoint_url=endpoint_url)
    records = []
    for name in run_names(store):
        try:
            records += [record] if (record := read_record(store, name)) else []
        except DataError as error:
            log.warning("%s", error)
    return max(records, key=lambda record: record["updated"], default=None)


@stages.command("plan")
@click.option("--stage", default="", help="Stage whose shards are planned. Without it, the first plan of a workflow.")
def plan_command(stage: str) -> None:
    """Print a workflow's plan: which tasks its stages have and under which keys.

    Configured by MOE_ASR_* environment variables.
    """
    set_up_logging()
    pod.plan_stage(stage)


@stages.command("report")
def report_command() -> None:
    """Write a workflow's summary and report, once its stages are done.

    Configured by MOE_ASR_* environment variables.
    """
    set_up_logging()
    echo(json.dumps(pod.write_report(), indent=1))


@stages.command("outcome")
@click.argument("status")
@click.argument("failures", default="[]")
def outcome_command(status: str, failures: str) -> None:
    """Record in the store how a workflow ended and why.

    Configured by MOE_ASR_* environment variables.
    """
    set_up_logging()
    echo(json.dumps(pod.write_outcome(status, failures), indent=1))


@stages.command("extend-plan")
def extend_plan_command() -> None:
    """Print a workflow's plan of added experts, one item for each speaker or group.

    Configured by MOE_ASR_* environment variables.
    """
    from stages.extend import pods

    set_up_logging()
    pods.plan_all()


@stages.command("extend-one")
@click.argument("who")
def extend_one_command(who: str) -> None:
    """Make an added expert for WHO, a speaker or COLUMN=VALUE; no run names it yet.

    Configured by MOE_ASR_* environment variables.
    """
    from stages.extend import pods

    set_up_logging()
    pods.make_one(who)


@stages.command("extend-join")
def extend_join_command() -> None:
    """Write the run that names all added experts of a workflow.

    Configured by MOE_ASR_* environment variables.
    """
    from stages.extend import pods

    set_up_logging()
    pods.join_all()


for _contract in STAGES:
    stages.add_command(stage_command(_contract))


def main() -> None:
    """Entry point of the stage images."""
    run_command(stages)


if __name__ == "__main__":
    main()
