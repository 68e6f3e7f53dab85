"""Finds the columns of a table that correspond to the fields of an utterance."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.data.importers.splits import SPLIT_NAMES
from common.data.importers.values import as_text, seconds
from common.errors import DataError, UsageError

# Names by field, the first one present being taken. Case, spaces, hyphens and underscores do not count.
KNOWN_COLUMNS = {
    "audio_filepath": (
        *("audio_filepath", "audio", "file_name", "file", "path", "wav", "filename", "audio_path", "audio_file"),
        *("file_path", "wav_filename", "wav_path", "wav_file", "clip", "sound"),
    ),
    "text": (
        *("text", "transcription", "transcript", "sentence", "wrd", "words", "txt", "tgt_text", "normalized_text"),
        *("orthography", "reference"),
    ),
    "text_alt": ("text_alt",),
    "id": ("id", "utterance_id", "utt_id", "utt", "uttid", "segment_id", "key"),
    "split": ("split", "subset", "partition", "set"),
    "speaker": (
        *("speaker", "speaker_id", "client_id", "spk", "spk_id", "spkr", "speaker_name", "participant"),
        *("participant_id", "subject", "subject_id", "contributor", "contributor_id", "talker", "talker_id"),
        *("patient", "patient_id", "person", "person_id", "user_id", "reader_id"),
    ),
    "etiology": ("etiology", "aetiology", "diagnosis", "disorder", "disease", "pathology", "impairment"),
    "severity": ("severity", "severity_level", "dysarthria_severity"),
    "offset": ("offset", "start", "begin", "start_time", "begin_time", "time_start", "segment_start", "onset"),
    "end": ("end", "stop", "end_time", "stop_time", "time_end", "segment_end"),
    "duration": ("duration", "dur"),
}
# These always count, as spelled here: a bad value in them is a fault of the table. Other names of these fields count
# where all of their values fit.
STRICT = {"id", "utterance_id", "split", "offset", "duration"}
UNTOUCHED = "as_written"  # column of `transcribe --format csv`: the text before anybody corrected it
TO_THE_END = ("-1", "-1.0")  # Kaldi's end of a segment that lasts to the end of its file
TIMES = ("offset", "end", "duration")
UNITS = {"s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "ms": 0.001, "msec": 0.001, "milliseconds": 0.001}
AUDIO_SUFFIX = re.compile(r"\.(wav|flac|mp3|ogg|oga|opus|m4a|mp4|webm|aac|wma|aiff?|sph|amr)$", re.IGNORECASE)


class Column(NamedTuple):
    """A table's column, and the factor by which its numbers are multiplied to give seconds."""

    name: str
    scale: float = 1.0


def name_key(name: str) -> tuple[str, str]:
    """A column's name in the form used for comparison (lower-case letters and digits only), and the unit at its end, if
    any.
    """
    words = [word for word in re.split(r"[\W_]+", re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name)) if word]
    unit = words[-1].lower() if len(words) > 1 and words[-1].lower() in UNITS else ""
    return "".join(words[:-1] if unit else words).lower(), unit


def check_mapping(columns: Mapping[str, str]) -> None:
    """Refuses unknown fields."""
    unknown = sorted(set(columns) - set(KNOWN_COLUMNS))
    if unknown:
        raise UsageError(f"no field {unknown[0]!r} to take from a column: the fields are {', '.join(KNOWN_COLUMNS)}")


