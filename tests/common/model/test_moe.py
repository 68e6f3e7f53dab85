"""The mixture equals what it stands for: PEFT's LoRA, one expert, a weighted sum; each kernel equals the others."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from common.errors import DataError
from common.model.adapters import load_expert, merge_experts, save_expert
from common.model.moe import (
    Gate,
    MixtureLinear,
    Routing,
    RoutingSlot,
    add_mixture,
    balance_loss,
    mixture_delta,
    mixture_layers,
    route,
    router_entropy,
    routing_report,
)
from common.model.whisper import encode, load_whisper, token_losses

TARGETS = ("q_proj", "v_proj", "fc1")


def routing_of(ids, weights):
    return Routing(torch.tensor(ids), torch.tensor(weights))


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in mixture_layers(model):
        layer.lora_A.data.normal_(generator=generator).mul_(0.1)
        layer.lora_B.data.normal_(generator=generator).mul_(0.1)


@pytest.fixture
def mel_BMF():
    return torch.randn(3, 80, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mixed(micro_model):
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=3, rank=4, alpha=8)
    randomise(whisper)
    return whisper, slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["gathered", "grouped"])
def test_kernels_give_equal_values_and_gradients(kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((4, 8, 16), (5, 8, 16), (5, 24, 8)))
    logits = torch.randn(4, 5, generator=generator)
    results = []
    for name in ("masked", kernel):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, a, b)] + [logits.clone().requires_grad_()]
        delta = mixture_delta(*leaves[:3], route(leaves[3], 2), 2.0, name)
        delta.float().square().sum().backward()
        results.append([delta, *(leaf.grad for leaf in leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()


def test_mixture_of_one_expert_equals_peft_lora(micro_model, mel_BMF, tmp_path):
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=1, rank=4, alpha=8)
    randomise(whisper)
    save_expert(whisper, 0, tmp_path / "adapter", base_model=str(micro_model), alpha=8)
    peft = PeftModel.from_pretrained(load_whisper(micro_model), tmp_path / "adapter")
    slot.routing = routing_of([[0]] * 3, [[1.0]] * 3)
    torch.testing.assert_close(encode(whisper, mel_BMF), encode(peft.get_base_model(), mel_BMF), rtol=1e-5, atol=1e-5)


def test_lora_gradients_equal_pefts(micro_model, mel_BMF):
    reference = get_peft_model(load_whisper(micro_model), LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)))
    ours = load_whisper(micro_model)
    slot = add_mixture(ours, targets=TARGETS, num_experts=2, rank=4, alpha=8)
    randomise(ours)
    theirs = dict(reference.get_base_model().named_modules())
    for name, layer in mixture_layers(ours):
        theirs[name].lora_A["default"].weight.data.copy_(layer.lora_A[1])
        theirs[name].lora_B["default"].weight.data.copy_(layer.lora_B[1])
    slot.routing = routing_of([[1]] * 3, [[1.0]] * 3)
    encode(ours, mel_BMF).square().sum().backward()
    encode(reference.get_base_model(), mel_BMF).square().sum().backward()
    seen = [(layer, theirs[name]) for name, layer in mixture_layers(ours) if "model.encoder." in name]
    assert len(seen) == 6
    for layer, peft in seen:
        torch.testing.assert_close(layer.lora_A.grad[1], peft.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.lora_B.grad[1], peft.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
        assert not layer.lora_A.grad[0].any()


def test_one_hot_routing_equals_that_expert_alone(mixed, mel_BMF):
    whisper, slot = mixed
    slot.routing = routing_of([[2, 0]] * 3, [[1.0, 0.0]] * 3)
    both = encode(whisper, mel_BMF)
    slot.routing = routing_of([[2]] * 3, [[1.0]] * 3)
    torch.testing.assert_close(both, encode(whisper, mel_BMF))


def test_blend_of_equal_experts_equals_one(mixed, mel_BMF):
    whisper, slot = mixed
    for _, layer in mixture_layers(whisper):
        layer.lora_A.data[:] = layer.lora_A.data[0]
        layer.lora_B.data[:] = layer.lora_B.data[0]
    slot.routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    blended = encode(whisper, mel_BMF)
    slot.routing = routing_of([[0]] * 3, [[1.0]] * 3)
    torch.testing.assert_close(blended, encode(whisper, mel_BMF), rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_do_not_influence_each_other(mixed, mel_BMF):
    whisper, slot = mixed
    slot.routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    together = encode(whisper, mel_BMF)
    slot.routing = slot.routing.rows(torch.tensor([1]))
    torch.testing.assert_close(together[1:2], encode(whisper, mel_BMF[1:2]), rtol=1e-5, atol=1e-5)


def test_without_routing_the_base_model_is_untouched(mixed, micro_model, mel_BMF):
    whisper, slot = mixed
    slot.routing = None
    torch.testing.assert_close(encode(whisper, mel_BMF), encode(load_whisper(micro_model), mel_BMF), rtol=0, atol=0)


def test_merged_equals_unmerged(mixed, mel_BMF):
    whisper, slot = mixed
    slot.routing = routing_of([[1]] * 3, [[1.0]] * 3)
    merged = copy.deepcopy(whisper)
    merge_experts(merged, {1: 1.0})
    assert not list(mixture_layers(merged))
    torch.testing.assert_close(encode(whisper, mel_BMF), encode(merged, mel_BMF), rtol=1e-4, atol=1e-5)


def test_shared_expert_adds_to_every_utterance(mel_BMF):
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 6)
    slot = RoutingSlot()
    layer = MixtureLinear(base, slot, num_experts=2, rank=2, alpha=2, shared=True)
    layer.lora_B.data.normal_()
    slot.routing = routing_of([[0], [1]], [[1.0], [1.0]])
    x = torch.randn(2, 5, 8)
    expected = torch.stack([x[i] @ (layer.delta_weight(i) + layer.delta_weight(2)).t() for i in range(2)])
    torch.testing.assert_close(layer(x) - base(x), expected, rtol=1e-4, atol=1e-5)


def test_experts_survive_disk_bit_by_bit(mixed, micro_model, tmp_path):
    whisper, _ = mixed
    save_expert(whisper, 1, tmp_path / "one", base_model="base", alpha=8)
    other = load_whisper(micro_model)
    add_mixture(other, targets=TARGETS, num_experts=2, rank=4, alpha=8)
    load_expert(other, 0, tmp_path / "one")
    for (_, ours), (_, theirs) in zip(mixture_layers(whisper), mixture_layers(other), strict=True):
        assert torch.equal(ours.lora_A[1], theirs.lora_A[0])
        assert torch.equal(ours.lora_B[1], theirs.lora_B[0])


def test_an_adapter_of_another_rank_is_refused(mixed, micro_model, tmp_path):
    save_expert(mixed[0], 1, tmp_path / "one", base_model="base", alpha=8)
    other = load_whisper(micro_model)
    add_mixture(other, targets=TARGETS, num_experts=1, rank=8, alpha=8)
    with pytest.raises(DataError, match=r"shape \(8, 32\), found shape \(4, 32\)"):
        load_expert(other, 0, tmp_path / "one")


def test_padding_of_labels_does_not_change_the_loss(micro_model):
    whisper = load_whisper(micro_model)
    hidden = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor([[257, 258, 5, 6], [257, 258, 7, 256]])
    labels = torch.tensor([[-100, 5, 6, 256], [-100, 7, 256, -100]])
    loss, count = token_losses(whisper, hidden, inputs, labels)
    alone, _ = token_losses(whisper, hidden[1:], inputs[1:, :3], labels[1:, :3])
    torch.testing.assert_close(loss[1:], alone)
    assert count.tolist() == [3, 2]


def test_gate_gets_gradients_through_the_blend(mixed, mel_BMF):
    whisper, slot = mixed
    gate = Gate(6, 4, 3)
    slot.routing = route(gate(torch.randn(3, 6)), 2)
    encode(whisper, mel_BMF).square().sum().backward()
    assert gate.net[0].weight.grad.abs().sum() > 0


def test_a_gate_gives_the_same_logits_in_half_precision():
    """Else an utterance could be routed otherwise than its report says."""
    gate, embedding_BD = Gate(6, 4, 3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BE = gate(embedding_BD)
    assert torch.equal(logits_BE, gate(embedding_BD))


def test_balance_is_one_when_even_and_counts_experts_when_collapsed():
    even = torch.eye(4) * 20
    assert balance_loss(even, even.argmax(1, keepdim=True)) == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.tensor([[20.0, 0, 0, 0]] * 4)
    assert balance_loss(collapsed, collapsed.argmax(1, keepdim=True)) == pytest.approx(4.0, abs=1e-4)
    assert router_entropy(torch.zeros(2, 8)) == pytest.approx(2.0794, abs=1e-4)


def test_collapse_is_reported():
    assert routing_report(torch.tensor([[9.0, 0, 0, 0]] * 8), 2).collapsed
    healthy = routing_report(torch.eye(4).repeat(2, 1) * 3, 2)
    assert not healthy.collapsed
    assert sum(healthy.load) == pytest.approx(1.0)


def test_targets_that_do_not_exist_are_named(micro_model):
    with pytest.raises(ValueError, match="gate_proj"):
        add_mixture(load_whisper(micro_model), targets=("gate_proj",), num_experts=1, rank=2, alpha=2)


def test_all_experts_weigh_as_the_gates_probabilities():
    logits_BE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for count in (3, 7):
        chosen = route(logits_BE, count)
        weights_BE = torch.zeros_like(logits_BE).scatter(1, chosen.topk_ids_BK, chosen.topk_weights_BK)
        torch.testing.assert_close(weights_BE, logits_BE.softmax(1))
