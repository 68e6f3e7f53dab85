"""Transcripts as files: plain text, SubRip, WebVTT, JSON, and one table of all segments for correction."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from common.data.audio import SAMPLE_RATE
from common.data.importers.columns import UNTOUCHED
from common.inference.recordings import LoadedRecording
from common.inference.transcribe import Segment

EDGE = 0.2  # s of audio around a segment, as far as its neighbours leave it
FORMULA = "=+-@"  # how a formula begins in a spreadsheet: such a text gets a space in front

Facts = dict[str, Any]  # JSON values other than segments: file, seconds, model, language


def as_text(segments: Sequence[Segment], facts: Facts) -> str:
    """Plain text, one segment per line."""
    return "".join(f"{segment.text}\n" for segment in segments)


def as_srt(segments: Sequence[Segment], facts: Facts) -> str:
    """SubRip: number, times, text."""
    return "".join(
        f"{number}\n{clock(segment.start, ',')} --> {clock(segment.end, ',')}\n{segment.text}\n\n"
        for number, segment in enumerate(segments, start=1)
    )


def as_vtt(segments: Sequence[Segment], facts: Facts) -> str:
    """WebVTT: times and text."""
    cues = (
        f"{clock(segment.start, '.')} --> {clock(segment.end, '.')}\n{_escaped(segment.text)}\n\n"
        for segment in segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def as_json(segments: Sequence[Segment], facts: Facts) -> str:
    """JSON with all results: segments and words with times, the window's experts and probabilities."""
    rows = ",\n  ".join(json.dumps(_rounded(asdict(segment)), ensure_ascii=False) for segment in segments)  # one a line
    head = "".join(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)},\n" for name, value in facts.items())
    return f'{{\n{head} "segments": [\n  {rows}\n ]\n}}\n'


FORMATS: dict[str, Callable[[Sequence[Segment], Facts], str]] = {
    "txt": as_text,
    "srt": as_srt,
    "vtt": as_vtt,
    "json": as_json,
}


COLUMNS = ("audio_filepath", "offset", "end", "text", "speaker", "split", UNTOUCHED)


def table_rows(segments: Sequence[Segment], loaded: LoadedRecording, speaker: str) -> list[dict[str, str]]:
    """One row for each segment, in a form for `corpus import`: recording, stretch, text and speaker.

    The text is in two columns: in rows that were not corrected, both are equal.
    """
    seconds = len(loaded.samples) / SAMPLE_RATE
    path, rows = str(loaded.recording.path.resolve()), []
    for number, segment in enumerate(segments):
        before = segments[number - 1].end if number else 0.0
        after = segments[number + 1].start if number + 1 < len(segments) else seconds
        start, end = max(segment.start - EDGE, before, 0.0), min(segment.end + EDGE, after, seconds)
        text = f" {segment.text}" if segment.text[:1] in FORMULA else segment.text
        values = (path, f"{start:.3f}", f"{max(end, segment.end):.3f}", text, speaker, "train", text)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """A table with a header row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def clock(seconds: float, mark: str) -> str:
    """Hours, minutes, seconds and milliseconds: 00:01:02,345."""
    milliseconds = max(0, round(seconds * 1000))
    rest, thousandths = divmod(milliseconds, 1000)
    minutes, second = divmod(rest, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}{mark}{thousandths:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _rounded(value: Any) -> Any:
    """Times to milliseconds, probabilities and weights to four digits."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: round(v, 3) if name in ("start", "end") else _rounded(v) for name, v in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
