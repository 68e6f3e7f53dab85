"""Corpora from what people have: a table with audio paths, or a Hugging Face audiofolder."""

import csv
import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.data.audio import audio_info
from common.data.corpus import Corpus, Utterance, new_corpus_folder, read_corpus, write_index
from common.errors import DataError, UsageError
from common.json_files import read_jsonl
from common.progress import counted

FRACTIONS = (0.8, 0.1, 0.1)  # of the speakers: train, dev, test

# Column names that are understood without a mapping, the first one present being taken.
KNOWN_COLUMNS = {
    "audio_filepath": ("audio_filepath", "audio", "file_name", "file", "path", "wav", "filename"),
    "text": ("text", "transcription", "transcript", "sentence"),
    "text_alt": ("text_alt",),
    "id": ("id", "utterance_id"),
    "split": ("split",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "etiology": ("etiology",),
    "severity": ("severity",),
    "offset": ("offset",),
    "duration": ("duration",),
}
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "val", "valid", "validation", "eval"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row as text by our field names (an empty `split` has to be there), where it stands, and its audio.

    `folder` comes before the path where an id is made of it.
    """

    where: str
    values: dict[str, str]
    audio: Path
    folder: Path = Path()


@dataclass(frozen=True, slots=True)
class Imported:
    """A corpus, and how many recordings were left out, by reason."""

    corpus: Corpus
    skipped: Mapping[str, int]


def import_table(
    table: str | Path,
    out: str | Path,
    *,
    audio_root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    copy_audio: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 42,
) -> Corpus:
    """Make a corpus of a table with audio paths: CSV (comma, semicolon or tab) or JSON Lines (`.jsonl`, `.json`).

    Durations are measured; a column `duration` counts only together with a column `offset` (several utterances in one
    file). Without a column `split`, speakers are dealt to train, dev and test (`split_by_speaker`).

    Args:
        table: the file; its paths are relative to `audio_root`, by default the table's folder, or absolute.
        out: the corpus folder to make, not yet there or empty.
        columns: our field's name -> the table's column, where `KNOWN_COLUMNS` does not know it.
        copy_audio: copy the audio into the corpus folder; otherwise the index refers to it where it lies.
        fractions: of train, dev and test, summing to 1.
        seed: which speakers go where.

    Raises:
        DataError: an unreadable table, a missing column, a row with a fault; the message names file and line.
        UsageError: `out` exists, an unknown field in `columns`, fractions that do not sum to 1.
        StoreError: `out` cannot be written.
    """
    rows = list(_read_rows(Path(table), Path(audio_root or Path(table).parent), columns or {}))
    if not rows:
        raise DataError(f"{table} has no rows: nothing to import")
    return build_corpus(rows, Path(out), copy_audio, fractions, seed)


def import_audiofolder(
    folder: str | Path,
    out: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    copy_audio: bool = False,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 42,
) -> Corpus:
    """Make a corpus of a Hugging Face audiofolder: `metadata.csv` or `metadata.jsonl` at the top, or one in each of the
    folders train, validation and test, whose names then are the splits. Arguments and errors as of `import_table`.
    """
    source = Path(folder)
    rows: list[Row] = []
    for part in (source, *sorted(p for p in source.glob("*/") if p.name in SPLIT_NAMES)):
        for metadata in (part / "metadata.csv", part / "metadata.jsonl"):
            if metadata.is_file():
                split = "" if part == source else part.name
                rows += _read_rows(metadata, part, columns or {}, split=split, folder=Path(split))
    if not rows:
        raise DataError(
            f"{source} holds no metadata.csv or metadata.jsonl, at its top or in train/, validation/, test/"
        )
    return build_corpus(rows, Path(out), copy_audio, fractions, seed)


def split_by_speaker(utterances: Sequence[Utterance], *, fractions: Sequence[float], seed: int) -> list[Utterance]:
    """Deal whole speakers to train, dev and test, in each etiology by itself, so that every split has all of them.

    An etiology of two speakers goes to train and test, one of three or more to all splits (whose fraction is above 0).
    An utterance without a speaker counts as a speaker of its own. The result depends on seed and names alone.

    Args:
        fractions: of train, dev and test, summing to 1.

    Raises:
        UsageError: fractions that are no three numbers of at least 0 that sum to 1.
    """
    _check_fractions(fractions)
    etiology_of: dict[str, str] = {}
    for u in utterances:
        speaker = _speaker_key(u)
        etiology_of[speaker] = min(u.etiology, etiology_of.get(speaker, u.etiology))
    strata: dict[str, list[str]] = defaultdict(list)
    for speaker, etiology in etiology_of.items():
        strata[etiology].append(speaker)
    split_of: dict[str, str] = {}
    for speakers in strata.values():
        speakers.sort(key=lambda speaker: hashlib.sha256(f"{seed}\0{speaker}".encode()).digest())
        split_of |= dict(zip(speakers, _deal(len(speakers), fractions), strict=True))
    return [replace(u, split=split_of[_speaker_key(u)]) for u in utterances]


def _check_fractions(fractions: Sequence[float]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"split fractions {tuple(fractions)}: give train, dev and test, each 0 or more, summing to 1")


def hold_out_dev(rows: Sequence[Row], *, fractions: Sequence[float], seed: int) -> list[Row]:
    """Rows of train and dev alone, as train, dev and test: dev becomes test, some speakers of train become dev.

    Rows that have a test split, or no split at all, are returned as they are.

    Args:
        fractions: of train, dev and test; the share of dev among the first two is taken from train.

    Raises:
        UsageError: fractions that do not sum to 1.
    """
    _check_fractions(fractions)
    if {row.values["split"] for row in rows} != {"train", "dev"}:
        return list(rows)
    train = [row for row in rows if row.values["split"] == "train"]
    spoken = [
        Utterance(str(i), "", 0.0, "", speaker=row.values.get("speaker", ""), etiology=row.values.get("etiology", ""))
        for i, row in enumerate(train)
    ]
    share = fractions[1] / max(fractions[0] + fractions[1], 1e-9)
    dealt = split_by_speaker(spoken, fractions=(1 - share, share, 0.0), seed=seed)
    return [replace(row, values=row.values | {"split": u.split}) for row, u in zip(train, dealt, strict=True)] + [
        replace(row, values=row.values | {"split": "test"}) for row in rows if row.values["split"] == "dev"
    ]


def _speaker_key(u: Utterance) -> str:
    return f"speaker {u.speaker}" if u.speaker else f"utterance {u.id}"


def _deal(count: int, fractions: Sequence[float]) -> list[str]:
    """`count` split names: test first, then dev, the rest train."""
    test = max(1, round(count * fractions[2])) if fractions[2] and count >= 2 else 0
    dev = max(1, round(count * fractions[1])) if fractions[1] and count >= 3 else 0
    return (["test"] * test + ["dev"] * dev + ["train"] * count)[:count]


def _read_rows(
    table: Path, audio_root: Path, columns: Mapping[str, str], split: str = "", folder: Path = Path()
) -> Iterator[Row]:
    unknown = sorted(set(columns) - set(KNOWN_COLUMNS))
    if unknown:
        raise UsageError(f"no field {unknown[0]!r} to take from a column: the fields are {', '.join(KNOWN_COLUMNS)}")
    records = list(_json_records(table) if table.suffix in (".jsonl", ".json") else _csv_records(table))
    present = list(dict.fromkeys(name for _, record in records for name in record))  # a JSON line may leave some out
    chosen = _choose_columns(table, present, columns) if records else {}
    for where, record in records:
        values = {field: _as_text(record.get(column)) for field, column in chosen.items()}
        values = {"split": split, **{field: value for field, value in values.items() if value}}
        for field in ("audio_filepath", "text"):
            if field not in values:
                raise DataError(f"{where}: column {chosen[field]!r} is empty: fill it, or take the row out")
        audio = audio_root / values["audio_filepath"]
        yield Row(where, values, audio.resolve(), folder)


def _choose_columns(table: Path, present: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our field -> the table's column."""
    for field, column in columns.items():
        if column not in present:
            raise DataError(f"{table} has no column {column!r} for {field!r}: it has {', '.join(present)}")
    chosen = dict(columns)
    for field, names in KNOWN_COLUMNS.items():
        name = next((name for name in names if name in present), None)
        if field not in chosen and name is not None:
            chosen[field] = name
    for field in ("audio_filepath", "text"):
        if field not in chosen:
            raise DataError(
                f"{table} has no column for {field!r} (looked for {', '.join(KNOWN_COLUMNS[field])}): it has "
                f"{', '.join(present)}; say which one it is by a column mapping"
            )
    return chosen


def _csv_records(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            heading = file.readline()
            file.seek(0)
            # Spreadsheets of many countries separate by semicolons.
            separator = max((",", ";", "\t"), key=heading.count)
            # Where tabs separate, a quote is mostly a character of the text, as in Common Voice.
            quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
            reader = csv.DictReader(file, delimiter=separator, strict=True, quoting=quoting)
            for record in reader:
                if None in record or None in record.values():
                    raise DataError(f"{table}:{reader.line_num}: the row has not as many cells as the heading")
                if quoting == csv.QUOTE_NONE:
                    record = {_unquoted(name): _unquoted(cell) for name, cell in record.items()}
                yield f"{table}:{reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"{table}:{reader.reader.line_num}: {error}: check quotes and separators") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not utf-8 text ({error.reason}): save it as utf-8") from error
    except OSError as error:
        raise DataError(f"cannot read the table {table}: {error.strerror}: check the path and its rights") from error


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _json_records(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in read_jsonl(table):
        yield f"{table}:{number}", record


def _as_text(value: object) -> str:
    return "" if value is None else str(value).strip()


def build_corpus(
    rows: Sequence[Row],
    out: Path,
    copy_audio: bool,
    fractions: Sequence[float],
    seed: int,
    *,
    broken: Counter[str] | None = None,
) -> Corpus:
    """Measures the audio, deals speakers to splits where rows name none, and writes the corpus.

    Args:
        broken: rows whose audio cannot be read are counted here by their message and left out; otherwise they are
            errors.

    Raises:
        DataError, UsageError, StoreError: as of `import_table`.
    """
    with new_corpus_folder(out) as folder:
        rows, utterances = _measure(rows, broken)
        utterances = _unique_ids(rows, utterances)
        with_split = [bool(row.values["split"]) for row in rows]
        if not all(with_split):
            if any(with_split):
                raise DataError(f"{rows[with_split.index(False)].where}: no split, but other rows have one: fill it")
            utterances = split_by_speaker(utterances, fractions=fractions, seed=seed)
        if copy_audio:
            utterances = _copy_audio(rows, utterances, folder)
        write_index(folder, utterances)
    return read_corpus(out)


def _measure(rows: Sequence[Row], broken: Counter[str] | None) -> tuple[list[Row], list[Utterance]]:
    files = Counter(row.audio for row in rows)
    stretches = any("offset" in row.values for row in rows)  # an offset that is not given is 0 then

    def one(row: Row) -> Utterance | DataError:
        try:
            return _to_utterance(row, stretch=stretches or files[row.audio] > 1)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = list(counted(pool.map(one, rows), len(rows), "import", unit="files"))
    kept: list[Row] = []
    utterances: list[Utterance] = []
    for row, found in zip(rows, measured, strict=True):
        if isinstance(found, Utterance):
            kept.append(row)
            utterances.append(found)
        elif broken is None:
            raise found
        else:
            broken[str(found)] += 1
    if not utterances:
        raise DataError(f"none of {len(rows)} audio files can be read: {next(iter(broken or ()), 'there are none')}")
    return kept, utterances


def _to_utterance(row: Row, *, stretch: bool) -> Utterance:
    """The utterance of a row; of a stretch of a file, the row's duration counts, otherwise the file's own."""
    values = row.values
    try:
        file_seconds = audio_info(row.audio).duration
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    offset = _seconds(row, "offset")
    if offset >= file_seconds:
        raise DataError(f"{row.where}: offset {offset:g} s, but {row.audio} lasts {file_seconds:.2f} s: correct it")
    duration = file_seconds - offset
    if stretch and "duration" in values:
        duration = min(duration, _seconds(row, "duration"))
    split = values["split"].lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{row.where}: split {split!r} is none of {', '.join(SPLIT_NAMES)}: rename it")
    return Utterance(
        id=values.get("id", ""),
        audio_filepath=str(row.audio),
        duration=round(duration, 6),
        text=values["text"],
        split=SPLIT_NAMES.get(split, ""),
        speaker=values.get("speaker", ""),
        etiology=values.get("etiology", ""),
        severity=values.get("severity", ""),
        text_alt=values.get("text_alt"),
        offset=offset,
    )


def _seconds(row: Row, field: str) -> float:
    value = row.values.get(field, "0")
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise DataError(f"{row.where}: {field} {value!r} is not a number of seconds of 0 or more: correct it")
    return seconds


def _unique_ids(rows: Sequence[Row], utterances: Sequence[Utterance]) -> list[Utterance]:
    """Every utterance with its id: the table's, or its audio path without suffix, and offset where it has one."""
    named: list[Utterance] = []
    where_of: dict[str, str] = {}
    for row, u in zip(rows, utterances, strict=True):
        suffix = f"@{u.offset:g}" if u.offset else ""
        name = u.id or (row.folder / row.values["audio_filepath"]).with_suffix("").as_posix().lstrip("./") + suffix
        if name in where_of:
            raise DataError(f"{row.where}: id {name!r} is already at {where_of[name]}: give each row an id of its own")
        where_of[name] = row.where
        named.append(replace(u, id=name))
    return named


def _copy_audio(rows: Sequence[Row], utterances: Sequence[Utterance], folder: Path) -> list[Utterance]:
    """Copy each file once, under a name of its own, and refer to the copy."""
    copies: dict[Path, str] = {}
    for row in rows:
        if row.audio not in copies:
            name = f"audio/{len(copies):07d}{row.audio.suffix}"
            (folder / "audio").mkdir(exist_ok=True)
            shutil.copyfile(row.audio, folder / name)
            copies[row.audio] = name
    return [replace(u, audio_filepath=copies[row.audio]) for row, u in zip(rows, utterances, strict=True)]
