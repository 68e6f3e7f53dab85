"""Corpora of the Speech Accessibility Project: one JSON file per contributor beside recordings, in shards or unpacked.

The structure follows the project's published scripts (github.com/speechaccessibility/SplitTrainTest,
github.com/xiuwenz2/SAPC-template) and its transcription guidelines; the recordings require an agreement with the
project.

A contributor's file: {"Contributor ID", "Etiology", "Files": [{"Filename", "Prompt": {"Prompt Text", "Transcript"},
"Ratings": [{"Dimension Description", "Level"}]}]}.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from common.data.corpus import Utterance
from common.data.importers.build import SEED, BuildOptions, build_corpus
from common.data.importers.folders import visible_files
from common.data.importers.rows import Imported, TableRow
from common.data.importers.splits import FRACTIONS, SPLIT_NAMES, split_by_speaker
from common.errors import DataError
from common.text import mend

AUDIO = (".wav", ".flac")
UNREADABLE = "with audio that cannot be read"
SPLITS = {**SPLIT_NAMES, "test1": "test", "test2": "test"}
# What the guidelines give instead of a transcript: no data, no voice, noise, another voice, cut, distorted, too quiet,
# no English words.
CODES = ("nod", "nov", "bgn", "otv", "cut", "dis", "loa", "nrw")


@dataclass(frozen=True, slots=True)
class Contributor:
    """One contributor's JSON file."""

    path: Path
    id: str
    etiology: str
    severity: str
    files: Sequence[Mapping[str, Any]]


def import_sap(
    folder: str | Path,
    out: str | Path,
    *,
    official_splits: bool = False,
    **options: Unpack[BuildOptions],
) -> Imported:
    """Make a corpus of unpacked Speech Accessibility Project data.

    JSON files and audio may be anywhere below `folder`; they are matched by file name. The split is given by a
    `…Split_by_Contributors.json`, otherwise by the folder Train, Dev or Test that contains a file; without either,
    speakers are assigned to splits (`split_by_speaker`). If some contributors have a split, those without one are left
    out. The project does not publish test data: without test data, Dev
    becomes `test`, and some speakers of Train become `dev`.

    A transcript with disfluencies in parentheses gives two references, without them and with them. Severity is the
    speaker's mean rating of intelligibility, rounded: `intelligibility 1` (best) to `intelligibility 7`.

    Args:
        folder: the unpacked data.
        out: the corpus folder to make, which must not exist or must be empty.
        official_splits: keep Train and Dev unchanged, even if nothing is left for `test`.
        options: see `BuildOptions`.

    Raises:
        DataError: the folder does not have this structure, or nothing in it can be used.
        UsageError, StoreError, RetryableError: as in `import_table`.
    """
    source = Path(folder)
    contributors, splits = _read_contributors(source)
    audio = {path.name: path for path in visible_files(source, AUDIO)}
    if not audio:
        raise DataError(f"{source} contains no {' or '.join(AUDIO)} file: unpack the project's archives into it first")
    skipped: Counter[str] = Counter()
    rows = [row for contributor in contributors for row in _rows(contributor, source, audio, splits, skipped)]
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "no files are listed"
        raise DataError(f"{source}: no recording of {len(contributors)} contributors can be used: {reasons}")
    if named := [row for row in rows if row.values["split"]]:
        skipped["of contributors in no split"] += len(rows) - len(named)
        rows = named
    if not official_splits:
        rows = hold_out_dev(rows, seed=options.get("seed", SEED))
    return build_corpus(
        rows,
        Path(out),
        source={"format": "sap", "source": str(folder), "official_splits": official_splits},
        skip_bad=True,
        fault_reason=UNREADABLE,
        skipped=skipped,
        **options,
    )


