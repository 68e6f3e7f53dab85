"""The groups on which a gate is trained: clusters, or the values of a column of the corpus."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.data.corpus import Utterance
from common.errors import DataError
from common.json_files import Row


@dataclass(frozen=True)
class Groups:
    """Utterances with the group of each.

    Attributes:
        numbers: number of each utterance's group.
        names: names of the groups, by number.
    """

    utterances: tuple[Utterance, ...]
    numbers: tuple[int, ...]
    names: tuple[str, ...]


def clustered_groups(train: Sequence[Utterance], assignments: Sequence[Row]) -> Groups:
    """The clusters.

    Args:
        assignments: rows of the cluster stage.
    """
    utterance_of = {u.id: u for u in train}
    numbers = tuple(int(row["cluster"]) for row in assignments)
    names = tuple(f"cluster {number}" for number in range(max(numbers) + 1))
    return Groups(tuple(utterance_of[row["id"]] for row in assignments), numbers, names)


def labelled_groups(train: Sequence[Utterance], embedded: Collection[str], column: str) -> Groups:
    """The values of a column, for all embedded training utterances with a value, not only for clustered utterances.

    Raises:
        DataError: no utterance has a value.
    """
    known = set(embedded)
    utterances = tuple(u for u in train if u.id in known and getattr(u, column))
    if not utterances:
        raise DataError(
            f"gating.target: the corpus's column {column!r} is empty in train: name another column, or train the gate "
            "on clusters (gating.target=cluster)"
        )
    names = tuple(sorted({str(getattr(u, column)) for u in utterances}))
    number_of = {name: number for number, name in enumerate(names)}
    return Groups(utterances, tuple(number_of[getattr(u, column)] for u in utterances), names)
