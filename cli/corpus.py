"""Commands for corpora."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from cli.shared import endpoint_option
from cli.table import text_table
from common.console import echo
from common.errors import DataError, UsageError

if TYPE_CHECKING:
    from common.data.corpus import Corpus
    from common.data.importers.build import BuildOptions
    from common.data.importers.rows import Imported


@click.group()
def corpus() -> None:
    """Make, import and check corpora."""


@corpus.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["demo", "bench", "bench-alike"]),
    default="demo",
    show_default=True,
    help="Corpus to make: a demonstration, or the benchmark with audibly different groups or with alike groups.",
)
@click.option("--speakers", type=int, help="Speakers per stand-in etiology.  [default: 6; bench: 12]")
@click.option("--utterances", type=int, help="Utterances per speaker.  [default: 10; not for bench]")
@click.option("--minutes", type=float, help="Minutes of speech in train, for the benchmark.  [default: 30]")
@click.option(
    "--held-out-minutes",
    type=float,
    help="Minutes of speech in each of dev and test, for the benchmark.  [default: a tenth]",
)
@click.option("--seed", default=42, show_default=True, help="Random seed for texts, voices and effects.")
@click.option(
    "--etiology",
    "etiologies",
    multiple=True,
    help="Stand-in etiology to include; repeatable. All by default.",
)
def synth(
    out: Path,
    kind: str,
    speakers: int | None,
    utterances: int | None,
    minutes: float | None,
    held_out_minutes: float | None,
    seed: int,
    etiologies: tuple[str, ...],
) -> None:
    """Synthesise a corpus with espeak-ng: voices, rates and effects as stand-ins for etiologies.

    `--kind bench` is harder: groups that replace one sound by another in conflicting ways, and words and a group of
    speakers that are not in the training data. With `--kind bench-alike` all groups have the same voices, so that one
    utterance hardly identifies its group.

    \b
        moe-asr corpus synth data/demo
        moe-asr corpus synth data/bench --kind bench --minutes 60
    """
    from demo.corpus import synthesize, synthesize_bench

    if kind != "demo" and utterances is not None:
        raise UsageError(f"--utterances is not for --kind {kind}: --minutes sets how much speech to generate")
    if kind == "demo" and (minutes is not None or held_out_minutes is not None):
        raise UsageError("--minutes is for --kind bench: --utterances sets how much speech a demo has")
    made = (
        synthesize_bench(
            out,
            minutes=30 if minutes is None else minutes,
            held_out_minutes=held_out_minutes,
            alike=kind == "bench-alike",
            speakers_per_etiology=12 if speakers is None else speakers,
            etiologies=etiologies or None,
            seed=seed,
        )
        if kind != "demo"
        else synthesize(
            out,
            speakers_per_etiology=6 if speakers is None else speakers,
            utterances_per_speaker=10 if utterances is None else utterances,
            seed=seed,
            etiologies=etiologies or None,
        )
    )
    hours = sum(u.duration for u in made.utterances) / 3600
    echo(f"{out}: {len(made.utterances)} utterances, {hours:.2f} h")


def opened(path: str, endpoint_url: str | None) -> Corpus:
    """A corpus in a folder or a store, with the cache of `moe-asr run`."""
    from common.data.sources import open_corpus
    from common.sections import RuntimeConfig
    from stages.local_runner import cache_folder

    return open_corpus(path, cache_folder(), endpoint_url=endpoint_url, cache_bytes=RuntimeConfig().audio_cache_bytes)


@corpus.command()
@click.argument("source")
@click.argument("dest")
@click.option("--shard-size", default="256MB", show_default=True, help="Maximum size of a tar shard.")
@endpoint_option
def pack(source: str, dest: str, shard_size: str, endpoint_url: str | None) -> None:
    """Pack a corpus into tar shards, from and to folders or s3:// addresses: loaders then read only their ranges.

    \b
        moe-asr corpus pack data/mine s3://bucket/mine --shard-size 256MB
    """
    from common.data.shards import pack_corpus, parse_size
    from common.progress import progress
    from common.storage import open_store
    from stages.local_runner import cache_folder

    size = parse_size(shard_size)
    data = opened(source, endpoint_url)
    cache_folder().mkdir(parents=True, exist_ok=True)
    files = len({u.audio_filepath for u in data.utterances})
    store = open_store(dest, endpoint_url=endpoint_url)
    with closing(progress(files, "pack", unit="files")) as bar:
        made = pack_corpus(data, store, shard_bytes=size, scratch=cache_folder(), progress=bar.update)
    known = made.shards - made.stored
    echo(
        f"{dest}: {made.files} audio files in {made.shards} shards, {made.size / 1e6:,.1f} MB"
        + (f" ({known} shards already existed)" if known else "")
    )


@corpus.command()
@click.argument("path")
@endpoint_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(path: str, endpoint_url: str | None, as_json: bool) -> None:
    """Count utterances, hours and speakers.

    \b
        moe-asr corpus stats data/mine
        moe-asr corpus stats data/mine --json
    """
    from common.data.corpus import PROVENANCE, corpus_stats
    from common.json_files import read_object

    data = opened(path, endpoint_url)
    figures = corpus_stats(data)
    made_of = data.root / PROVENANCE
    if data.remote is None and made_of.is_file():
        figures["left_out"] = read_object(made_of).get("left_out") or {}
    if as_json:
        echo(json.dumps(figures, indent=1))
        return
    for name, values in figures.items():
        if isinstance(values, dict) and values and all(isinstance(v, dict) for v in values.values()):
            columns = list(next(iter(values.values())))
            rows = [(key, *(_cell(row.get(c)) for c in columns)) for key, row in values.items()]
            echo(f"\n{text_table((name, *columns), rows)}")
        elif isinstance(values, dict):
            echo(f"{name}: {', '.join(f'{count} {reason}' for reason, count in values.items()) or 'nothing'}")
        else:
            echo(f"{name}: {_cell(values)}")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@corpus.command()
@click.argument("path")
@click.option("--model", help="Checkpoint folder whose tokenizer counts the tokens of each text.")
@endpoint_option
def audit(path: str, model: str | None, endpoint_url: str | None) -> None:
    """Find problems for training: unreadable audio, missing text, speakers in two splits, …

    \b
        moe-asr corpus audit data/mine --model models/whisper-tiny.en
    """
    from common.data.audit import audit as audit_corpus

    counter = None
    if model is not None:
        from common.data.tokens import load_codec

        counter = load_codec(Path(model)).length
    findings = audit_corpus(opened(path, endpoint_url), token_count=counter)
    for finding in findings:
        echo(f"{finding.severity}: {finding.utterance_id}: {finding.kind}: {finding.detail}")
    errors = sum(finding.severity == "error" for finding in findings)
    echo(f"{errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise DataError(f"corpus {path} has {errors} errors")


@corpus.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(("auto", "table", "audiofolder", "sap", "torgo")),
    default="auto",
    show_default=True,
    help="Kind of SOURCE. auto treats a file as a table and a folder as an audiofolder.",
)
@click.option(
    "--audio-root",
    type=click.Path(path_type=Path),
    help="Folder that a table's relative paths start from.  [default: the table's folder]",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="FIELD=COLUMN",
    help="Column of a table for a field; an empty COLUMN leaves the field out. Fields: audio_filepath, text, text_alt, "
    "id, split, speaker, etiology, severity, offset, end, duration.",
)
@click.option("--header", metavar="NAME,NAME,…", help="Column names of a table that has no header row.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows with a fault, list each, and import the others.")
@click.option(
    "--normalise-characters",
    is_flag=True,
    help="Write texts as Whisper does: straight apostrophes and quotes, no full-width letters or invisible characters.",
)
@click.option(
    "--official-splits",
    is_flag=True,
    help="Keep the splits Train and Dev of sap, even if no utterance is left for test.",
)
@click.option(
    "--microphone",
    type=click.Choice(("head", "array", "both")),
    default="head",
    show_default=True,
    help="Microphone to import, for --format torgo.",
)
@click.option("--copy-audio", is_flag=True, help="Copy the audio into OUT instead of referring to it.")
@click.option("--seed", default=42, show_default=True, help="Random seed for the split by speaker.")
def import_corpus(
    source: Path,
    out: Path,
    kind: str,
    audio_root: Path | None,
    columns: tuple[str, ...],
    header: str | None,
    skip_bad: bool,
    normalise_characters: bool,
    official_splits: bool,
    microphone: Literal["head", "array", "both"],
    copy_audio: bool,
    seed: int,
) -> None:
    """Make a corpus from recordings with transcripts.

    SOURCE is a table, or a folder of one of three kinds.

    A table: CSV (comma, semicolon, tab or |), JSON Lines (as a NeMo manifest), JSON (an array of objects, pandas' or
    SpeechBrain's), each also compressed with gzip.

    --format audiofolder: Hugging Face's layout, with one metadata.csv or metadata.jsonl, or one for each split.

    --format sap: the unpacked Speech Accessibility Project. --format torgo: TORGO's folders.

    Every row with a fault is listed with its file and line, and nothing is written (exit code 65); --skip-bad writes
    the corpus without these rows, reports their number and exits with code 0. Unused columns, merged spellings and
    skipped folders are reported. OUT/provenance.json records what was omitted.

    \b
        moe-asr corpus import table.csv data/mine --audio-root /where/the/audio/is --column text=transcript
        moe-asr corpus import SAP data/sap --format sap
    """
    from common.data.importers.audiofolder import import_audiofolder
    from common.data.importers.sap import import_sap
    from common.data.importers.tables import import_table
    from common.data.importers.torgo import import_torgo

    kind = ("audiofolder" if source.is_dir() else "table") if kind == "auto" else kind
    _check_given(kind)
    shared: BuildOptions = {"copy_audio": copy_audio, "normalise_characters": normalise_characters, "seed": seed}
    mapping = _columns(columns)
    if kind == "sap":
        made = import_sap(source, out, official_splits=official_splits, **shared)
    elif kind == "torgo":
        made = import_torgo(source, out, microphone=microphone, **shared)
    elif kind == "audiofolder":
        made = import_audiofolder(source, out, columns=mapping, skip_bad=skip_bad, **shared)
    else:
        names = [name.strip() for name in header.split(",")] if header else []
        made = import_table(
            source, out, audio_root=audio_root, columns=mapping, header=names, skip_bad=skip_bad, **shared
        )
    _say_imported(out, made)


FORMAT_OPTIONS = {
    "table": ("--audio-root", "--column", "--header", "--skip-bad"),
    "audiofolder": ("--column", "--skip-bad"),
    "sap": ("--official-splits",),
    "torgo": ("--microphone",),
}


def _check_given(kind: str) -> None:
    """Refuses options of the running command that the format of the source has no use for."""
    context = click.get_current_context()
    for parameter in context.command.params:
        option, source = parameter.opts[0], context.get_parameter_source(parameter.name or "")
        users = [name for name, options in FORMAT_OPTIONS.items() if option in options]
        if users and kind not in users and source is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option} is not for --format {kind}, only for {' and '.join(users)}: leave it out")


def _columns(columns: tuple[str, ...]) -> dict[str, str] | None:
    wrong = [column for column in columns if "=" not in column]
    if wrong:
        raise UsageError(f"--column {wrong[0]}: write NAME=COLUMN, as in --column text=transcription")
    return dict(column.split("=", 1) for column in columns) or None


def _say_imported(out: Path, made: Imported) -> None:
    utterances = made.corpus.utterances
    speakers = len({u.speaker for u in utterances if u.speaker})
    splits = ", ".join(f"{split} {count}" for split, count in sorted(Counter(u.split for u in utterances).items()))
    hours = sum(u.duration for u in utterances) / 3600
    for fault in made.faults:
        echo(f"omitted: {fault}", err=True)
    for note in made.notes:
        echo(note)
    for reason, count in sorted(made.skipped.items()):
        echo(f"omitted: {count} {reason}")
    echo(f"{out}: {len(utterances)} utterances ({splits}), {hours:.2f} h, {speakers} speakers")
