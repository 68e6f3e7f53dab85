"""The gate's report: hand-computed calibration, votes of neighbours, one routing per speaker, numbers of experts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.clustering.embeddings import EmbeddingTable, speaker_means
from common.config import validate
from common.data.batches import BatchLoader, make_examples
from common.data.corpus import Utterance, read_corpus
from common.data.tokens import load_codec
from common.decoding.decode import Decoding
from common.errors import DataError
from common.evaluation import gate_run
from common.evaluation.gate_quality import (
    DecodingSet,
    NearestClusters,
    calibration,
    decode_with,
    sensitivity,
    speaker_consistency,
)
from common.evaluation.gate_report import gate_report
from common.evaluation.score import decode_set
from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser, RouterOptions
from common.model.routing import route
from common.model.whisper import load_whisper
from common.training.train import make_accelerator

EXPERTS = 3


def test_calibration_error_is_the_hand_computed_one():
    probability_NK = np.array([[0.95, 0.05], [0.15, 0.85], [0.85, 0.15], [0.45, 0.55]], np.float32)
    report = gate_report(probability_NK, np.array([0, 0, 0, 1]))
    # Bins of a tenth: 0.95 is right; of the two at 0.85 one is; 0.55 is right.
    assert report["expected_calibration_error"] == pytest.approx((0.05 + 2 * 0.35 + 0.45) / 4, abs=1e-6)
    assert [(row["count"], row["accuracy"]) for row in report["reliability"]] == [(1, 1.0), (2, 0.5), (1, 1.0)]
    assert report["accuracy"] == 0.75


def test_a_gate_that_is_sure_and_right_is_calibrated():
    gate = Gate(2, 4, 2)
    with torch.no_grad():  # logits are 50 times the embedding
        gate.net[0] = torch.nn.Linear(2, 2)
        gate.net[1], gate.net[3] = torch.nn.Identity(), torch.nn.Identity()
        gate.net[0].weight.copy_(50 * torch.eye(2))
        gate.net[0].bias.zero_()
    vectors_ND = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    right = calibration(gate, vectors_ND, np.array([0, 1, 0]))
    assert right["accuracy"] == 1.0
    assert right["expected_calibration_error"] < 1e-6
    assert right["entropy"] < 1e-6
    assert calibration(gate, vectors_ND, np.array([1, 0, 1]))["expected_calibration_error"] > 0.99


def test_others_get_the_commonest_cluster_of_their_neighbours():
    generator = np.random.default_rng(0)
    vectors_MD = np.concatenate([generator.normal(place, 0.1, (40, 6)) for place in (0, 3)]).astype(np.float32)
    known = NearestClusters(vectors_MD, np.repeat([0, 1], 40))
    assert known.label(np.array([[0.2] * 6, [2.9] * 6], np.float32)).tolist() == [0, 1]
    assert known.agreement(seed=1) == 1.0
    mixed = NearestClusters(vectors_MD, generator.integers(0, 2, 80))
    assert 0.2 < mixed.agreement(seed=1) < 0.8


def test_few_clustered_utterances_are_enough_to_ask():
    known = NearestClusters(np.array([[0.0], [1.0]], np.float32), np.array([0, 1]))
    assert known.label(np.array([[0.1], [2.0]], np.float32)).tolist() == [0, 1]
    assert known.agreement(seed=1) == 0.0  # the only other one is of the other cluster


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
    gate = Gate(4, 8, EXPERTS)
    for split in ("dev", "test"):
        for speaker in ("a", "b"):
            mine = [u.id for u in utterances if (u.split, u.speaker) == (split, speaker)]
            np.testing.assert_allclose(means.rows(mine), [table.rows(mine).mean(0)] * 3, rtol=1e-6)
            ids_BK = route(gate(torch.from_numpy(means.rows(mine))), 2).topk_ids_BK
            assert len(ids_BK.unique(dim=0)) == 1
    unknown = [u.id for u in utterances if not u.speaker]
    np.testing.assert_array_equal(means.rows(unknown), table.rows(unknown))
    assert speaker_consistency(gate, means, utterances[:6], 2)["same_expert"] == 1.0
    assert speaker_consistency(gate, table, utterances[6:9], 2) | {"same_expert": None, "speakers": 0} == (
        speaker_consistency(gate, table, utterances[6:9], 2)
    )


def test_routing_by_speaker_needs_speakers():
    table = EmbeddingTable(("x",), np.zeros((1, 2), np.float32))
    with pytest.raises(DataError, match=r"asr\.route_by=speaker needs speakers"):
        speaker_means(table, [Utterance("x", "a.wav", 1.0, "text")])


def test_all_experts_weigh_as_the_gates_probabilities():
    logits_BE = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(0))
    for count in (EXPERTS, EXPERTS + 4):
        chosen = route(logits_BE, count)
        weights_BE = torch.zeros_like(logits_BE).scatter(1, chosen.topk_ids_BK, chosen.topk_weights_BK)
        torch.testing.assert_close(weights_BE, logits_BE.softmax(1))


@pytest.fixture(scope="module")
def trained(micro_model, tones):
    """A mixture whose experts differ, and test utterances with embeddings."""
    torch.manual_seed(0)
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=["q_proj", "fc1", "fc2"], num_experts=EXPERTS, rank=2, alpha=8)
    for parameter in whisper.parameters():
        if parameter.requires_grad and parameter.ndim == 3:  # LoRA's B starts at zero, and experts would be equal
            torch.nn.init.normal_(parameter, std=0.5)
    recogniser = Recogniser(whisper, slot=slot, gate=Gate(8, 16, EXPERTS), options=RouterOptions(top_k=2)).eval()
    corpus = read_corpus(tones)
    utterances, codec = corpus.split("test")[:9], load_codec(micro_model)
    examples = make_examples(corpus, utterances, codec, context="dynamic", margin=64)
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    accelerator = make_accelerator("fp32", "cpu")
    data = DecodingSet(utterances, examples, loader, codec, Decoding(4, 6), accelerator, "en")
    vectors_ND = 3 * np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    return recogniser, data, EmbeddingTable(tuple(u.id for u in utterances), vectors_ND)


def test_decoding_with_other_numbers_leaves_the_model_as_it_was(trained):
    recogniser, data, table = trained
    none = decode_with(recogniser, data, table, 0)
    assert none == decode_set(
        recogniser, data.examples, data.loader, data.codec, data.decoding, data.accelerator, base=True
    )
    texts = {count: decode_with(recogniser, data, table, count) for count in (1, 2, 3, 7)}
    assert texts[3] == texts[7]
    assert texts[1] != none
    assert recogniser.options == RouterOptions(top_k=2)
    assert recogniser.embeddings_ND is None


def test_rows_hold_every_number_and_the_other_table_at_the_trained_one(trained):
    recogniser, data, table = trained
    tables = {"utterance": table, "speaker": speaker_means(table, data.utterances)}
    rows = sensitivity(recogniser, data, tables, counts=[0, 1], trained=(2, "utterance"))
    assert [(row["top_k"], row["route_by"], row["trained"]) for row in rows] == [
        (0, "utterance", False),
        (1, "utterance", False),
        (2, "utterance", True),
        (2, "speaker", False),
    ]
    assert rows[2]["changed"] == 0.0
    assert rows[0]["changed"] > 0
    assert all(row["interval"][0] <= row["wer"] <= row["interval"][1] for row in rows)


def test_a_mixture_that_is_not_blended_has_one_expert_always(trained):
    recogniser, data, table = trained
    recogniser.options = RouterOptions(mixture="hard", top_k=2)
    try:
        rows = sensitivity(recogniser, data, {"utterance": table}, counts=[0, 1, 2, 3], trained=(2, "utterance"))
    finally:
        recogniser.options = RouterOptions(top_k=2)
    assert [(row["top_k"], row["trained"]) for row in rows] == [(0, False), (1, True)]


def test_more_experts_per_utterance_than_clusters_were_found_count_as_all_of_them(trained, tones, monkeypatch):
    asked = {}
    monkeypatch.setattr(gate_run, "sensitivity", lambda *_, **given: asked.update(given) or [])
    recogniser, data, _ = trained
    info = SimpleNamespace(num_experts=EXPERTS, top_k=8, route_by="utterance")
    opened = SimpleNamespace(
        recogniser=recogniser,
        info=info,
        codec=data.codec,
        context="dynamic",
        margin=64,
        accelerator=data.accelerator,
        language="en",
    )
    split = {"test": list(data.utterances)}
    run = SimpleNamespace(opened=opened, corpus=read_corpus(tones), split=split, config=validate({}))
    gate_run._sensitivity(run, {}, (0, 1, 8))
    assert asked == {"counts": [0, 1, EXPERTS], "trained": (EXPERTS, "utterance")}
