"""Commands for corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.table import text_table
from common.errors import DataError

if TYPE_CHECKING:
    from common.corpus import Corpus


@click.group()
def corpus() -> None:
    """Corpora: make, import, check."""


@corpus.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--speakers", default=6, show_default=True, help="Speakers per stand-in etiology.")
@click.option("--utterances", default=10, show_default=True, help="Utterances per speaker.")
@click.option("--seed", default=42, show_default=True)
@click.option("--etiology", "etiologies", multiple=True, help="Only these stand-in etiologies.")
def synth(out: Path, speakers: int, utterances: int, seed: int, etiologies: tuple[str, ...]) -> None:
    """Speaks a corpus with espeak-ng: voices, rates and effects as stand-ins for etiologies."""
    from common.synth import synthesize

    made = synthesize(
        out,
        speakers_per_etiology=speakers,
        utterances_per_speaker=utterances,
        seed=seed,
        etiologies=etiologies or None,
    )
    hours = sum(u.duration for u in made.utterances) / 3600
    click.echo(f"{out}: {len(made.utterances)} utterances, {hours:.2f} h")


def opened(path: str, endpoint_url: str | None) -> Corpus:
    """A corpus in a folder or a store, with the cache of `moe-asr run`."""
    from common.config import RuntimeConfig
    from common.sources import open_corpus
    from stages.pipeline import cache_folder

    return open_corpus(path, cache_folder(), endpoint_url=endpoint_url, cache_bytes=RuntimeConfig().audio_cache_bytes)


endpoint_option = click.option("--endpoint-url", help="Of an S3-compatible store.")


@corpus.command()
@click.argument("source")
@click.argument("dest")
@click.option("--shard-size", default="256MB", show_default=True, help="Bytes per tar shard at most.")
@endpoint_option
def pack(source: str, dest: str, shard_size: str, endpoint_url: str | None) -> None:
    """Packs a corpus into tar shards, from and to folders or s3:// addresses: loaders then read only their ranges."""
    from tqdm import tqdm

    from common.shards import pack_corpus, parse_size
    from common.store import open_store
    from stages.pipeline import cache_folder

    size = parse_size(shard_size)
    data = opened(source, endpoint_url)
    cache_folder().mkdir(parents=True, exist_ok=True)
    files = len({u.audio_filepath for u in data.utterances})
    with tqdm(total=files, desc="pack", unit="file", disable=None) as bar:
        store = open_store(dest, endpoint_url=endpoint_url)
        made = pack_corpus(data, store, shard_bytes=size, scratch=cache_folder(), progress=bar.update)
    known = made.shards - made.stored
    click.echo(
        f"{dest}: {made.files} audio files in {made.shards} shards, {made.size / 1e6:,.1f} MB"
        + (f" ({known} shards were there already)" if known else "")
    )


@corpus.command()
@click.argument("path")
@click.option("--model", help="Also the WER of this base model, by etiology.")
@endpoint_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(path: str, model: str | None, endpoint_url: str | None, as_json: bool) -> None:
    """Counts utterances, hours and speakers; with --model also the base model's WER by etiology."""
    from common.corpus import corpus_stats

    data = opened(path, endpoint_url)
    figures = corpus_stats(data)
    if model is not None:
        from cli.base_wer import base_wer

        figures["wer"] = base_wer(data, model)
    if as_json:
        click.echo(json.dumps(figures, indent=1))
        return
    for name, values in figures.items():
        if isinstance(values, dict) and values and all(isinstance(v, dict) for v in values.values()):
            columns = list(next(iter(values.values())))
            rows = [(key, *(_cell(row.get(c)) for c in columns)) for key, row in values.items()]
            click.echo(f"\n{text_table((name, *columns), rows)}")
        else:
            click.echo(f"{name}: {_cell(values)}")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@corpus.command()
@click.argument("path")
@click.option("--model", help="Tokenizer to count tokens with: a checkpoint folder.")
@endpoint_option
def audit(path: str, model: str | None, endpoint_url: str | None) -> None:
    """Finds what would go wrong in training: unreadable audio, missing text, speakers in two splits, …"""
    from common.audit import audit as audit_corpus

    counter = None
    if model is not None:
        from common.whisper import load_codec

        counter = load_codec(Path(model)).length
    findings = audit_corpus(opened(path, endpoint_url), token_count=counter)
    for finding in findings:
        click.echo(f"{finding.severity}: {finding.utterance_id}: {finding.kind}: {finding.detail}")
    errors = sum(finding.severity == "error" for finding in findings)
    click.echo(f"{errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise DataError(f"corpus {path} has {errors} errors")


@corpus.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--audio-root", type=click.Path(path_type=Path), help="Where relative audio paths start.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="Which column is text, speaker, …")
@click.option("--seed", default=42, show_default=True, help="Of the split by speaker.")
def import_corpus(source: Path, out: Path, audio_root: Path | None, columns: tuple[str, ...], seed: int) -> None:
    """Makes a corpus from a CSV or JSON Lines table with audio paths, or from an audiofolder."""
    from common.importers import import_audiofolder, import_table

    mapping = dict(column.split("=", 1) for column in columns if "=" in column)
    if source.is_dir():
        made = import_audiofolder(source, out)
    else:
        made = import_table(source, out, audio_root=audio_root, columns=mapping or None, seed=seed)
    click.echo(f"{out}: {len(made.utterances)} utterances")
