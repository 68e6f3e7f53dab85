"""The groups for routing by a table: a column of the corpus, or one of the benchmark's two controls."""

import hashlib
from collections.abc import Sequence

from common.data.corpus import Utterance

ONE, SHUFFLED = "none", "shuffled"  # the controls: one group for all; groups drawn by speaker
EVERYBODY = "everybody"


def shuffled_names(count: int, seed: int) -> tuple[str, ...]:
    """The names of randomly drawn groups; the names contain the seed."""
    return tuple(f"{seed}-{number}" for number in range(count))


def group_values(utterances: Sequence[Utterance], column: str, groups: Sequence[str] = ()) -> list[str]:
    """The group of each utterance.

    A randomly drawn group depends only on seed and speaker (or on the id of an utterance without a speaker), so that a
    speaker has the same group in every split, and speakers who are not in the training data have a group too.

    Args:
        column: etiology, severity or speaker, or a control.
        groups: the names of the groups, for `shuffled`.
    """
    if column == ONE:
        return [EVERYBODY] * len(utterances)
    if column == SHUFFLED:
        return [groups[_draw(u.speaker or u.id, groups)] for u in utterances]
    return [str(getattr(u, column)) for u in utterances]


def _draw(name: str, groups: Sequence[str]) -> int:
    seed = groups[0].rpartition("-")[0]
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % len(groups)
