"""report.html of an evaluation: rates by group, worst utterances to listen to, hallucination loops."""

import base64
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from common.data.corpus import Corpus, Utterance
from common.data.features import describe_context
from common.decoding.decode import Decoding
from common.errors import MoeAsrError
from common.evaluation.breakdown import UNKNOWN, loops, named, write_table
from common.evaluation.evaluate import PAGE, RESULT, ROWS, TABLE, choose_utterances, decode_corpus, describe_evaluation
from common.files import new_folder
from common.inference.load_model import OpenedModel
from common.json_files import Row, write_object, write_rows
from common.report.error_rates import TABLE_ROWS, axis_end, caution, worst_section
from common.report.page import clock, percent, render_page
from common.whisper_limits import is_too_long

EMBED_BYTES = 8_000_000  # of audio in one page, where the corpus has no files to point at
TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".m4a": "audio/mp4"}
GROUPINGS = ("etiology", "severity", "duration", "speaker")


def render_evaluation(result: Row, rows: Sequence[Row], corpus: Corpus, out: Path) -> str:
    """The page as one HTML string.

    Args:
        result: evaluation.json's object.
        rows: rows of the utterances (`breakdown.scored_row`).
        corpus: the corpus with their audio.
        out: the folder of the page; audio files are linked by paths relative to it, other audio is embedded up to a
            limit.
    """
    worst, looping = worst_section(rows), [dict(row) for row in loops(rows)]
    listed = [*worst["lines"], *looping]
    sources = audio_sources([str(row["id"]) for row in listed], corpus, out)
    for row in listed:
        row["source"] = sources.get(str(row["id"]))
    known = {row["speaker"] for row in rows if row["speaker"]}
    return render_page(
        "evaluation.html",
        result=result,
        about=_about(result),
        speakers=len(known) or None,
        caution=caution(result["overall"]["speakers"], bool(known), "evaluated"),
        load=", ".join(percent(share, 0) for share in result["load"] or ()),
        tables=_tables(result),
        matrix=_matrix(result["cells"]),
        worst=worst,
        loops=looping,
        loop_insertions=sum(row["insertions"] for row in looping),
        facts=_facts(result),
        linked=any(not source.startswith("data:") for source in sources.values()),
    )


def audio_sources(ids: Sequence[str], corpus: Corpus, out: Path) -> dict[str, str]:
    """id → address of its audio, for a page in the folder `out`; without audio that a page cannot play."""
    by_id = {u.id: u for u in corpus.utterances}
    room = EMBED_BYTES
    sources: dict[str, str] = {}
    for name in dict.fromkeys(ids):
        u = by_id[name]
        part = f"#t={u.offset:.3f},{u.offset + u.duration:.3f}"  # the file may be longer
        if corpus.clip(u) is None:
            path = os.path.relpath(corpus.path(u), out.resolve())
            sources[name] = quote(Path(path).as_posix()) + part
        elif embedded := _embedded(u, corpus, room):
            room -= len(embedded)
            sources[name] = embedded + part
    return sources


def _embedded(u: Utterance, corpus: Corpus, room: int) -> str | None:
    """The audio as a data address; None where it does not fit into `room`, or cannot be read again."""
    try:
        data = corpus.audio(u)
    except MoeAsrError:
        return None
    kind = TYPES.get(Path(u.audio_filepath).suffix.lower())
    if kind is None or len(data) * 4 / 3 > room:
        return None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _about(result: Row) -> list[str]:
    made = datetime.fromtimestamp(result["made"], UTC)
    split = "all splits" if result["split"] == "all" else f"split {result['split']}"
    return [f"{made:%d %B %Y, %H:%M} UTC", f"corpus {result['corpus']}", split]


def _tables(result: Row) -> list[Row]:
    """One table for each informative grouping: worst group first, durations in order."""
    tables = []
    for name in GROUPINGS:
        groups: Mapping[str, Row] = result[f"by_{name}"]
        if not named(groups):
            continue
        lines: list[Row] = [{"name": group} | rates for group, rates in groups.items()]
        if name != "duration":
            lines.sort(key=lambda line: (-line["wer"], line["name"]))
        shown = lines[:TABLE_ROWS]
        ends = [end for line in shown for end in (line["wer"], *(line["ci"] if line["speakers"] > 1 else ()))]
        caption = f"Error rates by {name}{'' if name == 'duration' else ', worst first'}."
        tables.append(
            {
                "title": name.capitalize(),
                "lines": shown,
                "top": axis_end(ends),
                "caption": caption,
                "cut": len(lines) - len(shown),
            }
        )
    return tables


