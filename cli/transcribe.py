"""`moe-asr transcribe`: audio files of any length as text, subtitles or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.shared import Opening, added_options, decoding_config, open_as_told, with_opening, with_options, with_store
from common.errors import DataError, UsageError
from common.escape import escaped

if TYPE_CHECKING:
    from common.decoding.decode import Decoding
    from common.inference.load_model import OpenedModel
    from common.inference.recordings import LoadedRecording, Recording
    from common.inference.transcribe import WindowTranscript

SUFFIXES = ("txt", "srt", "vtt", "json")
TABLE, CORRECTABLE = "csv", "transcripts.csv"  # of all recordings together
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # Whisper's own
GROUP_SECONDS = 1800  # of audio that is held in memory at once; a longer file is held whole


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="A run's name; a folder or store address with a trained model, a PEFT "
              "adapter or a Whisper checkpoint; or a hub name.")  # fmt: skip
@click.option(
    "--format",
    "kind",
    type=click.Choice([*SUFFIXES, TABLE, "all"]),
    default="txt",
    show_default=True,
    help="Output format. csv is one table of all recordings, to be corrected and imported by `corpus import`.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for one file per recording. Printed by default.")
@click.option("--overwrite", is_flag=True, help="Replace files that are already in --out.")
@with_store
@click.option("--num-beams", type=click.IntRange(1, 64), help="Number of beams. 1 decodes greedily.")
@click.option(
    "--window",
    type=click.FloatRange(5, 30),
    help="Longest stretch that is decoded at once, in seconds. By default the length of training utterances.",
)
@click.option(
    "--fall-back/--no-fall-back",
    default=True,
    show_default=True,
    help="Decode again at higher temperatures, as Whisper does, if the text is a loop or has a low log-probability.",
)
@click.option(
    "--loops",
    type=click.Choice(("cut", "keep", "drop")),
    default="cut",
    show_default=True,
    help="Treatment of hallucination loops that remain: cut to one repetition, keep, or drop the window's text. JSON "
    "output marks them.",
)
@click.option(
    "--no-speech",
    type=click.FloatRange(0, 1),
    help="Drop the text of windows with a mean log-probability below -1 and at least this probability of no speech; "
    "Whisper uses 0.6. By default no window is dropped, since atypical speech may be classified as silence.",
)
@with_options(added_options)
@click.option(
    "--enrol",
    type=click.Path(path_type=Path),
    help="Choose experts by a few utterances with text: a corpus, or recordings, each with a .txt of the same name.",
)
@with_opening
def transcribe(
    files: Sequence[Path],
    model: str,
    kind: str,
    out: Path | None,
    overwrite: bool,
    store_url: str,
    endpoint_url: str | None,
    num_beams: int | None,
    window: float | None,
    fall_back: bool,
    loops: str,
    no_speech: float | None,
    speaker: str | None,
    expert: str | None,
    enrol: Path | None,
    opening: Opening,
) -> None:
    """Transcribe recordings of any length and format, with any sample rate and number of channels.

    FILE is an audio or video file, a folder of them, a pipe, or `-` for standard input. Files that cannot be read are
    listed at the end (exit code 65), and the others are transcribed. Text is decoded with the settings of the run that
    trained the model, or with the defaults if there is none.

    \b
        moe-asr transcribe talk.mp3 --model mine
        moe-asr transcribe recordings --model mine --format all --out transcripts
        curl -s https://example.org/talk.mp3 | moe-asr transcribe - --model mine
    """
    from common.inference.added_experts import with_added
    from common.inference.choose_experts import warn_without_group
    from common.inference.recordings import STDIN, find_recordings, load_groups
    from common.inference.subtitles import table_rows
    from common.inference.transcribe import segments_of, transcribe_audio
    from common.progress import progress
    from common.storage import open_store
    from stages.settings import decoding_options

    kinds = SUFFIXES if kind == "all" else (kind,)
    recordings = find_recordings(files)
    check_outputs(recordings, kinds, out, overwrite)
    if kind == TABLE and any(recording.path == STDIN for recording in recordings):
        raise UsageError("--format csv refers to recordings by their paths: standard input has none")
    if enrol is not None and (speaker or expert):
        raise UsageError("--enrol chooses experts: omit --speaker and --expert")
    faults: dict[str, str] = {}
    readable = check_inputs(recordings, faults)
    store = open_store(store_url, endpoint_url=endpoint_url)
    beams = [f"decode.num_beams={num_beams}"] if num_beams else []
    config = decoding_config(model, store, opening, *beams)
    set_by_user = any(text.startswith("decode.temperatures=") for text in opening.settings)
    decoding = decoding_of(decoding_options(config), fall_back=fall_back and not set_by_user, no_speech=no_speech)
    opened = open_as_told(model, store, config, opening, endpoint_url=endpoint_url)
    opened = with_added(opened, speaker=speaker, expert=expert)
    if enrol is not None:
        from stages.extend.choose import chosen_by

        opened = chosen_by(opened, enrol)
    warn_without_group(opened)
    table: list[dict[str, str]] = []
    bar = progress(round(total_seconds(readable), 1), "transcribe", unit="s", hidden=config.runtime.quiet)
    written = 0
    for group in load_groups(readable, faults, GROUP_SECONDS):
        audios = [loaded.samples for loaded in group]
        for loaded, windows in zip(
            group, transcribe_audio(opened, audios, decoding, bar.update, longest=window), strict=True
        ):
            kept = loaded.treated(windows, loops, no_speech, opened.language)
            if kind == TABLE:
                table += table_rows(segments_of(kept, opened.language), loaded, speaker or "")
                continue
            written += write(opened, loaded, kept, kinds, out, titled=len(recordings) > 1)
    bar.close()
    if kind == TABLE:
        write_correctable(table, out)
    elif out is not None:
        say(f"{out}: {written} files written, of {len(recordings) - len(faults)} recordings")
    fail(faults, len(recordings))


def check_outputs(recordings: Sequence[Recording], kinds: Sequence[str], out: Path | None, overwrite: bool) -> None:
    """Refuses, before anything is done, what would be overwritten.

    Raises:
        UsageError: several formats without a folder, two recordings of one name, or a file that is there.
    """
    if out is None:
        if len(kinds) > 1:
            raise UsageError("--format all writes several files: name their folder with --out")
        return
    if kinds == (TABLE,):
        if (out / CORRECTABLE).exists() and not overwrite:
            raise UsageError(f"{out / CORRECTABLE} already exists; --overwrite replaces it, another --out keeps it")
        return
    first_of: dict[Path, Recording] = {}
    for recording in recordings:
        if (first := first_of.setdefault(recording.stem, recording)) is not recording:
            target = out / f"{recording.stem}.{kinds[0]}"
            raise UsageError(f"{first.name} and {recording.name} would both become {target}: rename one of them")
    there = [path for stem in first_of for kind in kinds if (path := out / f"{stem}.{kind}").exists()]
    if there and not overwrite:
        exist = f"and {len(there) - 1} more already exist" if len(there) > 1 else "already exists"
        raise UsageError(f"{there[0]} {exist}; --overwrite replaces them, another --out keeps them")


def check_inputs(recordings: Sequence[Recording], faults: dict[str, str]) -> list[Recording]:
    """The recordings that can be opened, found out before a model is loaded; of the others, why not.

    Raises:
        DataError: none can.
    """
    from common.inference.recordings import check_recording

    readable = []
    for recording in recordings:
        try:
            check_recording(recording)
            readable.append(recording)
        except DataError as error:
            faults[recording.name] = str(error)
    if not readable:
        fail(faults, len(recordings))
    if faults:
        say(f"{len(faults)} of {len(recordings)} recordings cannot be opened (listed at the end)")
    return readable


def fail(faults: dict[str, str], total: int) -> None:
    """Lists what could not be transcribed.

    Raises:
        DataError: there is some.
    """
    if len(faults) == total == 1:
        raise DataError(*faults.values())
    for reason in faults.values():
        say(reason)
    if faults:
        raise DataError(f"{len(faults)} of {total} recordings could not be transcribed: see above")


def decoding_of(decoding: Decoding, *, fall_back: bool, no_speech: float | None) -> Decoding:
    """The decoding of a run, with Whisper's fallback where there is none, and asked whether somebody speaks."""
    temperatures = decoding.temperatures
    if fall_back and len(temperatures) == 1:
        temperatures = (*temperatures, *(t for t in TEMPERATURES if t > temperatures[0]))
    threshold = 1.0 if no_speech is None else no_speech  # no probability is above 1
    return replace(decoding, temperatures=temperatures, no_speech_threshold=threshold)


