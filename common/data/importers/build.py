"""From rows to a corpus folder: measures audio, merges spellings of names, assigns speakers to splits, lists all
faults.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from common import __version__
from common.data.audio import AudioInfo, audio_info
from common.data.corpus import PROVENANCE, Utterance, join_identities, read_corpus, write_index
from common.data.identities import identifier
from common.data.importers.rows import Imported, TableRow
from common.data.importers.splits import FRACTIONS, SPLIT_NAMES, split_by_speaker
from common.data.importers.stretches import shared_files, stretch_of, unclear_stretches
from common.data.importers.values import seconds
from common.errors import DataError
from common.files import explained, new_folder
from common.progress import counted
from common.text import lone_surrogate, mend, odd_forms, printable

MOST_FAULTS, FIRST_FAULTS = 1000, 5  # that one message lists; where no row can be used
SEED = 42
DIFFERS = 0.5  # seconds between a table's duration and the file's, from where on it is worth a note


class BuildOptions(TypedDict, total=False):
    """Options of all importers.

    Attributes:
        copy_audio: copy the audio into the corpus folder; otherwise the index refers to its present location.
        normalise_characters: write texts in the form that Whisper writes (`common.text.mend`).
        seed: random seed of the assignment of speakers to splits; by default `SEED`.
    """

    copy_audio: bool
    normalise_characters: bool
    seed: int


def build_corpus(
    rows: Sequence[TableRow],
    out: Path,
    *,
    source: Mapping[str, Any],
    copy_audio: bool = False,
    normalise_characters: bool = False,
    seed: int = SEED,
    skip_bad: bool = False,
    faults: Sequence[str] = (),
    fault_reason: str = "with a fault",
    notes: Sequence[str] = (),
    skipped: Mapping[str, int] | None = None,
) -> Imported:
    """Measures the audio, assigns speakers to splits if rows name none, and writes the corpus with its provenance.

    Args:
        source: the source of the corpus, for its provenance: format, path, options.
        copy_audio, normalise_characters, seed: see `BuildOptions`.
        skip_bad: leave out rows with a fault; otherwise they are an error, with all of them in one message.
        faults: faults of rows that could not be read.
        fault_reason: the reason under which rows with a fault are counted among the rows omitted.
        notes: messages about the source.
        skipped: recordings that were omitted already, by reason.

    Raises:
        DataError: there are rows with a fault, or no usable rows.
        UsageError: `out` exists.
        StoreError, RetryableError: `out` cannot be written.
    """
    with explained(out), new_folder(out) as folder:
        kept, more = _measure(rows)
        named, double = _name(kept)
        all_faults = sorted([*faults, *more, *double], key=_in_order)
        if all_faults and (not skip_bad or not named):
            raise DataError(*_listed(all_faults, len(rows) + len(faults), every=not named))
        utterances, joined = join_identities([u for _, u in named])
        utterances, mended = _mend(utterances) if normalise_characters else (utterances, 0)
        said = [*notes, *joined, *_remarks(named, utterances)]
        if not utterances[0].split:
            utterances = split_by_speaker(utterances, fractions=FRACTIONS, seed=seed)
        if copy_audio:
            utterances = _copy_audio([row for row, _ in named], utterances, folder)
        write_index(folder, utterances)
        left_out = Counter(skipped or {}) + Counter({fault_reason: len(all_faults)})
        record = {"version": __version__, **source, "rows": len(rows) + len(faults), "utterances": len(utterances)}
        record |= {"left_out": dict(left_out), "faults": all_faults, "notes": said, "mended_texts": mended}
        _write_provenance(folder / PROVENANCE, record)
    return Imported(
        read_corpus(out), left_out, all_faults, said + ([f"{mended} texts were converted"] if mended else [])
    )


def _in_order(fault: str) -> list[tuple[int, str]]:
    """Sorts messages by file and line, 9 before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", fault)]


def _listed(faults: Sequence[str], rows: int, *, every: bool) -> tuple[str, list[str]]:
    """Message and details of the error."""
    if len(faults) == 1:
        return faults[0], []
    shown = FIRST_FAULTS if every else MOST_FAULTS  # what is wrong with every row is mostly one thing, such as a path
    lines = [*faults[:shown], *([f"and {len(faults) - shown} more"] if len(faults) > shown else [])]
    head = (
        f"none of {rows} rows can be used"
        if every
        else f"{len(faults)} of {rows} rows cannot be used: correct them, or omit them by --skip-bad"
    )
    return head, lines


