"""Transcripts as files: plain text, SubRip, WebVTT, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from common.inference.transcribe import Segment

Facts = dict[str, Any]  # what JSON says beside the segments: file, seconds, model, language


def as_text(segments: Sequence[Segment], facts: Facts) -> str:
    """One segment a line."""
    return "".join(f"{segment.text}\n" for segment in segments)


def as_srt(segments: Sequence[Segment], facts: Facts) -> str:
    """SubRip: number, times, text."""
    return "".join(
        f"{number}\n{clock(one.start, ',')} --> {clock(one.end, ',')}\n{one.text}\n\n"
        for number, one in enumerate(segments, start=1)
    )


def as_vtt(segments: Sequence[Segment], facts: Facts) -> str:
    """WebVTT, the web's own."""
    cues = (f"{clock(one.start, '.')} --> {clock(one.end, '.')}\n{_escaped(one.text)}\n\n" for one in segments)
    return "WEBVTT\n\n" + "".join(cues)


def as_json(segments: Sequence[Segment], facts: Facts) -> str:
    """All that is known: segments and words with times, the window's experts and how sure the model was."""
    rows = ",\n  ".join(json.dumps(_rounded(asdict(one)), ensure_ascii=False) for one in segments)  # one a line
    head = "".join(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)},\n" for name, value in facts.items())
    return f'{{\n{head} "segments": [\n  {rows}\n ]\n}}\n'


FORMATS: dict[str, Callable[[Sequence[Segment], Facts], str]] = {
    "txt": as_text,
    "srt": as_srt,
    "vtt": as_vtt,
    "json": as_json,
}


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
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
