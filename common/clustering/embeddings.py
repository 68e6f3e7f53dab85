"""Tables of pooled embeddings: one row per utterance, in shards as the extract stage wrote them.

Shape letters: N utterances, D width, G groups of a speaker's utterances in one split.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.data.corpus import Utterance
from common.errors import DataError

VECTORS, IDS = "embeddings.npy", "ids.json"


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings by utterance id."""

    ids: tuple[str, ...]
    vectors_ND: npt.NDArray[np.float32]

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """The embeddings of `ids`, in that order.

        Raises:
            DataError: an id is not in the table.
        """
        try:
            return self.vectors_ND[np.fromiter((self._row_of[name] for name in ids), np.int64, len(ids))]
        except KeyError as missing:
            raise DataError(f"utterance {missing} has no embedding: was the corpus changed after `extract`?") from None


def speaker_sums(values_NF: npt.NDArray[np.float32], utterances: Sequence[Utterance]) -> npt.NDArray[np.float32]:
    """For each utterance, the sum over its speaker's utterances in its split; its own values if it has no speaker.

    Decisions based on these sums are the same for all of a speaker's utterances. They use utterances other than the
    transcribed one, so that a system that uses them needs some speech of the speaker beforehand.

    Args:
        values_NF: of the utterances, in their order.

    Raises:
        DataError: none has a speaker.
    """
    if not any(u.speaker for u in utterances):
        raise DataError("asr.route_by=speaker needs speakers, and no utterance of the corpus has one: add `speaker`")
    number_of: dict[tuple[str, str], int] = {}
    group_N = np.array([number_of.setdefault((u.split, u.speaker or f"\0{u.id}"), len(number_of)) for u in utterances])
    sums_GF = np.zeros((len(number_of), values_NF.shape[1]), np.float64)
    np.add.at(sums_GF, group_N, values_NF)
    spread_NF: npt.NDArray[np.float32] = sums_GF[group_N].astype(np.float32)
    return spread_NF


def write_table(folder: Path, ids: Sequence[str], vectors_ND: npt.NDArray[np.float32]) -> None:
    """Writes one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / VECTORS, vectors_ND.astype(np.float32, copy=False), allow_pickle=False)
    (folder / IDS).write_text(json.dumps(list(ids)), encoding="utf-8")


def read_tables(folders: Sequence[Path]) -> EmbeddingTable:
    """Reads all shards into one table.

    Raises:
        DataError: a file is missing or invalid.
    """
    ids: list[str] = []
    parts = []
    for folder in folders:
        try:
            vectors_ND = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            names = json.loads((folder / IDS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"embeddings in {folder} cannot be read: {error}") from None
        if len(names) != len(vectors_ND):
            raise DataError(f"embeddings in {folder}: {len(names)} ids for {len(vectors_ND)} rows")
        ids += names
        parts.append(vectors_ND)
    return EmbeddingTable(tuple(ids), _joined(parts))


def _joined(parts: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """All rows in memory; each part's mapping is released after copying, so that no data is held twice."""
    whole_ND = np.empty((sum(map(len, parts)), parts[0].shape[1] if parts else 0), np.float32)
    row = 0
    while parts:
        part = parts.pop(0)
        whole_ND[row : row + len(part)] = part
        row += len(part)
    return whole_ND
