"""Finds and checks the utterances of a corpus on which an added expert is trained."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from common.data.audio import read_utterance
from common.data.corpus import IDENTITIES, Corpus, Utterance
from common.decoding.pauses import is_silent, loudness
from common.errors import DataError, UsageError
from common.inference.added_experts import nearest

log = logging.getLogger(__name__)
FEW = 10  # utterances below which a gain is hardly measured
MOST = 0.75  # share of the utterances in one part, above which cross-validation measures little
SHOWN = 3  # utterances in a message


def parse_where(text: str) -> tuple[str, str]:
    """`etiology=ataxia` → ("etiology", "ataxia").

    Raises:
        UsageError: the text is not such a condition.
    """
    column, equals, value = text.partition("=")
    if not equals or not value:
        raise UsageError(f"--where {text}: write it as COLUMN=VALUE, as etiology=ataxia")
    if column not in IDENTITIES:
        raise UsageError(f"--where {text}: a corpus has no column {column!r}{nearest(column, IDENTITIES)}")
    return column, value


def enrolled(corpus: Corpus, column: str, value: str) -> list[Utterance]:
    """The utterances of a speaker or group outside of test, sorted by id.

    Raises:
        DataError: there are no such utterances, or test contains the same stretch of the same recording.
    """
    own = [u for u in corpus.utterances if getattr(u, column) == value]
    chosen, held_out = [u for u in own if u.split != "test"], [u for u in corpus.utterances if u.split == "test"]
    if not own:
        known = sorted({getattr(u, column) for u in corpus.utterances} - {""})
        hint = nearest(value, known) if known else f"; its column {column} is empty"
        raise DataError(f"corpus {corpus.url} has no utterance of {column} {value!r}{hint}")
    if not chosen:
        raise DataError(
            f"all {len(own)} utterances of {column} {value!r} are in split test, which is never used for training: "
            "put some of them into train"
        )
    _refuse_overlap(chosen, held_out)
    return chosen


def _refuse_overlap(chosen: Sequence[Utterance], held_out: Sequence[Utterance]) -> None:
    tested: dict[str, list[Utterance]] = {}
    for u in held_out:
        tested.setdefault(u.audio_filepath, []).append(u)
    for u in chosen:
        for other in tested.get(u.audio_filepath, ()):
            if u.offset < other.offset + other.duration and other.offset < u.offset + u.duration:
                raise DataError(
                    f"utterance {u.id} of the enrolment and utterance {other.id} of test are the same stretch of "
                    f"{u.audio_filepath}: a gain measured there would mean nothing; remove one of them"
                )


def audible(corpus: Corpus, utterances: Sequence[Utterance]) -> list[Utterance]:
    """The utterances that are not silent; silent utterances are named in a warning.

    Raises:
        DataError: all are silent.
    """
    silent = [u for u in utterances if is_silent(loudness(read_utterance(corpus, u)))]
    if len(silent) == len(utterances):
        raise DataError(f"all {len(silent)} utterances of the enrolment are silent: check the recording")
    if silent:
        log.warning("%d utterances are silent and are omitted: %s", len(silent), _names(silent))
    kept = [u for u in utterances if u not in silent]
    if len(kept) < FEW:
        log.warning("only %d utterances: below %d the expected gain is unreliable", len(kept), FEW)
    return kept


def groups_of(utterances: Sequence[Utterance]) -> list[str]:
    """Groups that cross-validation must not divide: speakers if there are several, otherwise sessions.

    A session is a folder of recordings, unless one folder holds most of them; then, a recording.
    """
    speakers = [u.speaker for u in utterances]
    if len(set(speakers)) > 1:
        return speakers
    folders = [str(PurePosixPath(u.audio_filepath).parent) for u in utterances]
    largest = max(Counter(folders).values())
    return folders if largest <= MOST * len(folders) else [u.audio_filepath for u in utterances]


def warn_of_strange_texts(utterances: Sequence[Utterance], gains: Sequence[float]) -> None:
    """Logs the names of utterances whose text is not more likely with their own audio than with another utterance's.

    Args:
        gains: gain in log-likelihood by the own audio, in nats per token.
    """
    strange = [u for u, gain in zip(utterances, gains, strict=True) if gain <= 0]
    if strange:
        log.warning(
            "%d of %d texts fit their own audio no better than another utterance's (%s): wrong texts, another "
            "language, or speech that the model does not understand yet; check them",
            *(len(strange), len(utterances), _names(strange)),
        )


def rotation(utterances: Sequence[Utterance]) -> list[int]:
    """For each utterance, the number of another utterance with another text; its own number if there is none."""
    count = len(utterances)
    partners = []
    for number, u in enumerate(utterances):
        others = ((number + step) % count for step in range(1, count))
        partners.append(next((other for other in others if utterances[other].text != u.text), number))
    return partners


def _names(utterances: Sequence[Utterance]) -> str:
    shown = ", ".join(u.id for u in utterances[:SHOWN])
    return shown + (f" and {len(utterances) - SHOWN} more" if len(utterances) > SHOWN else "")