def hold_out_dev(rows: Sequence[TableRow], *, seed: int) -> list[TableRow]:
    """Divides rows of train and dev into train, dev and test: dev becomes test, some speakers of train become dev.

    Rows with a test split, or without any split, are returned unchanged.
    """
    if {row.values["split"] for row in rows} != {"train", "dev"}:
        return list(rows)
    train = [row for row in rows if row.values["split"] == "train"]
    spoken = [
        Utterance(
            str(i),
            str(row.audio),
            0.0,
            "",
            speaker=row.values.get("speaker", ""),
            etiology=row.values.get("etiology", ""),
        )
        for i, row in enumerate(train)
    ]
    share = FRACTIONS[1] / (FRACTIONS[0] + FRACTIONS[1])
    dealt = split_by_speaker(spoken, fractions=(1 - share, share, 0.0), seed=seed)
    return [replace(row, values=row.values | {"split": u.split}) for row, u in zip(train, dealt, strict=True)] + [
        replace(row, values=row.values | {"split": "test"}) for row in rows if row.values["split"] == "dev"
    ]


def _read_contributors(source: Path) -> tuple[list[Contributor], dict[str, str]]:
    """The contributors, each once, and the split of each if a file of splits gives it."""
    contributors: dict[str, Contributor] = {}
    splits: dict[str, str] = {}
    for path in visible_files(source, [".json"]):
        content = _read_json(path)
        if path.stem.lower().endswith("split_by_contributors"):
            splits |= _official_splits(path, content)
        elif isinstance(content, dict) and isinstance(content.get("Files"), list):
            contributor = _contributor(path, content)
            if contributor.id not in contributors:
                # Releases contain a second copy of all JSON files in a separate archive.
                contributors[contributor.id] = contributor
    if not contributors:
        raise DataError(
            f'{source} contains no contributor of the Speech Accessibility Project: JSON with "Contributor ID" and '
            '"Files" for each speaker; name the folder that its archives were unpacked into'
        )
    return list(contributors.values()), splits


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): unpack it again") from None


def _official_splits(path: Path, content: Any) -> dict[str, str]:
    """{"train": [contributor, …], …} inverted: contributor → split."""
    if not isinstance(content, dict) or not all(isinstance(names, list) for names in content.values()):
        raise DataError(f"{path} is not an object of lists of contributors by split: take the release's own file")
    unknown = [split for split in content if split.lower() not in SPLITS]
    if unknown:
        raise DataError(f"{path}: split {unknown[0]!r} is not one of {', '.join(SPLITS)}: take the release's own file")
    return {str(name).lower(): SPLITS[split.lower()] for split, names in content.items() for name in names}


def _contributor(path: Path, content: Mapping[str, Any]) -> Contributor:
    files = [file for file in content["Files"] if isinstance(file, dict)]
    levels = [level for file in files if (level := _intelligibility(file)) is not None]
    return Contributor(
        path=path,
        id=str(content.get("Contributor ID") or path.stem).lower(),
        etiology=str(content.get("Etiology") or "").strip(),
        severity=f"intelligibility {round(sum(levels) / len(levels))}" if levels else "",
        files=files,
    )


def _intelligibility(file: Mapping[str, Any]) -> float | None:
    """A recording's mean level of this dimension, 1 to 7; None where it was not rated."""
    levels = []
    for rating in file.get("Ratings") or ():
        if isinstance(rating, dict) and str(rating.get("Dimension Description")).strip().lower() == "intelligibility":
            level = re.fullmatch(r"[1-7](\.\d+)?", str(rating.get("Level")).strip())
            levels += [float(level[0])] if level else []
    return sum(levels) / len(levels) if levels else None


