"""The mixture equals what it stands for: PEFT's LoRA, one expert, a weighted sum; each kernel equals the others."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from common.errors import DataError
from common.model.adapters import load_expert, merge_experts, save_expert
from common.model.gate import Gate
from common.model.lowrank import low_rank_delta
from common.model.mixture import MixtureLinear, add_mixture, linear_layers, mixture_columns, mixture_layers
from common.model.routing import (
    Routing,
    RoutingSlot,
    balance_loss,
    route,
    route_by_table,
    route_to,
    router_entropy,
    routing_report,
)
from common.model.whisper import encode, load_whisper, token_losses
from tests.factories import fitted_gate

TARGETS = ("q_proj", "v_proj", "fc1")


def routing_of(ids, weights):
    return Routing(torch.tensor(ids), torch.tensor(weights))


def randomise(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in mixture_layers(model):
        for stack in (layer.routed, layer.shared):
            if stack is not None:
                stack.lora_A.data.normal_(generator=generator).mul_(0.1)
                stack.lora_B.data.normal_(generator=generator).mul_(0.1)
                stack.magnitude.data.normal_(generator=generator).mul_(0.3)


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
def test_kernels_give_equal_values_and_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((4, 8, 16), (5, 8, 16), (5, 24, 8)))
    logits = torch.randn(4, 5, generator=generator)
    results = []
    for kernel in ("masked", "gathered"):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, a, b)] + [logits.clone().requires_grad_()]
        delta = low_rank_delta(leaves[0], mixture_columns(*leaves[1:3], route(leaves[3], 2), kernel))
        delta.float().square().sum().backward()
        results.append([delta, *(leaf.grad for leaf in leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for tensor, other in zip(*results, strict=True):
        assert (tensor - other).float().norm() <= tolerance * other.float().norm()


def test_mixture_of_one_expert_equals_peft_lora(micro_model, mel_BMF, tmp_path):
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=1, rank=4, alpha=8)
    randomise(whisper)
    save_expert(whisper, 0, tmp_path / "adapter", base_model=str(micro_model))
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
        layer.routed.magnitude.data.zero_()
        theirs[name].lora_A["default"].weight.data.copy_(layer.routed.lora_A[1])
        theirs[name].lora_B["default"].weight.data.copy_(layer.routed.lora_B[1])
    slot.routing = routing_of([[1]] * 3, [[1.0]] * 3)
    encode(ours, mel_BMF).square().sum().backward()
    encode(reference.get_base_model(), mel_BMF).square().sum().backward()
    seen = [(layer, theirs[name]) for name, layer in mixture_layers(ours) if "model.encoder." in name]
    assert len(seen) == 6
    for layer, peft in seen:
        torch.testing.assert_close(
            layer.routed.lora_A.grad[1], peft.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            layer.routed.lora_B.grad[1], peft.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4
        )
        assert not layer.routed.lora_A.grad[0].any()


def test_one_hot_routing_equals_that_expert_alone(mixed, mel_BMF):
    whisper, slot = mixed
    slot.routing = routing_of([[2, 0]] * 3, [[1.0, 0.0]] * 3)
    both = encode(whisper, mel_BMF)
    slot.routing = routing_of([[2]] * 3, [[1.0]] * 3)
    torch.testing.assert_close(both, encode(whisper, mel_BMF))


def test_blend_of_equal_experts_equals_one(mixed, mel_BMF):
    whisper, slot = mixed
    for _, layer in mixture_layers(whisper):
        for parameter in (layer.routed.lora_A, layer.routed.lora_B, layer.routed.magnitude):
            parameter.data[:] = parameter.data[0]
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
    layer = MixtureLinear(base, slot, num_experts=2, rank=2, alpha=2, shared_rank=3)
    for stack in (layer.routed, layer.shared):
        stack.lora_B.data.normal_()
        stack.magnitude.data.normal_()
    slot.routing = routing_of([[0], [1]], [[1.0], [1.0]])
    x = torch.randn(2, 5, 8)
    expected = torch.stack([x[i] @ (layer.routed.delta_weight(i) + layer.shared.delta_weight(0)).t() for i in range(2)])
    torch.testing.assert_close(layer(x) - base(x), expected, rtol=1e-4, atol=1e-5)


def test_experts_survive_disk_bit_by_bit(mixed, micro_model, tmp_path):
    whisper, _ = mixed
    save_expert(whisper, 1, tmp_path / "one", base_model="base")
    other = load_whisper(micro_model)
    add_mixture(other, targets=TARGETS, num_experts=2, rank=4, alpha=8)
    load_expert(other, 0, tmp_path / "one")
    for (_, ours), (_, theirs) in zip(mixture_layers(whisper), mixture_layers(other), strict=True):
        assert torch.equal(ours.routed.plain(1)[0], theirs.routed.lora_A[0]), "the magnitude is folded in"
        assert torch.equal(ours.routed.lora_B[1], theirs.routed.lora_B[0])
        assert not theirs.routed.magnitude.any()


def test_an_adapter_of_another_rank_is_refused(mixed, micro_model, tmp_path):
    save_expert(mixed[0], 1, tmp_path / "one", base_model="base")
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
    with pytest.raises(DataError, match="named gate_proj, vproj in its encoder"):
        linear_layers(load_whisper(micro_model), ("q_proj", "vproj", "gate_proj"), "encoder.layers")
    with pytest.raises(DataError, match="named proj_out"):
        linear_layers(load_whisper(micro_model), ("q_proj", "proj_out"), "decoder.layers")


@pytest.fixture
def with_shared(micro_model):
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=3, rank=4, alpha=8, shared_rank=6)
    randomise(whisper)
    return whisper, slot


def test_a_new_mixture_equals_its_base(micro_model, mel_BMF):
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=3, rank=4, alpha=8, shared_rank=6)
    slot.routing = routing_of([[0, 1]] * 3, [[0.6, 0.4]] * 3)
    assert torch.equal(encode(whisper, mel_BMF), encode(load_whisper(micro_model), mel_BMF))


def test_a_mixture_with_its_routed_experts_zeroed_equals_its_shared_expert(with_shared, micro_model, mel_BMF):
    whisper, slot = with_shared
    for _, layer in mixture_layers(whisper):
        layer.routed.lora_B.data.zero_()
    slot.routing = routing_of([[0, 1], [1, 2], [2, 0]], [[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]])
    zeroed = encode(whisper, mel_BMF)
    dense = load_whisper(micro_model)
    dense_slot = add_mixture(dense, targets=TARGETS, num_experts=0, rank=4, alpha=8, shared_rank=6)
    for (_, theirs), (_, ours) in zip(mixture_layers(dense), mixture_layers(whisper), strict=True):
        theirs.shared.load_state_dict(ours.shared.state_dict())
    dense_slot.routing = route_to(None, 3, mel_BMF.device)
    torch.testing.assert_close(zeroed, encode(dense, mel_BMF), rtol=1e-5, atol=1e-5)


def test_an_utterance_unlike_all_groups_gets_the_shared_expert_alone(with_shared, mel_BMF):
    whisper, slot = with_shared
    logits, known = torch.randn(3, 3), torch.tensor([True, False, True])
    slot.routing = route(logits, 2, known)
    routed = encode(whisper, mel_BMF)
    slot.routing = route_to(None, 3, mel_BMF.device)
    alone = encode(whisper, mel_BMF)
    torch.testing.assert_close(routed[1], alone[1], rtol=1e-5, atol=1e-5)
    assert (routed[0] - alone[0]).abs().max() > 1e-3


def test_merged_equals_unmerged_with_a_shared_expert(with_shared, mel_BMF):
    whisper, slot = with_shared
    slot.routing = routing_of([[0, 2]] * 3, [[0.7, 0.3]] * 3)
    merged = copy.deepcopy(whisper)
    merge_experts(merged, {0: 0.7, 2: 0.3})
    torch.testing.assert_close(encode(whisper, mel_BMF), encode(merged, mel_BMF), rtol=1e-4, atol=1e-5)


def test_routing_by_a_table_gives_each_group_its_expert_and_strangers_none():
    logits, known = route_by_table(["b", "a", "x", ""], ("a", "b"))
    routing = route(logits, 2, known)
    assert routing.topk_ids_BK[:2, 0].tolist() == [1, 0]
    assert routing.topk_weights_BK.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]


def test_a_gate_knows_what_is_unlike_its_groups_and_sums_decide_for_speakers():
    generator = torch.Generator().manual_seed(0)
    center = torch.eye(3, 6) * 6
    gate, near = fitted_gate(center, 40, generator)
    far = -center.repeat_interleave(40, 0) + torch.randn(120, 6, generator=generator)
    evidence = gate.evidence(torch.cat([near, far]))
    known = gate.decide(evidence)[1]
    assert known[:120].float().mean() > 0.97
    assert known[120:].float().mean() < 0.1
    logits, known = gate.decide(evidence[:5].sum(0, keepdim=True))
    torch.testing.assert_close(logits[0], gate(near[:5]).log_softmax(1).sum(0), rtol=1e-4, atol=1e-4)
    assert known.all()


def test_a_gate_tells_strangers_from_members_that_are_unusual_for_all_speech():
    center = torch.eye(3, 6) * 8
    gate, _ = fitted_gate(center, 100, torch.Generator().manual_seed(0))
    noisy = center + torch.tensor([0, 0, 0, 0, 0, 7.0])  # in a direction in which the groups do not differ
    between = center.mean(0, keepdim=True)
    assert gate.decide(gate.evidence(noisy))[1].all()
    assert not gate.decide(gate.evidence(between))[1].any()


def test_magnitudes_learn_and_can_be_left_out(micro_model, mel_BMF):
    for learned in (True, False):
        whisper = load_whisper(micro_model)
        slot = add_mixture(whisper, targets=TARGETS, num_experts=2, rank=4, alpha=8, shared_rank=6, magnitude=learned)
        randomise(whisper)
        slot.routing = routing_of([[0, 1]] * 3, [[0.6, 0.4]] * 3)
        encode(whisper, mel_BMF).square().sum().backward()
        layer = next(layer for _, layer in mixture_layers(whisper))
        for stack in (layer.routed, layer.shared):
            assert (stack.magnitude.grad is not None) == learned


def test_all_experts_weigh_as_the_gates_probabilities():
    logits_BE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for count in (3, 7):
        chosen = route(logits_BE, count)
        weights_BE = torch.zeros_like(logits_BE).scatter(1, chosen.topk_ids_BK, chosen.topk_weights_BK)
        torch.testing.assert_close(weights_BE, logits_BE.softmax(1))
