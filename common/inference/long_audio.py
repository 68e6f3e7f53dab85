"""Treatment of utterances that are too long for Whisper: they are an error, omitted, or cut into pieces.

This is done only when a corpus is opened for a run: later code never handles long utterances, and nothing is truncated.
`common.inference.segment` cuts utterances; this module stores the resulting table of pieces.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.corpus import Corpus, Utterance, index_digest
from common.data.sources import locate_model, model_digest
from common.errors import DataError
from common.files import MAX_FILE, explained
from common.storage import open_store
from common.whisper_limits import MAX_SECONDS, MAX_TOKENS, is_too_long

if TYPE_CHECKING:
    from common.inference.load_model import OpenedModel

log = logging.getLogger(__name__)
FORMAT = 1  # of the table of pieces; another one makes them again
SHORT_TEXT = MAX_TOKENS - 8  # bytes: a token has at least one, so a text of fewer fits with its special tokens
GROUP_SECONDS = 900.0  # of audio that are divided together: their windows fill batches; then they are kept


@dataclass(frozen=True, slots=True)
class LongUtterance:
    """Result for one long utterance: its pieces, or the reason why there are none (see `segment.Division`)."""

    id: str
    pieces: tuple[Utterance, ...]
    seconds: float
    unspoken: float = 0.0
    matched: float = 0.0
    hard_cuts: int = 0
    problem: str = ""

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> LongUtterance:
        """The row of a record that `asdict` made."""
        return LongUtterance(**{**record, "pieces": tuple(Utterance(**piece) for piece in record["pieces"])})


@dataclass(frozen=True, slots=True)
class LongAudio:
    """Treatment of long utterances, and the model that aligns the words of utterances that are cut.

    Attributes:
        treatment: `error`, `drop`, or `segment` (cut at pauses).
        model, revision: base model, as in `data.sources.locate_model`.
        language, task: language and task of the model's texts.
        context, margin: audio context and margin.
        device, precision: as in the configuration.
        store, endpoint_url: store of the table of pieces, for all processes.
        quiet: show no progress bar.
    """

    treatment: str
    model: str
    store: str
    revision: str | None = None
    language: str = "en"
    task: str = "transcribe"
    context: str = "dynamic"
    margin: int = 64
    device: str = "auto"
    precision: str = "auto"
    endpoint_url: str | None = None
    quiet: bool = False

    def model_folder(self, cache: Path) -> Path:
        """The local folder of the base model; a remote model is downloaded."""
        return locate_model(self.model, cache, revision=self.revision, endpoint_url=self.endpoint_url)


def within_limits(corpus: Corpus, options: LongAudio, cache: Path) -> Corpus:
    """The corpus after treatment of utterances over 30 s or 448 tokens.

    Raises:
        DataError: there are long utterances, and they are to be treated as an error.
    """
    too_long = long_utterances(corpus.utterances, lambda: _token_counter(options, cache))
    if not too_long:
        return corpus
    hours = sum(u.duration for u in too_long) / 3600
    count = f"{len(too_long)} of {len(corpus.utterances)} utterances ({hours:.2f} h) are over {MAX_SECONDS:.0f} s"
    count += f" or {MAX_TOKENS} tokens"
    if options.treatment == "error":
        longest = max(too_long, key=lambda u: u.duration)
        raise DataError(
            f"corpus {corpus.url}: {count} (the longest: {longest.id}, {longest.duration:.1f} s), more than Whisper "
            "processes at once: --use-chunking (audio.long_audio=segment) cuts them at pauses, audio.long_audio=drop "
            "omits them; nothing is truncated"
        )
    if options.treatment == "drop":
        _say_once(f"long audio: {count}; omitted (audio.long_audio=drop)")
        return with_pieces(corpus, too_long, {})
    rows = _kept_rows(corpus, too_long, options, cache)
    _say_once(f"long audio: {count}; {summary(too_long, rows)}")
    return with_pieces(corpus, too_long, rows)


def long_utterances(utterances: Iterable[Utterance], counter: Callable[[], Callable[[str], int]]) -> list[Utterance]:
    """The utterances over 30 s or over 448 tokens.

    Args:
        counter: makes the function that counts the tokens of a text; called only if a text may be too long.
    """
    count: Callable[[str], int] | None = None
    too_long = []
    for u in utterances:
        if is_too_long(u.duration):
            too_long.append(u)
        elif len(u.text) > SHORT_TEXT // 4 and len(u.text.encode()) > SHORT_TEXT:
            count = count or counter()
            if count(u.text) > MAX_TOKENS:
                too_long.append(u)
    return too_long


def _token_counter(options: LongAudio, cache: Path) -> Callable[[str], int]:
    from common.data.tokens import load_codec

    return load_codec(options.model_folder(cache), language=options.language, task=options.task).length


def with_pieces(corpus: Corpus, too_long: Sequence[Utterance], rows: Mapping[str, LongUtterance]) -> Corpus:
    """The corpus with pieces instead of its long utterances; long utterances without pieces are omitted.

    Raises:
        DataError: a piece's id is another utterance's.
    """
    gone = {u.id for u in too_long}
    kept = [u for u in corpus.utterances if u.id not in gone]
    pieces = [piece for u in too_long if u.id in rows for piece in rows[u.id].pieces]
    if taken := {u.id for u in kept} & {piece.id for piece in pieces}:
        raise DataError(f"{min(taken)} would be a piece of a long utterance, but is the id of another: rename that one")
    utterances = tuple(sorted([*kept, *pieces], key=lambda u: u.id))
    if not utterances:
        raise DataError(f"corpus {corpus.url}: nothing is left without its {len(too_long)} long utterances")
    return replace(corpus, utterances=utterances, digest=index_digest(utterances))


def summary(too_long: Sequence[Utterance], rows: Mapping[str, LongUtterance]) -> str:
    """Result of the segmentation, in one line."""
    cuts = [rows[u.id] for u in too_long]
    pieces = [piece for row in cuts for piece in row.pieces]
    text = f"cut into {len(pieces)} pieces"
    if pieces:
        text += f" of {sum(p.duration for p in pieces) / len(pieces):.1f} s on average"
    if hard := sum(row.hard_cuts for row in cuts):
        text += f", {hard} cuts where no pause was near"
    if (unspoken := round(sum(row.unspoken for row in cuts if row.pieces), 1)) > 0:
        text += f", {unspoken:.1f} s of silence omitted"
    if lost := [row for row in cuts if not row.pieces]:
        text += f"; {len(lost)} omitted ({lost[0].id}: {lost[0].problem})"
    doubtful = [row for row in cuts if row.pieces and row.matched < 0.2]
    if doubtful:
        text += f"; of {len(doubtful)} the model recognised less than a fifth as written ({doubtful[0].id}): check them"
    return text


@lru_cache(maxsize=64)
def _say_once(line: str) -> None:
    """Logs a message only once per process, since every stage of a run opens the corpus."""
    log.warning("%s", line)


def _kept_rows(
    corpus: Corpus, too_long: Sequence[Utterance], options: LongAudio, cache: Path
) -> dict[str, LongUtterance]:
    """The table of pieces: from the store if it exists, otherwise computed and stored for all other processes."""
    settings = [options.language, options.task, options.context, options.margin]
    digest = model_digest(options.model, cache, revision=options.revision, endpoint_url=options.endpoint_url)
    key = table_key(corpus, digest, settings)
    store = open_store(options.store, endpoint_url=options.endpoint_url)
    name = f"segmented/{key}.jsonl"
    if store.size(name) is None:
        from common.inference.load_model import open_model

        log.info("%d long utterances are cut at pauses (kept as %s in %s)", len(too_long), name, store.url)
        opened = open_model(
            str(options.model_folder(cache)),
            store=None,
            cache=cache,
            device=options.device,
            precision=options.precision,
            language=options.language,
            task=options.task,
            context=options.context,
            margin=options.margin if options.context == "dynamic" else None,
        )
        unfinished = cache / "segmented" / f"{key}.jsonl"
        rows = segment_long(opened, corpus, too_long, unfinished, quiet=options.quiet)
        store.put_if_absent(name, "".join(_line(row) for row in rows.values()).encode())
        unfinished.unlink(missing_ok=True)
    return {row.id: row for row in _rows(store.read(name, MAX_FILE).decode())}


def table_key(corpus: Corpus, model: str, settings: Sequence[Any]) -> str:
    """The key of a corpus's table of pieces, made with a given model."""
    ingredients = [FORMAT, corpus.digest, model, *settings]
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:32]