def choose_columns(
    table: Path, present: Sequence[str], records: Sequence[Mapping[str, Any]], mapping: Mapping[str, str]
) -> tuple[dict[str, Column], list[str]]:
    """Each field that the table has → its column; and messages about the other columns.

    Args:
        present: the columns' names in order, including duplicates.
        records: the rows, to check whether a column's values fit.
        mapping: field → column, as given by the user; an empty name uses no column.

    Raises:
        DataError: there is no column for the audio or the text, or a name is missing or occurs twice.
    """
    keys = {name_key(name)[0]: name for name in reversed(present)}
    if keys.keys() >= {"onset", "offset"}:  # then `offset` is where the stretch ends
        mapping = {"offset": keys["onset"], "end": keys["offset"], **mapping}
    chosen: dict[str, Column] = {}
    notes: list[str] = []
    for field, name in mapping.items():
        if name and name not in present:
            raise DataError(f"{table} has no column {name!r} for {field!r}: it has {', '.join(present)}")
        if name:
            chosen[field] = _column(field, name)
    taken = {column.name for column in chosen.values()}
    for field, known in KNOWN_COLUMNS.items():
        for name in _candidates(field, known, present) if field not in mapping else ():
            if name in taken:
                continue
            if problem := "" if name in STRICT else _misfit(field, name, records):
                notes.append(f"column {name!r} is not taken as {field}: {problem}")
                continue
            chosen[field] = _column(field, name)
            taken.add(name)
            break
    if "end" in chosen and "offset" not in chosen:
        del chosen["end"]
    _check_chosen(table, present, chosen)
    renamed = [f"{field} from {column.name!r}" for field, column in chosen.items() if field != column.name]
    used = {column.name for column in chosen.values()}
    unused = [name or "(without a name)" for name in dict.fromkeys(present) if name not in used]
    notes += [f"columns: {', '.join(renamed)}"] if renamed else []
    notes += [f"columns that are not used: {', '.join(unused)}"] if unused else []
    return chosen, notes


def _column(field: str, name: str) -> Column:
    return Column(name, UNITS.get(name_key(name)[1], 1.0) if field in TIMES else 1.0)


def _candidates(field: str, known: Sequence[str], present: Sequence[str]) -> list[str]:
    """The columns that may correspond to a field, best first: exact names, then others, in the order of `known`."""
    exact = [name for name in known if name in present]
    keys = {name.replace("_", ""): i for i, name in enumerate(known)}
    loose: list[tuple[int, str]] = []
    for name in dict.fromkeys(present):
        key, unit = name_key(name)
        if unit and field not in TIMES:
            key += unit
        if name not in exact and key in keys:
            loose.append((keys[key], name))
    return exact + [name for _, name in sorted(loose, key=lambda pair: pair[0])]


def _misfit(field: str, name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The reason why a column with a matching name is not this field; empty if its values fit."""
    if field not in ("id", "split", *TIMES):
        return ""
    try:
        values = [as_text(record.get(name), field) for record in records]
    except DataError as error:
        return f"it {error}"
    if field == "id":
        common = Counter(values).most_common(1)
        return f"value {common[0][0]!r} occurs {common[0][1]} times" if common and common[0][1] > 1 else ""
    wrong = next((value for value in values if value and not _fits(field, value)), None)
    return f"{wrong!r} is no {'split' if field == 'split' else 'number of seconds'}" if wrong is not None else ""


def _fits(field: str, value: str) -> bool:
    if field == "split":
        return value.lower() in SPLIT_NAMES
    return seconds(value) is not None or (field == "end" and value in TO_THE_END)


def _check_chosen(table: Path, present: Sequence[str], chosen: Mapping[str, Column]) -> None:
    for field in ("audio_filepath", "text"):
        if field not in chosen:
            raise DataError(
                f"{table} has no column for {field!r} (looked for {', '.join(KNOWN_COLUMNS[field])}): it has "
                f"{', '.join(map(repr, present))}; {_advice(present)}"
            )
    if AUDIO_SUFFIX.search(chosen["audio_filepath"].name):
        raise DataError(f"{table}: its first row is data ({', '.join(map(repr, present))}): {_NO_HEADER}")
    for field, column in chosen.items():
        if present.count(column.name) > 1:
            raise DataError(
                f"{table}: {present.count(column.name)} columns are named {column.name!r}, the column for field "
                f"{field}: rename all but one"
            )


_NO_HEADER = "name its columns by --header, as in --header audio_filepath,text"


def _advice(present: Sequence[str]) -> str:
    """Advice for a table whose columns are not recognised."""
    if "supervisions" in present or {"sampling_rate", "sources"} <= set(present):
        return (
            "it is a manifest of Lhotse: write its cuts as a table of audio_filepath, offset, duration, text, speaker"
        )
    if len(present) < 2 or any(_looks_like_data(name) for name in present):
        return f"if it has no header row, {_NO_HEADER}"
    return "say which one it is by --column, as in --column text=transcription"


def _looks_like_data(cell: str) -> bool:
    return bool(AUDIO_SUFFIX.search(cell)) or len(cell.split()) > 4 or not cell or bool(re.fullmatch(r"[\d.]+", cell))