def _matrix(cells: Sequence[Row]) -> Row | None:
    """WER by etiology and severity (rows) and duration (columns); None if the corpus has neither etiologies nor
    severities.
    """
    wanted = [name for name in ("etiology", "severity") if any(cell[name] != UNKNOWN for cell in cells)]
    if not wanted:
        return None
    columns = sorted({cell["duration"] for cell in cells})
    lines: dict[str, dict[str, Row]] = {}
    for cell in cells:
        lines.setdefault(", ".join(cell[name] for name in wanted), {})[cell["duration"]] = cell
    shown = [(name, [row.get(column) for column in columns]) for name, row in list(lines.items())[:TABLE_ROWS]]
    title = " × ".join([*wanted, "duration"]).capitalize()
    corner = ", ".join(wanted).capitalize()
    return {"title": title, "corner": corner, "columns": columns, "lines": shown, "cut": len(lines) - len(shown)}


def _facts(result: Row) -> list[tuple[str, str]]:
    decoding, mixture = result["decoding"], result["mixture"]
    how = "greedy" if decoding["num_beams"] == 1 else f"beam search, {decoding['num_beams']} hypotheses"
    if len(decoding["temperatures"]) > 1:
        how += f", temperatures {', '.join(f'{t:g}' for t in decoding['temperatures'])}"
    facts = [
        ("Model", result["model"]),
        ("Base", result["base"]),
        ("Corpus", f"{result['corpus']} (sha256 {result['corpus_digest'][:12]}…)"),
        ("Decoding", f"{how}, at most {decoding['max_new_tokens']} tokens"),
        ("Language", result["language"]),
        ("Audio context", describe_context(result["context"], result["margin"])),
        ("Precision", f"{result['precision'].replace('no', 'fp32')} on {result['device']}"),
        ("Time", clock(result["seconds"])),
    ]
    if mixture and mixture["experts"] > 1:
        facts.append(("Mixture", f"{mixture['kind']}, top {mixture['top_k']} of {mixture['experts']}"))
    return facts


def evaluate_to_folder(
    opened: OpenedModel,
    corpus: Corpus,
    decoding: Decoding,
    out: Path,
    *,
    split: str = "test",
    long_audio: str = "error",
    samples: int | None = None,
    overwrite: bool = False,
    num_workers: int = 0,
    quiet: bool = True,
) -> Row:
    """Evaluates a model and writes evaluation.json, its utterances and report.html into the folder `out`, all or none.

    Args:
        long_audio: `error`, `drop` utterances over 30 s (their number is in the result), or transcribe them in
            `windows`.
        samples: size of a stratified part of the split, the same for every model.
        overwrite: replace an existing evaluation.

    Returns:
        The object of evaluation.json.

    Raises:
        UsageError: `out` exists and may not be replaced.
        DataError: as in `choose_utterances` and `decode_corpus`.
    """
    with new_folder(out, overwrite=overwrite, mark=RESULT) as folder:
        utterances = choose_utterances(corpus, split, long_audio=long_audio, samples=samples)
        everything = corpus.utterances if split == "all" else corpus.split(split)
        left_out = sum(is_too_long(u.duration) for u in everything) if long_audio == "drop" else 0
        started = time.monotonic()
        windows = long_audio == "windows"
        rows = decode_corpus(
            opened, corpus, utterances, decoding, windows=windows, num_workers=num_workers, quiet=quiet
        )
        seconds = time.monotonic() - started
        result = describe_evaluation(
            opened, corpus, rows, decoding, split=split, left_out=left_out, seconds=round(seconds, 2)
        )
        write_object(folder / RESULT, result)
        write_rows(folder / ROWS, rows)
        write_table(folder / TABLE, rows)
        (folder / PAGE).write_text(render_evaluation(result, rows, corpus, out), encoding="utf-8")
    return result
