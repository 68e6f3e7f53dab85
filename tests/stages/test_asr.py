"""Joint training: what its random parts are made from, and which experts are dropped after it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.clustering.embeddings import EmbeddingTable
from common.config import nest, validate
from common.data.batches import BatchLoader
from common.data.corpus import read_corpus
from common.data.tokens import load_codec
from common.model.mixture import add_mixture, mixture_layers
from common.model.recogniser import Recogniser, RouterOptions
from common.model.routing import route_by_table
from common.model.whisper import load_whisper
from common.pipeline.plan import group_keys
from common.training.train import make_accelerator
from stages import STAGES
from stages.asr.ablation import judge_experts, utterance_losses
from stages.asr.run import build
from stages.settings import speech_examples
from tests.common.model.test_mixture import randomise


def test_a_random_gate_takes_its_scale_from_the_training_utterances_alone(micro_model):
    config = validate({"num_experts": 2, "asr": {"pretrain": "none"}, "lora": {"targets": ["fc1"]}})
    vectors_ND = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    vectors_ND[4:] += 100  # dev and test are elsewhere
    table = EmbeddingTable(tuple("abcdef"), vectors_ND)
    gates = [build(config, micro_model, table, [], [], fit=fit).gate for fit in (["d", "b", "a", "c"], None)]
    for gate, rows_ND in zip(gates, (vectors_ND[:4], vectors_ND), strict=True):
        torch.testing.assert_close(gate.mean_D, torch.from_numpy(rows_ND.mean(0)))
        torch.testing.assert_close(gate.std_D, torch.from_numpy(rows_ND.std(0)))


@pytest.mark.parametrize(
    ("setting", "value", "one_adapter", "mixture"),
    [
        ("subsets.embeddings_percent", 50, False, True),  # a mixture's embeddings, gate and experts are inputs
        ("subsets.experts_samples", 9, False, True),
        ("extract.layer", 2, False, True),
        ("extract.pooling", "max", False, True),
        ("subsets.asr_percent", 50, True, True),
        ("subsets.dev_samples", 9, True, True),
        ("subsets.test_samples", 9, True, True),
    ],
)
@pytest.mark.parametrize("pretrain", ["none", "gate"])
def test_the_key_changes_with_what_the_model_depends_on(setting, value, one_adapter, mixture, pretrain):
    for experts, expected in ((1, one_adapter), (4, mixture)):
        before = {"num_experts": experts, "asr": {"pretrain": pretrain}}
        keys = [
            group_keys(STAGES, validate(tree), {"corpus": "c", "model": "m"})["model"]
            for tree in (before, before | nest(setting, value))
        ]
        assert (keys[0] != keys[1]) == expected


@pytest.fixture
def joint(micro_model, tones):
    """What dropping reads of a joint training: a random mixture with a shared expert, and eight utterances of dev."""
    config, corpus, accelerator = validate({}), read_corpus(tones), make_accelerator("fp32", "cpu")
    utterances = corpus.utterances[:8]
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=("q_proj", "fc1"), num_experts=3, rank=2, alpha=4, shared_rank=2)
    recogniser = Recogniser(whisper, slot=slot)
    randomise(recogniser, 2)
    examples = speech_examples(config, corpus, utterances, load_codec(micro_model, language="en"))
    loader = BatchLoader(examples, num_workers=0, device=accelerator.device)
    dev = SimpleNamespace(utterances=utterances, examples=examples, loader=loader)
    return SimpleNamespace(
        config=config, recogniser=recogniser, accelerator=accelerator, sets={"dev": dev}, point_at=lambda split: None
    )


def zeroed(recogniser):
    return [not any(layer.routed.lora_B[e].any() for _, layer in mixture_layers(recogniser)) for e in range(3)]


@pytest.mark.parametrize("mixture", ["blend", "hard"])
def test_experts_are_judged_by_what_dropping_them_changes(joint, mixture):
    """The losses of the model that is saved are those by which its experts were dropped or kept."""
    recogniser = joint.recogniser.eval()
    recogniser.options = RouterOptions(mixture)
    logits_NE, known_N = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) != 5
    recogniser.choose_by(logits_NE=logits_NE, known_N=known_N)
    own_EN = [known_N & (logits_NE.topk(recogniser.options.active).indices == e).any(1) for e in range(3)]
    before = utterance_losses(joint, range(8))
    rows = judge_experts(joint)
    after = utterance_losses(joint, range(8))
    assert [row["utterances"] for row in rows] == [int(own_N.sum()) for own_N in own_EN]
    assert {True, False} == {row["dropped"] for row in rows} and zeroed(recogniser) == [row["dropped"] for row in rows]
    gained = sum(
        row["gain"] * sum(after[u.id][1] for u, own in zip(joint.sets["dev"].utterances, own_N, strict=True) if own)
        for row, own_N in zip(rows, own_EN, strict=True)
        if row["dropped"]
    )
    assert sum(after[id][0] - before[id][0] for id in before) == pytest.approx(gained, abs=1e-3)


def test_an_expert_that_only_gets_second_choices_is_judged_too_and_one_without_weight_is_not(joint):
    recogniser = joint.recogniser.eval()
    recogniser.choose_by(logits_NE=torch.tensor([[2.0, 1.0, 0.0]]).repeat(8, 1))
    assert [row["utterances"] for row in judge_experts(joint)] == [8, 8, 0]
    logits_NE, known_N = route_by_table(["a"] * 7 + ["other"], ["a", "b", "c"])
    recogniser.choose_by(logits_NE=logits_NE, known_N=known_N)
    assert [row["utterances"] for row in judge_experts(joint)] == [7, 0, 0]


def test_nothing_is_dropped_if_so_configured(joint):
    joint.config = validate({"asr": {"drop_experts": False}})
    joint.recogniser.choose_by(logits_NE=torch.randn(8, 3))
    weights = {name: p.clone() for name, p in joint.recogniser.named_parameters()}
    assert not any(row["dropped"] for row in judge_experts(joint))
    assert all(torch.equal(p, weights[name]) for name, p in joint.recogniser.named_parameters())