def _rows(
    contributor: Contributor, source: Path, audio: Mapping[str, Path], splits: Mapping[str, str], skipped: Counter[str]
) -> Iterator[TableRow]:
    for number, file in enumerate(contributor.files, start=1):
        prompt = file.get("Prompt")
        name = Path(str(file.get("Filename") or "")).name
        path = audio.get(name)
        transcript = prompt.get("Transcript") if isinstance(prompt, dict) else None
        pieces, problem = read_transcript(str(transcript or ""))
        if problem or path is None:
            skipped["without their audio file" if path is None else problem] += 1
            continue
        for piece in pieces:
            values = {
                "audio_filepath": path.relative_to(source).as_posix(),
                "id": path.stem + (f"@{piece.offset}" if piece.offset else ""),
                "text": piece.text,
                "text_alt": piece.text_alt,
                "offset": piece.offset,
                "duration": piece.duration,
                "speaker": contributor.id,
                "etiology": contributor.etiology,
                "severity": contributor.severity,
            }
            split = splits.get(contributor.id) or _split_of(contributor.path, source) or _split_of(path, source)
            filled = {field: value for field, value in values.items() if value}
            where = f"{contributor.path}: file {number}" + (f", from {piece.offset} s" if piece.offset else "")
            yield TableRow(where, {"split": split, **filled}, path.resolve())


def _split_of(path: Path, source: Path) -> str:
    """The split whose name is that of a folder between `source` and a file; empty without such a folder."""
    names = (part.lower() for part in path.relative_to(source).parts[:-1])
    return next((SPLITS[name] for name in names if name in SPLITS), "")


@dataclass(frozen=True, slots=True)
class Reference:
    """Transcript of a recording, or of its part from `offset` with `duration` (seconds, as text; empty for all)."""

    text: str
    text_alt: str = ""
    offset: str = ""
    duration: str = ""


def read_transcript(transcript: str) -> tuple[list[Reference], str]:
    """The references in a transcript with the guidelines' marks, or the reason why there is none.

    `(uh)`, `(s-)`: disfluencies, only in the second reference; `(cs: Go on)`: speech, kept; `{g: idol}`: a guess, kept;
    `{w: 2}`, `{u: }`, `{f: }`: unknown words; `[PII]`, `[…]`: silenced, or a comment; `~N ~P ~R`: letters; `#ts`: a
    line for each piece, with its start and end in seconds; `#dis` and the like: a code.

    Returns:
        (pieces, ""), or ([], the reason).
    """
    lines = transcript.strip().replace("\r", "\n").split("\n")
    code = lines[0].strip().lower() if lines[0].strip().startswith("#") else ""
    if code:
        lines = lines[1:]
    bare = " ".join(lines).strip()
    if not bare or bare in CODES:
        return [], "without a transcript"
    if re.search(r"\{\s*(?:[wuf]\s*:[^}]*)?\}", bare):
        return [], "with unintelligible words"
    pieces = _timed(lines) if code == "#ts" else [Reference("\n".join(lines))]
    pieces = [replace(piece, **_references(piece.text)) for piece in pieces]
    pieces = [piece for piece in pieces if piece.text]
    return pieces, "" if pieces else "without a transcript"


def _timed(lines: Sequence[str]) -> list[Reference]:
    pieces = []
    for line in lines:
        match = re.match(r"\s*(\d+(?:\.\d*)?)\s+(\d+(?:\.\d*)?)\s+(\S.*)", line)
        if match and float(match[1]) < float(match[2]):
            seconds = float(match[2]) - float(match[1])
            pieces.append(Reference(match[3], offset=f"{float(match[1]):g}", duration=f"{seconds:.3f}"))
    return pieces


def _references(marked: str) -> dict[str, str]:
    """The text without disfluencies and, if different, with them."""
    plain = re.sub(r"\[[^\]]*\]", " ", marked)
    plain = re.sub(r"\{\s*\w+\s*:([^}]*)\}", r"\1", plain)
    plain = re.sub(r"\(\s*\w+\s*:([^)]*)\)", r"\1", plain)
    plain = mend(plain.replace("~", "").replace("*", ""))
    fluent = " ".join(re.sub(r"\([^)]*\)", " ", plain).split())
    verbatim = " ".join(re.sub(r"[()]", " ", plain).split())
    return {"text": fluent or verbatim, "text_alt": verbatim if fluent and verbatim != fluent else ""}
