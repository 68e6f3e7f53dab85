"""Routing by utterance, speaker or table, and by the gate where a table says nothing."""

from dataclasses import replace

import pytest
import torch

from common.data.corpus import Utterance
from common.inference.choose_experts import choose_experts
from tests.factories import fitted_gate

CPU = torch.device("cpu")
GROUPS = ("a", "b", "c")


@pytest.fixture(scope="module")
def speech():
    """Ten utterances of a speaker of each of three groups, ten of a stranger, and a gate that knows the groups."""
    generator = torch.Generator().manual_seed(0)
    center = torch.eye(3, 6) * 5
    gate, _ = fitted_gate(center, 40, generator)
    embedding = torch.cat([center[g] + torch.randn(10, 6, generator=generator) for g in range(3)])
    embedding = torch.cat([embedding, torch.randn(10, 6, generator=generator) - 12])
    utterances = [
        Utterance(f"{name}{n}", "x.wav", 1.0, "x", "test", name, etiology=name)
        for name in (*GROUPS, "d")
        for n in range(10)
    ]
    with torch.no_grad():
        return utterances, gate, gate.evidence(embedding)


def chosen(speech, utterances, by, gate=True, groups=GROUPS):
    _, own, evidence = speech
    return choose_experts(
        utterances, lambda: evidence, own if gate else None, by=by, column="etiology", groups=groups, device=CPU
    )


def test_a_table_decides_where_it_knows_the_group_without_asking_the_gate(speech):
    utterances, gate, _ = speech
    known = utterances[:30]

    def evidence():
        raise AssertionError("not needed")

    logits, known_N = choose_experts(known, evidence, gate, by="table", column="etiology", groups=GROUPS, device=CPU)
    assert logits.argmax(1).tolist() == [0] * 10 + [1] * 10 + [2] * 10 and known_N.all()


def test_the_gate_decides_for_a_speaker_whose_group_is_unknown(speech):
    utterances, gate, evidence = speech
    blank = [replace(u, etiology="") if u.speaker in ("b", "d") else u for u in utterances]
    logits, known = chosen(speech, blank, "table")
    sums, near = gate.decide(evidence[10:20].sum(0, keepdim=True))
    assert known.tolist() == [True] * 10 + near.tolist() * 10 + [True] * 10 + [False] * 10
    torch.testing.assert_close(logits[10:20], sums.expand(10, -1))
    assert torch.equal(logits[:10], chosen(speech, utterances, "table")[0][:10])


def test_without_speakers_the_gate_decides_for_each_utterance(speech):
    utterances, gate, evidence = speech
    blank = [replace(u, etiology="", speaker="") for u in utterances]
    logits, known = chosen(speech, blank, "table")
    expected = gate.decide(evidence)
    assert torch.equal(logits, expected[0]) and torch.equal(known, expected[1])
    assert torch.equal(chosen(speech, utterances, "utterance")[0], expected[0])


def test_groups_are_found_in_whatever_spelling(speech):
    utterances = speech[0]
    shouted = [replace(u, etiology=u.etiology.upper()) for u in utterances]
    assert shouted != utterances
    for mine, theirs in zip(chosen(speech, utterances, "table"), chosen(speech, shouted, "table"), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_gate_unknown_groups_use_the_shared_expert(speech):
    utterances = [replace(u, etiology="") if u.speaker == "b" else u for u in speech[0]]
    known = chosen(speech, utterances, "table", gate=False)[1]
    assert known.tolist() == [True] * 10 + [False] * 10 + [True] * 10 + [False] * 10
