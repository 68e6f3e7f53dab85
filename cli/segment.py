"""`moe-asr corpus segment`: a corpus whose long utterances are cut at pauses, their text divided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.corpus import opened
from cli.shared import base_option, device_option, endpoint_option, language_option
from common.console import echo
from common.data.corpus import INDEX_NAME, index_lines
from common.errors import UsageError

if TYPE_CHECKING:
    from common.data.corpus import Corpus

DEFAULT_NAME = "segmented.jsonl"


@click.command()
@click.argument("source")
@click.argument("dest", required=False)
@click.option(
    "--model", "model_name", required=True, help="Whisper model that locates the words: folder, run or hub name."
)
@click.option("--store", "store_url", default="runs", show_default=True, help="Store in which runs are looked up.")
@base_option
@language_option
@device_option
@click.option("--overwrite", is_flag=True, help="Replace an existing index.")
@endpoint_option
def segment(
    source: str,
    dest: str | None,
    model_name: str,
    store_url: str,
    base: str | None,
    language: str | None,
    device: str,
    overwrite: bool,
    endpoint_url: str | None,
) -> None:
    """Cut utterances over 30 s (or 448 tokens) at pauses, and divide their text by aligning it with the audio.

    Writes an index that refers to stretches of the same audio files, to SOURCE/segmented.jsonl or to DEST: use it as a
    corpus (--corpus SOURCE/segmented.jsonl). After an interruption, run the same command again to continue.

    \b
        moe-asr corpus segment data/long --model openai/whisper-small
    """
    from common.data.sources import folder_digest
    from common.inference.load_model import open_model
    from common.inference.long_audio import long_utterances, segment_long, summary, table_key, with_pieces
    from common.storage import open_store
    from stages.local_runner import cache_folder

    corpus = opened(source, endpoint_url)
    place, name = destination(source, dest)
    target = open_store(place, endpoint_url=endpoint_url)
    if target.size(name) is not None and not overwrite:
        raise UsageError(f"{place}/{name} already exists: --overwrite replaces it, DEST names another")
    if elsewhere := not same_place(place, folder_of(source)):
        check_movable(corpus, place)
    model = open_model(
        model_name,
        store=open_store(store_url, endpoint_url=endpoint_url),
        cache=cache_folder(),
        base=base,
        device=device,
        language=language,
        endpoint_url=endpoint_url,
    )
    too_long = long_utterances(corpus.utterances, lambda: model.codec.length)
    settings = [model_name, model.language, model.context, model.margin]
    unfinished = cache_folder() / "segmented" / f"{table_key(corpus, folder_digest(model.base), settings)}.jsonl"
    rows = segment_long(model, corpus, too_long, unfinished)
    made = with_pieces(corpus, too_long, rows) if too_long else corpus
    utterances = made.utterances
    if elsewhere:
        utterances = tuple(replace(u, audio_filepath=str(corpus.path(u).resolve())) for u in utterances)
    target.write(name, "".join(index_lines(utterances, made.places)).encode())
    unfinished.unlink(missing_ok=True)
    count = f"{len(too_long)} of {len(corpus.utterances)} utterances were too long"
    echo(f"{count}; {summary(too_long, rows)}" if too_long else f"{count}: the index is a copy")
    echo(f"{place}/{name}: {len(utterances)} utterances")


def folder_of(source: str) -> str:
    """The folder that a corpus's audio paths start from."""
    path = source.rstrip("/")
    if path.endswith((".json", ".jsonl")):
        path = path.rpartition("/")[0] or "."
    return path


def destination(source: str, dest: str | None) -> tuple[str, str]:
    """(folder, name) of the index to write.

    Raises:
        UsageError: it would be the corpus's own.
    """
    place, name = folder_of(source), DEFAULT_NAME
    if dest is not None:
        place, name = folder_of(dest), dest.rpartition("/")[2] if dest.endswith((".json", ".jsonl")) else INDEX_NAME
    own = source.rpartition("/")[2] if source.endswith((".json", ".jsonl")) else INDEX_NAME
    if name == own and same_place(place, folder_of(source)):
        raise UsageError(f"{place}/{name} is the corpus's own index: name another file")
    return place, name


def same_place(a: str, b: str) -> bool:
    """Whether two spellings name one folder."""
    return a == b or ("://" not in a + b and Path(a).resolve() == Path(b).resolve())


def check_movable(corpus: Corpus, place: str) -> None:
    """Refuses an index that could not find the corpus's audio.

    Raises:
        UsageError: the audio is in a store or packed.
    """
    if corpus.remote or corpus.places or place.startswith("s3://"):
        raise UsageError(
            f"{place}: an index of audio in a store or in shards must be in the corpus's own folder; leave DEST out to "
            f"write it there as {DEFAULT_NAME}"
        )
