"""`moe-asr evaluate` and `moe-asr compare`: error rates of any model, and models side by side."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cli.shared import Opening, added_options, decoding_config, open_as_told, with_opening, with_options, with_store
from cli.table import text_table
from common.console import echo
from common.errors import UsageError
from common.storage import open_store


@click.command()
@click.argument("model")
@click.argument("corpus")
@click.option(
    "--split",
    type=click.Choice(("test", "dev", "train", "all")),
    default="test",
    show_default=True,
    help="Split to evaluate.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. [default: evaluations/MODEL-CORPUS-SPLIT]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing evaluation in this folder.")
@click.option("--samples", type=click.IntRange(1), help="Evaluate a stratified part of this many utterances.")
@click.option("--long-audio", type=click.Choice(("error", "drop", "windows")), default="error", show_default=True,
              help="Treatment of utterances over 30 s: refuse, leave out (counted), or transcribe in "
              "windows.")  # fmt: skip
@with_store
@with_options(added_options)
@with_opening
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json.")
def evaluate(
    model: str,
    corpus: str,
    split: str,
    out: Path | None,
    overwrite: bool,
    samples: int | None,
    long_audio: str,
    store_url: str,
    endpoint_url: str | None,
    speaker: str | None,
    expert: str | None,
    opening: Opening,
    as_json: bool,
) -> None:
    """Measure a model's error rates on a split of a corpus.

    MODEL is a run's name; a folder or store address with a trained model, a PEFT adapter or a Whisper checkpoint; or a
    hub name. CORPUS is a folder with index.jsonl, or its address. Speakers and groups for which the model has added
    experts use them; --speaker or --expert selects one for all utterances. The output folder has evaluation.json,
    report.html, and the utterances as predictions.jsonl and, for spreadsheets, utterances.csv.

    \b
        moe-asr evaluate mine data/mine
        moe-asr evaluate openai/whisper-small data/mine --split dev --json
    """
    from common.data.sources import open_corpus
    from common.inference.added_experts import with_added
    from common.report.evaluation import evaluate_to_folder
    from stages.local_runner import cache_folder
    from stages.settings import decoding_options

    store = open_store(store_url, endpoint_url=endpoint_url)
    config = decoding_config(model, store, opening)
    data = open_corpus(corpus, cache_folder(), endpoint_url=endpoint_url, cache_bytes=config.runtime.audio_cache_bytes)
    opened = open_as_told(model, store, config, opening, endpoint_url=endpoint_url)
    opened = with_added(opened, speaker=speaker, expert=expert)
    out = out or Path("evaluations") / "-".join(map(_slug, (model, corpus, split)))
    result = evaluate_to_folder(
        opened,
        data,
        decoding_options(config),
        out,
        split=split,
        long_audio=long_audio,
        samples=samples,
        overwrite=overwrite,
        num_workers=config.runtime.num_workers,
        quiet=config.runtime.quiet,
    )
    echo(json.dumps(result, indent=1, ensure_ascii=False) if as_json else evaluation_table(result, out))


def evaluation_table(result: Mapping[str, Any], out: Path) -> str:
    """The rates for the terminal: by etiology and severity, and overall."""
    rows = []
    for name in ("etiology", "severity"):
        groups = result[f"by_{name}"]
        if set(groups) != {"unknown"}:
            rows += [_rates(f"{name} {group}", rates) for group, rates in groups.items()]
    rows.append(_rates("overall", result["overall"]))
    header = ("", "speakers", "utterances", "WER", "95% interval", "unclipped", "CER", "loops")
    lines = [text_table(header, rows), "", f"report: {out / 'report.html'}"]
    if result["left_out"]:
        lines.insert(1, f"{result['left_out']} utterances over 30 s were omitted")
    return "\n".join(lines)


def _rates(name: str, rates: Mapping[str, Any]) -> list[str]:
    low, high = rates["ci"]
    interval = "one speaker" if rates["speakers"] == 1 else f"{low:.1%} to {high:.1%}"
    counts = [str(rates["speakers"]), str(rates["utterances"])]
    return [name, *counts, f"{rates['wer']:.1%}", interval, f"{rates['wer_unclipped']:.1%}", f"{rates['cer']:.1%}",
            str(rates["loops"])]  # fmt: skip


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text.rstrip("/").rpartition("/")[2]).strip("._") or "model"


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]…")
@click.option("--group", "groups", multiple=True, metavar="NAME=RUN,RUN…",
              help="Several runs (seeds) of one regime, compared by their mean.")  # fmt: skip
@click.option("--reference", help="System that the others are compared with. [default: the first run or group]")
@click.option("--with-base", is_flag=True, help="Add the base model, as the first run measured it.")
@click.option("--common", "shared_only", is_flag=True, help="Compare on the utterances that all runs share.")
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(100),
    help="Number of bootstrap draws of speakers.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for comparison.json and compare.html.")
@click.option("--overwrite", is_flag=True, help="Replace an existing comparison in this folder.")
@with_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    runs: Sequence[str],
    groups: Sequence[str],
    reference: str | None,
    with_base: bool,
    shared_only: bool,
    resamples: int,
    out: Path | None,
    overwrite: bool,
    store_url: str,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    """Compare runs, and folders written by `evaluate`, on the same test utterances.

    Differences come with intervals from a paired bootstrap over speakers.

    \b
        moe-asr compare mine regular dense --out comparison
    """
    from common.evaluation.compare import compare as make_comparison
    from common.evaluation.results import before_training, read_result
    from common.report.compare import table_rows, write_comparison
    from stages.local_runner import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    systems = {
        name: [read_result(member, store=store, cache=cache_folder()) for member in members]
        for name, members in named_systems(runs, groups).items()
    }
    if with_base:
        if "base" in systems:
            raise UsageError("with --with-base, base is the model before training: name the run by --group NAME=RUN")
        first = next(iter(systems))
        reference = reference or first
        systems = {"base": [before_training(systems[first][0])], **systems}
    made = make_comparison(systems, reference=reference, shared_only=shared_only, resamples=resamples)
    if out:
        write_comparison(made, out, overwrite=overwrite)
    if as_json:
        echo(json.dumps(made, indent=1, ensure_ascii=False))
        return
    echo(text_table(*table_rows(made)))
    echo(f"\n{made['utterances']} utterances of {made['speakers']} speakers")
    for note in made["notes"]:
        echo(f"note: {note}")
    if out:
        echo(f"report: {out / 'compare.html'}")


def named_systems(runs: Sequence[str], groups: Sequence[str]) -> dict[str, list[str]]:
    """Name → runs of each system, single runs first.

    Raises:
        UsageError: none, or one named twice.
    """
    systems: dict[str, list[str]] = {}
    for text in (*(f"{_slug(run)}={run}" for run in runs), *groups):
        name, equals, members = text.partition("=")
        names = [member.strip() for member in members.split(",") if member.strip()]
        if not equals or not name or not names:
            raise UsageError(f"--group {text}: write it as NAME=RUN,RUN,RUN")
        if name in systems:
            raise UsageError(f"{name} is named twice: --group NAME=RUN gives a run another name")
        systems[name] = names
    if not systems:
        raise UsageError("compare: name at least one run, folder of an evaluation, or --group")
    return systems