def _measure(rows: Sequence[TableRow]) -> tuple[list[tuple[TableRow, Utterance]], list[str]]:
    """The rows whose audio can be read, with their utterances; and the faults of the others."""
    files = list(dict.fromkeys(row.audio for row in rows))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        infos = dict(zip(files, counted(pool.map(_info, files), len(files), "import", unit="files"), strict=True))
    shared = shared_files(rows)
    unclear = unclear_stretches(shared)
    timed = any("offset" in row.values for row in rows)
    with_split = any(row.values["split"] for row in rows)
    kept: list[tuple[TableRow, Utterance]] = []
    faults: list[str] = []
    for row in rows:
        try:
            if row.where in unclear:
                raise DataError(unclear[row.where])
            if with_split and not row.values["split"]:
                raise DataError(f"{row.where}: no split, but other rows have one: fill it")
            kept.append((row, _to_utterance(row, infos[row.audio], shared=row.audio in shared, timed=timed)))
        except DataError as error:
            faults.append(printable(str(error)))
    return kept, faults


def _info(path: Path) -> AudioInfo | DataError:
    try:
        if half := lone_surrogate(str(path)):
            raise DataError(f"{path}: its name is not UTF-8 (\\u{half}): rename the file or folder")
        return audio_info(path)
    except DataError as error:
        return error


def _to_utterance(row: TableRow, info: AudioInfo | DataError, *, shared: bool, timed: bool) -> Utterance:
    values = row.values
    if isinstance(info, DataError):
        raise DataError(f"{row.where}: {info}")
    offset, duration = stretch_of(row, info, shared=shared, timed=timed)
    split = values["split"].lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{row.where}: split {values['split']!r} is not one of {', '.join(SPLIT_NAMES)}: rename it")
    return Utterance(
        id=identifier(values.get("id", "")),
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


def _name(pairs: Sequence[tuple[TableRow, Utterance]]) -> tuple[list[tuple[TableRow, Utterance]], list[str]]:
    """Every utterance with its id: the table's, or its audio path without suffix, and offset where it has one."""
    named: list[tuple[TableRow, Utterance]] = []
    faults: list[str] = []
    where_of: dict[str, str] = {}
    for row, u in pairs:
        suffix = f"@{u.offset:g}" if u.offset else ""
        path = row.folder / row.values["audio_filepath"].replace("\\", "/")
        name = u.id or identifier(path.with_suffix("").as_posix().lstrip("./") + suffix)
        if name in where_of:
            faults.append(f"{row.where}: id {name!r} is already at {where_of[name]}: give each row an id of its own")
            continue
        where_of[name] = row.where
        named.append((row, replace(u, id=name)))
    return named, faults


def _mend(utterances: Sequence[Utterance]) -> tuple[list[Utterance], int]:
    texts = [(mend(u.text), mend(u.text_alt) if u.text_alt else u.text_alt) for u in utterances]
    mended = [replace(u, text=text, text_alt=alt) for u, (text, alt) in zip(utterances, texts, strict=True)]
    return mended, sum(u != other for u, other in zip(utterances, mended, strict=True))


def _remarks(named: Sequence[tuple[TableRow, Utterance]], utterances: Sequence[Utterance]) -> list[str]:
    """Messages about properties of a corpus that are not faults."""
    remarks = []
    silent = sum(not u.speaker for u in utterances)
    if silent == len(utterances):
        dealt = "" if utterances[0].split else "one voice may be in train and in test, and "
        remarks.append(
            f"no speakers: {dealt}error rates get no intervals over speakers; name their column by "
            "--column speaker=COLUMN"
        )
    elif silent:
        remarks.append(f"{silent} of {len(utterances)} utterances have no speaker: each counts as one of its own")
    forms = Counter(form for u in utterances for form in odd_forms(u.text))
    if forms:
        kinds = ", ".join(f"{form}: {count}" for form, count in forms.most_common())
        remarks.append(
            f"texts with {kinds}; a model trained on them will write them in this form, --normalise-characters "
            "converts them"
        )
    remarks += _differing_durations(named)
    return remarks


def _differing_durations(named: Sequence[tuple[TableRow, Utterance]]) -> list[str]:
    """Rows of whole files for which the table gives another duration: the files may be cut short."""
    wrong = []
    for row, u in named:
        said = seconds(row.values.get("duration", ""))
        if said and not u.offset and abs(said - u.duration) > max(DIFFERS, 0.05 * u.duration):
            wrong.append(f"{row.where}: {said:g} s, {u.duration:.2f} s in the file")
    return [f"the table says another duration than {len(wrong)} files have (as {wrong[0]})"] if wrong else []


def _copy_audio(rows: Sequence[TableRow], utterances: Sequence[Utterance], folder: Path) -> list[Utterance]:
    """Copy each file once, under a name of its own, and refer to the copy."""
    copies: dict[Path, str] = {}
    for row in rows:
        if row.audio not in copies:
            name = f"audio/{len(copies):07d}{row.audio.suffix}"
            (folder / "audio").mkdir(exist_ok=True)
            try:
                shutil.copyfile(row.audio, folder / name)
            except FileNotFoundError:
                raise DataError(f"{row.where}: {row.audio} was removed during the import: run it again") from None
            copies[row.audio] = name
    return [replace(u, audio_filepath=copies[row.audio]) for row, u in zip(rows, utterances, strict=True)]


def _write_provenance(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(printable(json.dumps(record, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
