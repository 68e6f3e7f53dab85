"""`moe-asr transcribe`: audio files of any length as text, subtitles or JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.shared import decoding_config, open_as_told, opening_options, with_options, with_store
from common.errors import DataError, UsageError

if TYPE_CHECKING:
    from common.data.audio import Samples
    from common.inference.load_model import OpenedModel
    from common.inference.transcribe import HeardWindow

SUFFIXES = ("txt", "srt", "vtt", "json")
FALL_BACK = "[0, 0.2, 0.4, 0.6, 0.8, 1]"  # Whisper's own temperatures
GROUP_SECONDS = 1800  # of audio that is held in memory at once; a longer file is held whole


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A run, a folder with a model, or a hub name.")
@click.option(
    "--format", "kind", type=click.Choice([*SUFFIXES, "all"]), default="txt", show_default=True, help="Of text."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for one file per recording; without: printed.")
@click.option("--overwrite", is_flag=True, help="Replace files that are already in --out.")
@with_store
@click.option("--num-beams", type=click.IntRange(1, 64), help="Hypotheses of beam search; 1 is greedy.")
@click.option(
    "--window", type=click.FloatRange(5, 30), help="Seconds heard at once; by default as long as what was trained on."
)
@click.option("--fall-back", is_flag=True, help="Decode loops and guesses again at higher temperatures.")
@with_options(opening_options)
def transcribe(
    files: Sequence[Path],
    model: str,
    kind: str,
    out: Path | None,
    overwrite: bool,
    base: str | None,
    store_url: str,
    endpoint_url: str | None,
    language: str,
    task: str,
    num_beams: int | None,
    window: float | None,
    fall_back: bool,
    settings: Sequence[str],
    device: str,
    quiet: bool,
) -> None:
    """Transcribes recordings of any length and format, mono or not, at any sample rate.

    Text is decoded as `moe-asr evaluate` decodes it: as the run did whose model it is, else by the defaults.

    \b
        moe-asr transcribe talk.mp3 --model mine
        moe-asr transcribe *.wav --model mine --format all --out transcripts
    """
    from common.inference.transcribe import transcribe_audio
    from common.progress import progress
    from common.storage import open_store
    from stages.settings import decoding_options

    kinds = SUFFIXES if kind == "all" else (kind,)
    check_outputs(files, kinds, out, overwrite)
    store = open_store(store_url, endpoint_url=endpoint_url)
    beams = [f"decode.num_beams={num_beams}"] if num_beams else []
    config = decoding_config(
        model, store, [*settings, *beams, *([f"decode.temperatures={FALL_BACK}"] if fall_back else [])]
    )
    opened = open_as_told(
        model,
        store,
        config,
        settings,
        base=base,
        language=language,
        task=task,
        device=device,
        endpoint_url=endpoint_url,
    )
    failed: list[Path] = []
    bar = progress(round(total_seconds(files), 1), "transcribe", unit="s", hidden=quiet)
    for group in groups(files, failed.append):
        audios = [samples for _, samples in group]
        heard = transcribe_audio(opened, audios, decoding_options(config), bar.update, longest=window)
        for (file, samples), windows in zip(group, heard, strict=True):
            write(opened, file, len(samples), windows, kinds, out, titled=len(files) > 1)
    bar.close()
    if failed:
        raise DataError(f"{len(failed)} of {len(files)} files could not be transcribed: see above")


def check_outputs(files: Sequence[Path], kinds: Sequence[str], out: Path | None, overwrite: bool) -> None:
    """Refuses, before anything is done, what would be overwritten.

    Raises:
        UsageError: several formats without a folder, two files of one name, or a file that is there.
    """
    if out is None:
        if len(kinds) > 1:
            raise UsageError("--format all writes several files: name their folder with --out")
        return
    first_of: dict[str, Path] = {}
    for file in files:
        if (first := first_of.setdefault(file.stem, file)) is not file:
            raise UsageError(f"{first} and {file} would both become {out / file.stem}.{kinds[0]}: rename one of them")
    there = [path for stem in first_of for kind in kinds if (path := out / f"{stem}.{kind}").exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UsageError(f"{there[0]}{more}: already there; --overwrite replaces, another --out keeps them")


def total_seconds(files: Sequence[Path]) -> float:
    """Of the files that can be read; the others are named when their turn comes."""
    from common.data.audio import audio_info

    total = 0.0
    for file in files:
        with suppress(DataError):
            total += audio_info(file).duration
    return total


def groups(files: Sequence[Path], failed: Callable[[Path], object]) -> Iterator[list[tuple[Path, Samples]]]:
    """The files' audio, so many at a time that their windows fill batches; what cannot be read is said."""
    from common.data.audio import SAMPLE_RATE, read_audio

    group: list[tuple[Path, Samples]] = []
    for file in files:
        try:
            group.append((file, read_audio(file)))
        except DataError as error:
            say(f"error: {error}")
            failed(file)
        if sum(len(samples) for _, samples in group) >= GROUP_SECONDS * SAMPLE_RATE:
            yield group
            group = []
    if group:
        yield group


def say(line: str, *, on_stdout: bool = False) -> None:
    """Writes around a running progress bar."""
    import sys

    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout if on_stdout else sys.stderr, end="" if on_stdout else "\n")


def write(
    opened: OpenedModel,
    file: Path,
    samples: int,
    windows: Sequence[HeardWindow],
    kinds: Sequence[str],
    out: Path | None,
    *,
    titled: bool,
) -> None:
    """Prints one recording's transcript, or writes it in every format that is asked for."""
    from common.data.audio import SAMPLE_RATE
    from common.files import explained, new_file
    from common.inference.subtitles import FORMATS
    from common.inference.transcribe import segments_of

    segments = segments_of(windows, opened.language)
    if not segments:
        say(f"{file}: no speech was heard")
    seconds = round(samples / SAMPLE_RATE, 3)
    facts = {"file": os.fspath(file), "seconds": seconds, "model": opened.name, "language": opened.language}
    for kind in kinds:
        text = FORMATS[kind](segments, facts)
        if out is None:
            say((f"==> {file} <==\n" if titled and kind != "json" else "") + text, on_stdout=True)
            continue
        target = out / f"{file.stem}.{kind}"
        with explained(target), new_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
