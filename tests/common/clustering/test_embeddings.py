"""Sums over speakers: one in each split, and so one routing."""

import numpy as np
import pytest
import torch

from common.clustering.embeddings import speaker_sums
from common.data.corpus import Utterance
from common.errors import DataError
from common.model.gate import Gate
from common.model.routing import route


def spoken(split: str, speaker: str, number: int) -> Utterance:
    return Utterance(f"{split}-{speaker}-{number}", "a.wav", 1.0, "text", split=split, speaker=speaker)


def test_a_speakers_utterances_decide_together_in_each_split():
    utterances = [
        spoken(split, speaker, n) for split in ("dev", "test") for speaker in ("a", "b", "") for n in range(3)
    ]
    embedding_ND = torch.randn(len(utterances), 4, generator=torch.Generator().manual_seed(0))
    gate = Gate(4, 8, 3).eval()
    with torch.no_grad():
        own_NF = gate.evidence(embedding_ND).numpy()
    sums_NF = speaker_sums(own_NF, utterances)
    for split in ("dev", "test"):
        for speaker in ("a", "b"):
            rows = [i for i, u in enumerate(utterances) if (u.split, u.speaker) == (split, speaker)]
            np.testing.assert_allclose(sums_NF[rows], [own_NF[rows].sum(0)] * 3, rtol=1e-5)
            routing = route(gate.decide(torch.from_numpy(sums_NF[rows]))[0], 2)
            assert len(routing.topk_ids_BK.unique(dim=0)) == 1
    unknown = [i for i, u in enumerate(utterances) if not u.speaker]
    np.testing.assert_array_equal(sums_NF[unknown], own_NF[unknown])


def test_routing_by_speaker_needs_speakers():
    with pytest.raises(DataError, match=r"asr\.route_by=speaker needs speakers"):
        speaker_sums(np.zeros((1, 4), np.float32), [Utterance("x", "a.wav", 1.0, "text")])
