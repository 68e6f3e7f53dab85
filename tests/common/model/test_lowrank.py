"""The fused layer equals its plain twin, the base layer plus the experts' delta: values and all gradients."""

import pytest
import torch

from common.model.lowrank import low_rank_delta
from common.model.mixture import MixtureLinear, mixture_columns
from common.model.routing import RoutingSlot, route, route_to

E, K, R, IN, OUT, B, T = 5, 2, 4, 16, 24, 3, 7


def layer_of(kernel, *, bias=True, shared=False, dropout=0.0):
    torch.manual_seed(0)
    layer = MixtureLinear(
        torch.nn.Linear(IN, OUT, bias=bias),
        RoutingSlot(),
        num_experts=E,
        rank=R,
        alpha=2 * R,
        dropout=dropout,
        shared_rank=3 if shared else 0,
        kernel=kernel,
    )
    for stack in stacks(layer):
        stack.lora_B.data.normal_()
        stack.magnitude.data.normal_()
    return layer


def stacks(layer):
    return [layer.routed] if layer.shared is None else [layer.routed, layer.shared]


def run(layer, *, fused, dtype=torch.float32, autocast=False, x_grad=True):
    """(output, gradients of x, A, B and the gate's logits)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, IN, generator=generator).to(dtype).requires_grad_(x_grad)
    logits = torch.randn(B, E, generator=generator).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer.slot.routing = route(logits, K)
        if fused:
            y = layer(x)
        else:
            y = layer.base(x)
            routed = layer.routed.factors(y.dtype)
            y = y + low_rank_delta(x.to(y.dtype), mixture_columns(*routed, layer.slot.routing, layer.kernel))
            if layer.shared is not None:
                shared = layer.shared.factors(y.dtype)
                y = y + low_rank_delta(x.to(y.dtype), mixture_columns(*shared, route_to(0, B, x.device), "masked"))
        y.float().square().sum().backward()
    return [
        y,
        *([x.grad] if x_grad else []),
        *(p.grad for stack in stacks(layer) for p in stack.parameters()),
        logits.grad,
    ]


def assert_near(ours, theirs, tolerance):
    for tensor, other in zip(ours, theirs, strict=True):
        assert tensor.dtype == other.dtype
        assert (tensor - other).float().norm() <= tolerance * other.float().norm()


@pytest.mark.parametrize("kernel", ["masked", "gathered"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_fused_layer_equals_its_plain_twin(kernel, bias, shared):
    layer = layer_of(kernel, bias=bias, shared=shared)
    assert_near(run(layer, fused=True), run(layer, fused=False), 1e-5)


@pytest.mark.parametrize("kernel", ["masked", "gathered"])
def test_fused_layer_equals_its_plain_twin_under_autocast(kernel):
    layer = layer_of(kernel)
    ours = run(layer, fused=True, autocast=True)
    assert ours[0].dtype == torch.bfloat16
    assert_near(ours, run(layer, fused=False, autocast=True), 4e-2)


@pytest.mark.parametrize("kernel", ["masked", "gathered"])
def test_fused_layer_in_bf16_is_near_fp32(kernel):
    layer = layer_of(kernel)
    exact = run(layer, fused=True)
    layer.base.to(torch.bfloat16)
    rounded = run(layer, fused=True, dtype=torch.bfloat16)
    for tensor, other in zip(rounded, exact, strict=True):
        assert (tensor.float() - other).norm() <= 4e-2 * other.norm()


@pytest.mark.parametrize("kernel", ["masked", "gathered"])
def test_an_input_without_gradient_leaves_the_others_as_they_are(kernel):
    layer = layer_of(kernel)
    assert_near(run(layer, fused=True, x_grad=False), run(layer, fused=False, x_grad=False), 1e-5)


def test_kernels_of_the_layer_agree():
    assert_near(run(layer_of("masked"), fused=True), run(layer_of("gathered"), fused=True), 1e-5)


def test_dropout_acts_on_the_experts_only_and_only_in_training():
    layer = layer_of("gathered", dropout=0.5)
    layer.slot.routing = route(torch.randn(B, E), K)
    x = torch.randn(B, T, IN)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    layer.routed.lora_B.data.zero_()
    torch.testing.assert_close(layer(x), layer.base(x))
