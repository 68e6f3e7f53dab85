"""`moe-asr extend` and `moe-asr experts`: an expert for a new speaker or group, and what was added to a model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from cli.shared import Opening, decoding_config, open_as_told, with_opening, with_store
from cli.table import text_table
from common.config import Config
from common.console import echo, set_up_logging
from common.errors import UsageError
from common.json_files import Row
from common.progress import clock
from common.storage import open_store

if TYPE_CHECKING:
    from common.model.added_experts import AddedExpert, Method
    from stages.extend.extension import Extension, Plan

METHODS = ("auto", "choose", "gates", "expert", "neighbour", "shared")


@click.command()
@click.argument("model")
@click.option(
    "--corpus", required=True, help="Corpus of the new speech with text: folder or s3://bucket/prefix with index.jsonl."
)
@click.option("--speaker", help="Speaker of the corpus that gets an expert.")
@click.option("--where", help="Group that gets an expert, such as etiology=ataxia.")
@click.option("--name", help="Name of the expert. [default: the speaker or group]")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="Method. auto selects the simplest method within one standard error of the best in cross-validation, or adds "
    "nothing if none improves on the model.",
)
@click.option("--run", "run_name", default="", help="Name of the extended model. [default: MODEL-NAME]")
@click.option("--replace", is_flag=True, help="Replace the existing expert for this speaker or group.")
@click.option("--curve", is_flag=True, help="Measure a learning curve over 5, 10, 20 … utterances as well.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report. [default: extensions/RUN/NAME]")
@click.option("--dry-run", is_flag=True, help="Print how much speech would be used and whether the expert exists.")
@with_store
@with_opening
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def extend(
    model: str,
    corpus: str,
    speaker: str | None,
    where: str | None,
    name: str | None,
    method: str,
    run_name: str,
    replace: bool,
    curve: bool,
    out: Path | None,
    dry_run: bool,
    store_url: str,
    endpoint_url: str | None,
    opening: Opening,
    as_json: bool,
) -> None:
    """Add an expert for a new speaker or group to a finished model, from a few utterances with text.

    MODEL is a run's name; a folder or store address with a trained model, a PEFT adapter or a Whisper checkpoint; or a
    hub name. The model and its results for all other speakers stay the same to the last bit. The utterances of split
    test are never used for training. The extended model is a run of its own in the store. After an interruption, run
    the same command again to continue.

    \b
        moe-asr extend mine --corpus data/new --speaker F07
        moe-asr extend mine --corpus data/new --where etiology=ataxia --name ataxia
    """
    from common.files import is_taken
    from common.report.extension import MARK
    from common.signals import handle_signals
    from stages.extend import extension
    from stages.inputs import load_corpus
    from stages.local_runner import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    set_up_logging(quiet=opening.quiet)
    column, value = speaker_or_group(speaker, where)
    config = _config(decoding_config(model, store, opening), corpus, store_url, endpoint_url)
    opened = open_as_told(model, store, config, opening, endpoint_url=endpoint_url)
    used = {"name": str(opened.base), "language": opened.spoken, "task": opened.task}  # as long audio is transcribed
    config = config.model_copy(update={"model": config.model.model_copy(update=used)})
    data = load_corpus(config, cache_folder())
    wish = extension.Wish(name or value, column, value, cast("Method", method), run_name, replace, curve)
    plan = extension.make_plan(opened, data, config, store, wish)
    out = out or Path("extensions") / plan.run / wish.name
    is_taken(out, overwrite=True, mark=MARK)
    if dry_run:
        echo(_planned(plan))
        return
    with handle_signals() as stopping:
        made = extension.make(plan, opened, data, config, store, cache_folder(), stopping=stopping)
    if extension.join([plan], store, cache_folder()):
        made = dataclasses.replace(made, run=plan.run)
    page = _write_page(made, out, model)
    echo(json.dumps(_facts(made), indent=1, ensure_ascii=False) if as_json else _told(made, page))


def speaker_or_group(speaker: str | None, where: str | None) -> tuple[str, str]:
    """Column and value of --speaker or --where.

    Raises:
        UsageError: none or both are given.
    """
    from stages.extend.enrolment import parse_where

    if (speaker is None) == (where is None):
        raise UsageError("give --speaker NAME, or --where COLUMN=VALUE for a group")
    return ("speaker", speaker) if speaker is not None else parse_where(where or "")


def _config(config: Config, corpus: str, store_url: str, endpoint_url: str | None) -> Config:
    """The configuration with the corpus and places of this command."""
    changes = {
        "corpus": config.corpus.model_copy(update={"path": corpus}),
        "store": store_url,
        "endpoint_url": endpoint_url,
    }
    return config.model_copy(update=changes)


def _planned(plan: Plan) -> str:
    seconds = sum(u.duration for u in plan.request.utterances)
    state = {"done": "done", "missing": "to do", "damaged": "stale"}[plan.state]
    return (
        f"{plan.request.name}: {len(plan.request.utterances)} utterances, {clock(seconds)}; method "
        f"{plan.request.method}; run {plan.run}; key {plan.task.key.digest[:8]}: {state}"
    )


def _write_page(made: Extension, out: Path, model: str) -> Path:
    from common.report.extension import PAGE, is_page_of, write_extension

    if made.page or not is_page_of(out, made.info, made.run):  # one that was made with the texts at hand says more
        write_extension(made.info, made.details, made.page, out, model=model, run=made.run)
    return out / PAGE


def _facts(made: Extension) -> Row:
    return {"run": made.run or None, **asdict(made.info), "gain": made.info.gain, "details": made.details}


def _told(made: Extension, page: Path) -> str:
    """What came of it, for the terminal."""
    info, details = made.info, made.details
    lines = [f"{way:<10} held-out cross-entropy {loss:.3f}" for way, loss in details["ways"].items()]
    lines[:1] = [line.replace("none      ", "unchanged ") for line in lines[:1]]
    lines += [f"{way:<10} not evaluated further: clearly worse on the first part" for way in details["given_up"]]
    if info.gain is not None and info.interval is not None:
        tried = "" if info.method != "none" else f" by {details['tried']}"
        lines.append(
            f"expected{tried}, on held-out utterances: WER {info.wer_before:.1%} → {info.wer_after:.1%}, a gain of "
            f"{_gain(info)}"
        )
    if info.method == "none":
        lines.append(f"{info.name}: nothing is added: no method is better than the unchanged model")
    else:
        rank = f" of rank {info.rank}" if info.rank else ""
        lines.append(f"{info.name}: {info.method}{rank}, from {info.utterances} utterances ({clock(info.seconds)})")
        lines.append(f"others checked: {details['others']} utterances, unchanged to the last bit")
        lines.append(f"model: {made.run}; moe-asr transcribe FILE --model {made.run} --expert {info.name}")
    return "\n".join([*lines, f"report: {page}"])


@click.group()
def experts() -> None:
    """List, show and remove the experts that were added to a model."""


@experts.command("list")
@click.argument("model")
@with_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def experts_list(model: str, store_url: str, endpoint_url: str | None, as_json: bool) -> None:
    """List the added experts: for whom, from how much speech, with what expected gain.

    \b
        moe-asr experts list mine-F07
    """
    added = _added(model, store_url, endpoint_url)
    if as_json:
        echo(json.dumps([asdict(expert) for expert in added], indent=1, ensure_ascii=False))
        return
    rows = [
        (
            expert.name,
            f"{expert.column} {expert.value}",
            expert.method,
            str(expert.utterances),
            clock(expert.seconds),
            _gain(expert),
        )
        for expert in added
    ]
    echo(text_table(("expert", "for", "method", "utterances", "speech", "expected gain"), rows))


def _gain(expert: AddedExpert) -> str:
    if expert.gain is None or expert.interval is None:
        return "not measured"
    low, high = expert.interval
    return f"{100 * expert.gain:.1f} points (95% interval {100 * low:.1f} to {100 * high:.1f})"


def _added(model: str, store_url: str, endpoint_url: str | None) -> list[AddedExpert]:
    from common.inference.load_model import find_model
    from common.model.added_experts import read_added
    from stages.local_runner import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    return [read_added(folder) for folder in find_model(model, store, cache_folder(), endpoint_url)[1]]


@experts.command("show")
@click.argument("model")
@click.argument("name")
@with_store
def experts_show(model: str, name: str, store_url: str, endpoint_url: str | None) -> None:
    """Show everything that a model records about one added expert, as JSON.

    \b
        moe-asr experts show mine-F07 F07
    """
    from common.inference.added_experts import nearest

    added = _added(model, store_url, endpoint_url)
    expert = next((expert for expert in added if expert.name == name), None)
    if expert is None:
        raise UsageError(f"model {model} has no expert {name!r}{nearest(name, [expert.name for expert in added])}")
    echo(json.dumps(asdict(expert), indent=1, ensure_ascii=False))


@experts.command("remove")
@click.argument("model")
@click.argument("name")
@with_store
def experts_remove(model: str, name: str, store_url: str, endpoint_url: str | None) -> None:
    """Remove an added expert from a run, and delete its files if no other run uses it.

    \b
        moe-asr experts remove mine-F07 F07
    """
    from stages.extend.extension import remove
    from stages.local_runner import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    others = remove(model, name, store, cache_folder())
    if others:
        echo(f"{name} is removed from {model}; its files stay, since these runs also use it: {', '.join(others)}")
    else:
        echo(f"{name} is removed from {model}, and its files are deleted")
