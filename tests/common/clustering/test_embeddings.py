"""Embeddings of speakers: one in each split, and so one routing."""

import numpy as np
import pytest
import torch

from common.clustering.embeddings import EmbeddingTable, speaker_means
from common.data.corpus import Utterance
from common.errors import DataError
from common.model.moe import Gate, route


def spoken(split: str, speaker: str, number: int) -> Utterance:
    return Utterance(f"{split}-{speaker}-{number}", "a.wav", 1.0, "text", split=split, speaker=speaker)


def test_a_speaker_has_one_embedding_in_each_split_and_so_one_routing():
    utterances = [
        spoken(split, speaker, n) for split in ("dev", "test") for speaker in ("a", "b", "") for n in range(3)
    ]
    generator = np.random.default_rng(0)
    vectors_ND = generator.normal(size=(len(utterances), 4)).astype(np.float32)
    table = EmbeddingTable(tuple(u.id for u in utterances), vectors_ND)
    means = speaker_means(table, utterances)
    gate = Gate(4, 8, 3)
    for split in ("dev", "test"):
        for speaker in ("a", "b"):
            ids = [u.id for u in utterances if (u.split, u.speaker) == (split, speaker)]
            np.testing.assert_allclose(means.rows(ids), [table.rows(ids).mean(0)] * 3, rtol=1e-6)
            ids_BK = route(gate(torch.from_numpy(means.rows(ids))), 2).topk_ids_BK
            assert len(ids_BK.unique(dim=0)) == 1
    unknown = [u.id for u in utterances if not u.speaker]
    np.testing.assert_array_equal(means.rows(unknown), table.rows(unknown))


def test_routing_by_speaker_needs_speakers():
    table = EmbeddingTable(("x",), np.zeros((1, 2), np.float32))
    with pytest.raises(DataError, match=r"asr\.route_by=speaker needs speakers"):
        speaker_means(table, [Utterance("x", "a.wav", 1.0, "text")])
