"""A corpus: audio files beside `index.jsonl`, one utterance a line, in NeMo's names where NeMo has one.

The audio can instead be packed in tar shards (`common.data.shards`): each line then also gives the shard and the
position. These fields are not part of the digest, so a corpus has the same keys packed and unpacked.
"""

import hashlib
import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from common.data.clips import Clip, Place, Remote
from common.data.identities import identifier, join_spellings, joined_in_words
from common.errors import DataError
from common.files import explained, write_lasting
from common.json_files import read_jsonl

log = logging.getLogger(__name__)
INDEX_NAME = "index.jsonl"
PROVENANCE = "provenance.json"  # of an imported corpus: from what it was made, and what was left out
IDENTITIES = ("speaker", "etiology", "severity")
GROUP_FIELDS = ("split", "speaker", "etiology", "severity")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One stretch of speech and its transcript.

    Args:
        id: unique in the corpus.
        audio_filepath: relative to the corpus folder, or absolute.
        duration: seconds, from `offset` on.
        text: the transcript, as it should be recognised.
        split: train, dev or test.
        speaker, etiology, severity: empty where unknown.
        text_alt: a second acceptable reference.
        offset: start of the utterance, in seconds from the beginning of the audio file.
    """

    id: str
    audio_filepath: str
    duration: float
    text: str
    split: str = "train"
    speaker: str = ""
    etiology: str = ""
    severity: str = ""
    text_alt: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Corpus:
    """Utterances sorted by id, the folder to which their paths are relative, and the digest that identifies them in
    keys.

    Attributes:
        places: audio path → its location in a shard.
        remote: the store that contains the audio, if it is not in the folder.
    """

    root: Path
    utterances: tuple[Utterance, ...]
    digest: str
    places: Mapping[str, Place] = field(default_factory=dict)
    remote: Remote | None = None

    @property
    def url(self) -> str:
        """Location of the corpus, for messages."""
        return self.remote.url if self.remote else str(self.root)

    def split(self, name: str) -> list[Utterance]:
        """The utterances of one split, sorted by id; empty when the corpus has no such split."""
        return [u for u in self.utterances if u.split == name]

    def path(self, utterance: Utterance) -> Path:
        """Path of the utterance's audio, or the path that it would have as a separate file."""
        return self.root / utterance.audio_filepath

    def clip(self, utterance: Utterance) -> Clip | None:
        """Location of the utterance's audio in a shard or a store; None for a plain file."""
        name = utterance.audio_filepath
        place = self.places.get(name)
        if place is None and (self.remote is None or name.startswith("/")):
            return None
        return Clip(self.root, name, place, self.remote)

    def audio(self, utterance: Utterance) -> bytes:
        """The bytes of the utterance's audio file.

        Raises:
            DataError: the audio is missing or damaged.
        """
        clip, path = self.clip(utterance), self.path(utterance)
        if clip is not None:
            return clip.read()
        from common.data.decoders import check_regular  # imports decoders, which reading an index does not need

        check_regular(path, str(path))
        with explained(path):
            return path.read_bytes()


def shared_speakers(utterances: Iterable[Utterance]) -> dict[str, dict[str, str]]:
    """Speakers that are in more than one split: speaker → split → the speaker's first utterance in the split."""
    splits_of: dict[str, dict[str, str]] = {}
    for u in utterances:
        if u.speaker:
            splits_of.setdefault(u.speaker, {}).setdefault(u.split, u.id)
    return {speaker: splits for speaker, splits in splits_of.items() if len(splits) > 1}


_INDEX_REMEDY = f"give a folder with {INDEX_NAME}, or make one with `moe-asr corpus import` or `moe-asr corpus synth`"
_REQUIRED = ("audio_filepath", "duration", "text")
_NUMBER_FIELDS = ("duration", "offset")
_FIELD_NAMES = tuple(f.name for f in fields(Utterance))
_OMITTED = {f.name: f.default for f in fields(Utterance) if f.name not in ("id", "split", *_REQUIRED)}
_encode = json.JSONEncoder(ensure_ascii=False).encode
_encode_ascii = json.JSONEncoder(ensure_ascii=True).encode


