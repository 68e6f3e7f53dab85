"""Train, dev and test: their names, and the assignment of whole speakers to them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from common.data.corpus import Utterance

FRACTIONS = (0.8, 0.1, 0.1)  # of the speakers: train, dev, test
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "development", "val", "valid", "validation", "eval"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_by_speaker(utterances: Sequence[Utterance], *, fractions: Sequence[float], seed: int) -> list[Utterance]:
    """Assign whole speakers to train, dev and test, separately for each etiology, so that every split has all
    etiologies.

    An etiology of two speakers goes to train and test, one of three or more to all splits (whose fraction is above 0).
    An utterance without a speaker counts as a separate speaker, together with others that are cut out of the same file.
    The result depends only on seed and names.

    Args:
        fractions: of train, dev and test, each at least 0, summing to 1.
    """
    first_of: dict[str, str] = {}  # file → its first id
    for u in utterances:
        first_of[u.audio_filepath] = min(u.id, first_of.get(u.audio_filepath, u.id))
    speaker_of = [
        f"speaker {u.speaker}" if u.speaker else f"utterance {first_of[u.audio_filepath]}" for u in utterances
    ]
    etiology_of: dict[str, str] = {}
    for u, speaker in zip(utterances, speaker_of, strict=True):
        etiology_of[speaker] = min(u.etiology, etiology_of.get(speaker, u.etiology))
    strata: dict[str, list[str]] = defaultdict(list)
    for speaker, etiology in etiology_of.items():
        strata[etiology].append(speaker)
    split_of: dict[str, str] = {}
    for speakers in strata.values():
        speakers.sort(key=lambda speaker: hashlib.sha256(f"{seed}\0{speaker}".encode()).digest())
        split_of |= dict(zip(speakers, _deal(len(speakers), fractions), strict=True))
    return [replace(u, split=split_of[speaker]) for u, speaker in zip(utterances, speaker_of, strict=True)]


def _deal(count: int, fractions: Sequence[float]) -> list[str]:
    """The names of `count` splits: test first, then dev, the rest train."""
    test = max(1, round(count * fractions[2])) if fractions[2] and count >= 2 else 0
    dev = max(1, round(count * fractions[1])) if fractions[1] and count >= 3 else 0
    return (["test"] * test + ["dev"] * dev + ["train"] * count)[:count]
