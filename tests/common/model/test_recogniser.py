"""The whole model: what options change, and what they must not."""

from dataclasses import replace

import pytest
import torch

from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser, RouterOptions
from common.model.whisper import load_whisper
from common.training.batch_search import hardest_batch

CPU = torch.device("cpu")


@pytest.fixture
def batch():
    """Four utterances of two seconds, of noise."""
    torch.manual_seed(1)
    return replace(hardest_batch(4, seconds=2.0, tokens=12, device=CPU), row_B=torch.arange(4))


def build(model):
    """A mixture of four experts whose deltas are not zero, with a gate."""
    torch.manual_seed(3)
    whisper = load_whisper(model)
    slot = add_mixture(whisper, targets=("q_proj", "fc1"), num_experts=4, rank=2, alpha=4)
    for parameter in whisper.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    width = whisper.config.d_model
    return Recogniser(whisper, slot=slot, gate=Gate(width, 8, 4, 0.0), embeddings_ND=torch.randn(4, width)).train()


@pytest.mark.filterwarnings("ignore")  # the compiler looks at everything, also at what warns
def test_compiled_blocks_give_the_same_loss_and_gradients(micro_model, batch):
    results = []
    for compiled in (False, True):
        recogniser = build(micro_model)
        if compiled:
            recogniser.compile_blocks("aot_eager")  # the same graphs, without a minute of generating C++
        loss, _ = recogniser(batch)
        loss.backward()
        gradients = {name: p.grad for name, p in recogniser.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (plain, plain_gradients), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, plain, rtol=1e-5, atol=0)
    assert plain_gradients.keys() == compiled_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_mixture_of_losses_leaves_unknown_utterances_to_the_shared_expert(micro_model, batch):
    torch.manual_seed(3)
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=("q_proj", "fc1"), num_experts=3, rank=2, alpha=4, shared_rank=2)
    for parameter in whisper.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    recogniser = Recogniser(whisper, slot=slot, options=RouterOptions(mixture="loss")).eval()

    def loss(known_N):
        recogniser.choose_by(logits_NE=torch.randn(4, 3), known_N=known_N)
        return recogniser(batch)[1]["ce"].detach()

    nobody = torch.zeros(4, dtype=torch.bool)
    recogniser.choose_by(logits_NE=torch.zeros(4, 3), known_N=nobody)
    alone = recogniser.utterance_losses(batch)[0].sum().detach()
    torch.testing.assert_close(loss(nobody), alone, rtol=1e-5, atol=0)
    assert abs(loss(None) - alone) > 1e-3


def test_a_share_of_training_utterances_is_left_to_the_shared_expert(micro_model):
    """And none in evaluation, nor an utterance that is unlike all groups in training."""
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=("q_proj",), num_experts=3, rank=2, alpha=4, shared_rank=2)
    recogniser = Recogniser(whisper, slot=slot, options=RouterOptions(routed_dropout=0.25)).train()
    rows = torch.arange(4000)
    recogniser.choose_by(logits_NE=torch.zeros(4000, 3), known_N=rows % 2 == 0)
    known = recogniser.known(rows)
    assert not known[1::2].any()
    assert 0.7 < known[::2].float().mean() < 0.8
    parts = [recogniser.known(part) for part in rows.split(7)]
    assert torch.equal(torch.cat(parts), known)  # however a step's batch is split
    recogniser.draw += 1
    assert (recogniser.known(rows) != known)[::2].float().mean() > 0.1  # others in the next step
    assert torch.equal(recogniser.eval().known(rows), rows % 2 == 0)