def segment_long(
    opened: OpenedModel, corpus: Corpus, too_long: Sequence[Utterance], unfinished: Path, *, quiet: bool = False
) -> dict[str, LongUtterance]:
    """Divides long utterances; continues an interrupted segmentation.

    Args:
        too_long: utterances longer than the audio context.
        unfinished: the file with the rows that are finished so far.

    Raises:
        DataError: audio cannot be read.
    """
    from common.data.audio import read_utterance
    from common.inference.segment import divide
    from common.progress import progress

    with explained(unfinished):
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        done = {row.id: row for row in _rows(unfinished.read_text("utf-8"))} if unfinished.exists() else {}
    waiting = [u for u in too_long if u.id not in done]
    bar = progress(round(sum(u.duration for u in waiting), 1), "segment", unit="s", hidden=quiet or not waiting)
    for group in _groups(waiting):
        audios = [read_utterance(corpus, u) for u in group]
        rows = [
            LongUtterance(u.id, d.pieces, u.duration, d.unspoken, d.matched, d.hard_cuts, d.problem)
            for u, d in zip(group, divide(opened, group, audios, bar.update), strict=True)
        ]
        done |= {row.id: row for row in rows}
        _append(unfinished, rows)
    bar.close()
    return {u.id: done[u.id] for u in too_long}


def _groups(utterances: Sequence[Utterance]) -> Iterator[list[Utterance]]:
    group: list[Utterance] = []
    for utterance in utterances:
        group.append(utterance)
        if sum(u.duration for u in group) >= GROUP_SECONDS:
            yield group
            group = []
    if group:
        yield group


def _line(row: LongUtterance) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _append(path: Path, rows: Sequence[LongUtterance]) -> None:
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _rows(text: str) -> Iterator[LongUtterance]:
    """The rows of a table, without a last line that a killed process left half written."""
    for line in text.split("\n"):  # `splitlines` would also cut at separators inside of a text
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            yield LongUtterance.from_record(json.loads(line))