def read_corpus(path: str | Path) -> Corpus:
    """Read a corpus folder, or an index file by its own name (a NeMo manifest is one).

    A line without `id` gets its audio path as id. Unknown fields are ignored. Ids, speakers and groups are normalised
    (`common.data.identities`), and different spellings of one name are merged, which is logged as a warning.

    Raises:
        DataError: a missing file, bad JSON, a missing or mistyped field, a duplicate id, no utterance at all;
            the message names file, line, field and remedy.
    """
    try:
        index = Path(path) / INDEX_NAME if Path(path).is_dir() else Path(path)
    except OSError as error:  # a name that is too long, a folder without rights
        raise DataError(f"cannot read {path}: {error.strerror}: {_INDEX_REMEDY}") from error
    root = index.parent.resolve()
    utterances: list[Utterance] = []
    line_of_id: dict[str, int] = {}
    places: dict[str, Place] = {}
    for number, record in read_jsonl(index, remedy=_INDEX_REMEDY):
        utterance = _parse_utterance(record, f"{index}:{number}", root)
        if utterance.id in line_of_id:
            raise DataError(
                f"{index}:{number}: id {utterance.id!r} is already on line {line_of_id[utterance.id]}: make ids unique"
            )
        line_of_id[utterance.id] = number
        utterances.append(utterance)
        place = Place.from_record(record, f"{index}:{number}")
        if place is not None and places.setdefault(utterance.audio_filepath, place) != place:
            raise DataError(
                f"{index}:{number}: {utterance.audio_filepath} has two locations in the index: pack the corpus again"
            )
    if not utterances:
        raise DataError(f"{index} contains no utterance: write one JSON object a line, with {', '.join(_REQUIRED)}")
    utterances, joined = join_identities(utterances)
    for remark in joined:
        log.warning("%s: %s", index, remark)
    utterances.sort(key=lambda u: u.id)
    return Corpus(root, tuple(utterances), index_digest(utterances), places)


def join_identities(utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[str]]:
    """Utterances with one spelling for each speaker, etiology and severity, and messages about the merged spellings."""
    joined: dict[str, dict[str, str]] = {}
    remarks: list[str] = []
    for name in IDENTITIES:
        counts = Counter(getattr(u, name) for u in utterances)
        if others := join_spellings(counts):
            joined[name] = others
            remarks += joined_in_words(name, others, counts)
    if not joined:
        return list(utterances), []

    def unified(u: Utterance) -> Utterance:
        changes: dict[str, Any] = {
            name: table[getattr(u, name)] for name, table in joined.items() if getattr(u, name) in table
        }
        return replace(u, **changes) if changes else u

    return [unified(u) for u in utterances], remarks


