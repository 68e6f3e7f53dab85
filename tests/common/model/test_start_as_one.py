"""Experts that are trained as one at first: what they are equal to, and when they part."""

import torch
from common.model.moe import Routing, add_mixture, mixture_layers, part_after, start_as_one
from torch import nn


def mixture(num_experts, seed=0, shared=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    slot = add_mixture(model, targets=("0", "2"), num_experts=num_experts, rank=2, alpha=4, shared=shared)
    return model, slot


def trained(model, slot, steps, share=0.0, experts=1, lr=0.05):
    """Trains on rows that are routed to two experts each."""
    generator = torch.Generator().manual_seed(1)
    x_NBTI, y_NBTO = torch.randn(steps, 5, 3, 6, generator=generator), torch.randn(steps, 5, 3, 4, generator=generator)
    weights_NB2 = torch.rand(steps, 5, 2, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        ids_B2 = (torch.arange(5)[:, None] + torch.tensor([0, 1])) % experts
        weights_B2 = weights_NB2[step] / weights_NB2[step].sum(1, keepdim=True)
        slot.routing = Routing(ids_B2, weights_B2)
        (model(x_NBTI[step]) - y_NBTO[step]).square().mean().backward()
        optimizer.step()
        if slot.tied is not None:
            part_after(slot, share, step + 1, steps)
        optimizer.zero_grad()
    return [(layer.lora_A.detach(), layer.lora_B.detach()) for _, layer in mixture_layers(model)]


def test_experts_that_are_trained_as_one_learn_what_one_adapter_learns():
    model, slot = mixture(3)
    start_as_one(model)
    one, alone = mixture(1)
    for (_, layer), (_, other) in zip(mixture_layers(one), mixture_layers(model), strict=True):
        layer.lora_A.data[:] = other.lora_A.data[:1]
    together, single = trained(model, slot, 8, share=1.0, experts=3), trained(one, alone, 8)
    for (a_ERI, b_EOR), (a_1RI, b_1OR) in zip(together, single, strict=True):
        torch.testing.assert_close(a_ERI, a_1RI.expand_as(a_ERI), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b_EOR, b_1OR.expand_as(b_EOR), rtol=1e-4, atol=1e-5)


def test_they_part_after_their_share_of_the_steps():
    model, slot = mixture(3)
    flag = start_as_one(model)
    trained(model, slot, 4, share=1.0, experts=3)
    assert all(torch.equal(layer.lora_B[0], layer.lora_B[2]) for _, layer in mixture_layers(model))
    trained(model, slot, 4, share=0.5, experts=3)
    assert not flag
    assert not any(torch.equal(layer.lora_B[0], layer.lora_B[2]) for _, layer in mixture_layers(model))


def test_a_shared_expert_learns_by_itself():
    model, slot = mixture(3, shared=True)
    start_as_one(model)
    trained(model, slot, 3, share=1.0, experts=3)
    for _, layer in mixture_layers(model):
        assert torch.equal(layer.lora_A[0], layer.lora_A[2])
        assert not torch.allclose(layer.lora_A[0], layer.lora_A[3])
