"""TORGO (Rudzicz, Namasivayam & Wolff 2012, Language Resources and Evaluation 46): F01/Session1/prompts/0001.txt.

The folders `wav_headMic` and `wav_arrayMic` next to `prompts` were recorded at the same time. FC and MC are control
speakers.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Unpack

from common.data.importers.build import BuildOptions, build_corpus
from common.data.importers.folders import is_data
from common.data.importers.rows import Imported, TableRow
from common.errors import DataError

Microphone = Literal["head", "array", "both"]

SPEAKER = re.compile(r"(?P<group>[FM]C?)\d{2}")
SESSION = re.compile(r"Session.*", re.IGNORECASE)
# The groups of Espana-Bonet & Fonollosa (IberSPEECH 2016), after the corpus's Frenchay assessments. Papers differ about
# F03 alone, which some call mild.
SEVERITY = {
    **dict.fromkeys(("F01", "M01", "M02", "M04"), "severe"),
    "M05": "moderate to severe",
    "F03": "moderate",
    **dict.fromkeys(("F04", "M03"), "mild"),
}
DYSARTHRIA, CONTROL = "dysarthria", "control"  # which speaker has cerebral palsy and which ALS is not in the files


def import_torgo(
    folder: str | Path,
    out: str | Path,
    *,
    microphone: Microphone = "head",
    **options: Unpack[BuildOptions],
) -> Imported:
    """Make a corpus from TORGO's folders; there are no official splits, so speakers are assigned to splits.

    Prompts that are not text (a picture's path, `xxx`, an instruction in brackets) are omitted and counted; a comment
    in brackets next to a word is removed. Etiology is dysarthria or control.

    Args:
        folder: contains the speakers' folders, at any depth.
        out: the corpus folder to make, which must not exist or must be empty.
        microphone: `head` uses the array's recording if the head's is missing, and `array` the reverse; `both` makes
            two utterances of each.
        options: see `BuildOptions`.

    Raises:
        DataError: the folder does not have this structure, or nothing in it can be used.
        UsageError, StoreError, RetryableError: as in `import_table`.
    """
    source = Path(folder)
    sessions = [path for path in sorted(source.rglob("prompts")) if path.is_dir() and _is_session(path.parent)]
    if not sessions:
        raise DataError(
            f"{source} is not TORGO: it contains no SPEAKER/SessionN/prompts with a speaker like F01, M05, FC02 or MC04"
        )
    skipped: Counter[str] = Counter()
    rows = [row for prompts in sessions for row in _rows(prompts, source, microphone, skipped)]
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "no prompts"
        raise DataError(f"{source}: nothing in {len(sessions)} sessions can be used: {reasons}")
    return build_corpus(
        rows,
        Path(out),
        source={"format": "torgo", "source": str(folder), "microphone": microphone},
        skip_bad=True,
        fault_reason="with audio that cannot be read",
        skipped=skipped,
        **options,
    )


def _is_session(folder: Path) -> bool:
    return SESSION.fullmatch(folder.name) is not None and SPEAKER.fullmatch(folder.parent.name) is not None


def _rows(prompts: Path, source: Path, microphone: Microphone, skipped: Counter[str]) -> Iterator[TableRow]:
    session, speaker = prompts.parent, prompts.parent.parent.name
    control = speaker[1] == "C"
    for prompt in sorted(path for path in prompts.glob("*.txt") if is_data(path, prompts)):
        text = read_prompt(prompt.read_text(encoding="utf-8", errors="replace"))
        if not text:
            skipped["with a prompt that is no text"] += 1
            continue
        recordings = _recordings(session, prompt.stem, microphone)
        if not recordings:
            skipped["without their audio file"] += 1
        for name, audio in recordings:
            yield TableRow(
                str(prompt),
                {
                    "split": "",
                    "audio_filepath": audio.relative_to(source).as_posix(),
                    "id": f"{speaker}-{session.name}-{prompt.stem}-{name}",
                    "text": text,
                    "speaker": speaker,
                    "etiology": CONTROL if control else DYSARTHRIA,
                    "severity": CONTROL if control else SEVERITY.get(speaker, ""),
                },
                audio.resolve(),
            )


def read_prompt(prompt: str) -> str:
    """The text of a prompt, without comments in brackets; empty if the prompt is a picture, `xxx` or an instruction."""
    text = " ".join(re.sub(r"\[[^\]]*\]?", " ", prompt).split())
    if re.search(r"\.jpe?g\b|/|\bxxx\b|�", text, re.IGNORECASE):
        return ""
    return text


def _recordings(session: Path, stem: str, microphone: Microphone) -> list[tuple[str, Path]]:
    """The recording of the requested microphone, otherwise that of the other; both by name for `both`."""
    order = ("array", "head") if microphone == "array" else ("head", "array")
    candidates = [(name, session / f"wav_{name}Mic" / f"{stem}.wav") for name in order]
    there = [(name, path) for name, path in candidates if path.is_file()]
    return there if microphone == "both" else there[:1]