def write_index(root: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write `root/index.jsonl` sorted by id, whole or not at all; fields at their defaults are omitted.

    Raises:
        StoreError, RetryableError: the folder cannot be written.
    """
    index, ordered = Path(root) / INDEX_NAME, sorted(utterances, key=lambda u: u.id)

    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(index_lines(ordered, {}))

    with explained(index):
        write_lasting(index, fill)


def index_lines(utterances: Iterable[Utterance], places: Mapping[str, Place]) -> Iterator[str]:
    """Lines of an index; fields at their defaults are omitted."""
    for u in utterances:
        place = places.get(u.audio_filepath)
        yield _encode(_to_record(u) | (asdict(place) if place else {})) + "\n"


def index_digest(utterances: Iterable[Utterance]) -> str:
    """The sha256 (hex) of all fields of all utterances, independent of their order and of the folder's location."""
    digest = hashlib.sha256()
    for u in sorted(utterances, key=lambda u: u.id):
        digest.update(_encode_ascii([getattr(u, name) for name in _FIELD_NAMES]).encode() + b"\n")
    return digest.hexdigest()


def available_fields(utterances: Iterable[Utterance]) -> list[str]:
    """Those of the fields split, speaker, etiology and severity that at least one utterance has."""
    missing = set(GROUP_FIELDS)
    for u in utterances:
        missing -= {name for name in missing if getattr(u, name)}
        if not missing:
            break
    return [name for name in GROUP_FIELDS if name not in missing]


def corpus_stats(corpus: Corpus) -> dict[str, Any]:
    """Counts and hours of speech, over all and by split, etiology, severity and speaker (where the corpus has them)."""
    stats: dict[str, Any] = {"digest": corpus.digest, **_totals(corpus.utterances)}
    for name in available_fields(corpus.utterances):
        groups: dict[str, list[Utterance]] = defaultdict(list)
        for u in corpus.utterances:
            groups[getattr(u, name)].append(u)
        stats[f"by_{name}"] = {value: _totals(group) for value, group in sorted(groups.items())}
    return stats


def _totals(utterances: Sequence[Utterance]) -> dict[str, Any]:
    seconds = sum(u.duration for u in utterances)
    return {
        "utterances": len(utterances),
        "hours": round(seconds / 3600, 4),
        "mean_seconds": round(seconds / len(utterances), 2),
        "words": sum(len(u.text.split()) for u in utterances),
        "speakers": len({u.speaker for u in utterances if u.speaker}),
    }


def _parse_utterance(record: dict[str, Any], where: str, root: Path) -> Utterance:
    values = {name: record[name] for name in _FIELD_NAMES if not _is_missing(record.get(name), name)}
    for name in _REQUIRED:
        if name not in values:
            raise DataError(f"{where}: field {name!r} is missing: every utterance needs {', '.join(_REQUIRED)}")
    for name, value in values.items():
        if name in _NUMBER_FIELDS:
            values[name] = _check_seconds(value, name, where)
        elif type(value) is not str:
            raise DataError(f"{where}: field {name!r} must be text, not {json.dumps(value)}: put it in quotes")
        elif name in GROUP_FIELDS:  # a million utterances share a few speakers and etiologies: one string object each
            values[name] = sys.intern(value if name in IDENTITIES else _split(value))
    if not values["audio_filepath"]:
        raise DataError(f"{where}: field 'audio_filepath' is empty: name the audio file")
    values["audio_filepath"] = _relative_to(root, values["audio_filepath"])
    values.setdefault("id", values["audio_filepath"] + (f"@{values['offset']}" if values.get("offset") else ""))
    values["id"] = identifier(values["id"])
    if not values["id"]:
        raise DataError(f"{where}: field 'id' is empty: give each utterance a name of its own")
    return Utterance(**values)


def _split(name: str) -> str:
    return name.lower() if name.lower() in ("train", "dev", "test") else name


def _is_missing(value: object, name: str) -> bool:
    """Whether a field has no value: null or, except in numeric fields, NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value) and name not in _NUMBER_FIELDS)


def _check_seconds(value: object, name: str, where: str) -> float:
    if type(value) not in (int, float):  # not isinstance: a bool is an int
        raise DataError(f"{where}: field {name!r} must be a number of seconds, not {json.dumps(value)}")
    seconds = float(cast(float, value))
    if not 0 <= seconds < math.inf:
        raise DataError(f"{where}: field {name!r} must be a finite number of seconds, 0 or more, not {value}")
    return seconds


def _relative_to(root: Path, audio_filepath: str) -> str:
    """An absolute path under the corpus folder as a relative one, so that a moved corpus keeps its digest."""
    if not audio_filepath.startswith("/"):
        return audio_filepath
    path = Path(audio_filepath)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else audio_filepath


def _to_record(u: Utterance) -> dict[str, Any]:
    record = {name: getattr(u, name) for name in _FIELD_NAMES}
    return {name: value for name, value in record.items() if name not in _OMITTED or value != _OMITTED[name]}