def total_seconds(recordings: Sequence[Recording]) -> float:
    """For the progress bar: by headers alone, 0 of what has none."""
    from common.data.headers import guess_seconds

    return sum(guess_seconds(recording.path) for recording in recordings)


def say(line: str, *, on_stdout: bool = False) -> None:
    """Writes around a running progress bar; what a terminal would obey, or its encoding lacks, is escaped."""
    import sys

    from tqdm import tqdm

    stream = sys.stdout if on_stdout else sys.stderr
    encoding = stream.encoding or "utf-8"
    shown = escaped(line).encode(encoding, "backslashreplace").decode(encoding)
    tqdm.write(shown, file=stream, end="" if on_stdout else "\n")


def write_correctable(table: Sequence[dict[str, str]], out: Path | None) -> None:
    """Prints the table of all recordings, or writes it into a folder as transcripts.csv."""
    from common.files import explained, new_file
    from common.inference.subtitles import as_csv

    if out is None:
        say(as_csv(table), on_stdout=True)
        return
    target = out / CORRECTABLE
    with explained(target), new_file(target) as temporary:
        temporary.write_text(as_csv(table), encoding="utf-8-sig")  # with the mark by which spreadsheets know UTF-8
    say(f"{target}: {len(table)} rows to be corrected; then: moe-asr corpus import {target} CORPUS")


def write(
    opened: OpenedModel,
    loaded: LoadedRecording,
    windows: Sequence[WindowTranscript],
    kinds: Sequence[str],
    out: Path | None,
    *,
    titled: bool,
) -> int:
    """Prints one recording's transcript, or writes it in every format that is asked for; returns the files."""
    from common.data.audio import SAMPLE_RATE
    from common.data.features import describe_context
    from common.files import explained, new_file
    from common.inference.subtitles import FORMATS
    from common.inference.transcribe import segments_of

    name = loaded.recording.name
    segments = segments_of(windows, opened.language)
    if not segments:
        loaded.notes.append("no speech was found")
    for note in loaded.notes:
        say(f"{name}: {note.removeprefix(f'{name} ')}")
    seconds = round(len(loaded.samples) / SAMPLE_RATE, 3)
    facts = {"file": name, "seconds": seconds, "model": opened.name, "language": opened.language,
             "audio_context": describe_context(opened.context, opened.margin), "notes": loaded.notes}  # fmt: skip
    for kind in kinds:
        text = FORMATS[kind](segments, facts)
        if out is None:
            say((f"==> {name} <==\n" if titled and kind != "json" else "") + text, on_stdout=True)
            continue
        target = out / f"{loaded.recording.stem}.{kind}"
        with explained(target), new_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0 if out is None else len(kinds)
