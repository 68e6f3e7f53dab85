"""AdaLoRA equals PEFT's where both start alike, and ends as plain LoRA. Runs with it: tests/stages/test_adalora.py."""

from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from common.model.adalora import (
    RankPlan,
    add_adalora,
    allocate,
    orthogonality,
    rank_budget,
    svd_layers,
    to_lora,
)
from common.model.adapters import save_expert
from common.model.mixture import mixture_layers
from common.model.routing import Routing, route_to
from common.model.whisper import encode, load_whisper

WIDTH, RANK, TARGET, TOTAL = 8, 6, 2, 30
PLAN = RankPlan(RANK, TARGET, warmup=0.2, final=0.3, interval=1)
ROUTING = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


class Tiny(nn.Module):
    """Two linear layers, with a loss where it is called as PEFT calls models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        y = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(loss=(y - x.flip(-1)).square().mean())


def inputs(step):
    return torch.randn(16, 5, WIDTH, generator=torch.Generator().manual_seed(step))


def theirs():
    config = AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=int(PLAN.warmup * TOTAL),
        tfinal=int(PLAN.final * TOTAL),
        deltaT=PLAN.interval,
        total_step=TOTAL,
        lora_alpha=12,
        target_modules=["first", "second"],
        orth_reg_weight=0.5,
    )
    return get_peft_model(Tiny(), config)


def ours_like(peft):
    """Our adapters on the same base, with PEFT's values."""
    model = Tiny()
    slot = add_adalora(model, targets=("first", "second"), rank=RANK, scaling=12 / (RANK + 1e-5))
    slot.routing = ROUTING
    with torch.no_grad():
        for name, layer in svd_layers(model):
            other = peft.get_base_model().get_submodule(name)
            layer.P_OR.copy_(other.lora_B["default"])
            layer.Q_RI.copy_(other.lora_A["default"])
            layer.value_R.copy_(other.lora_E["default"][:, 0])
    return model


def test_the_budget_falls_as_in_peft():
    allocator = RankAllocator(theirs(), theirs().peft_config["default"], "default")
    first, last = int(PLAN.warmup * TOTAL), PLAN.last(TOTAL)
    budgets = [rank_budget(s, start=2 * RANK, target=2 * TARGET, first=first, last=last) for s in range(TOTAL)]
    assert budgets == [allocator.budget_schedule(step)[0] for step in range(TOTAL)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[first], budgets[last]) == (2 * RANK, 2 * TARGET)


def test_a_training_keeps_the_ranks_that_peft_keeps_and_its_values():
    peft = theirs()
    ours = ours_like(peft).double()  # rounding would grow over the steps
    peft.double()
    trainable = [[p for p in model.parameters() if p.requires_grad] for model in (peft, ours)]
    optimizers = [torch.optim.SGD(parameters, lr=0.3) for parameters in trainable]
    seen = []
    for step in range(1, TOTAL + 1):
        x = inputs(step).double()
        (ours(x).loss + 0.5 * orthogonality(ours)).backward()
        peft.base_model(x).loss.backward()  # PeftModel itself would leave the penalty out
        for optimizer in optimizers:
            optimizer.step()
        peft.base_model.update_and_allocate(step)
        allocate(ours, step, TOTAL, PLAN)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, layer in svd_layers(ours):
            reference = peft.get_base_model().get_submodule(name).lora_E["default"][:, 0]
            torch.testing.assert_close(layer.value_R, reference, rtol=1e-7, atol=1e-9)
            assert torch.equal(layer.value_R == 0, reference == 0)
        seen.append(sum(int((layer.value_R != 0).sum()) for _, layer in svd_layers(ours)))
    assert seen[0] == 2 * RANK and seen[-1] == 2 * TARGET
    assert seen == sorted(seen, reverse=True)


def test_ranks_go_to_the_layer_that_matters():
    class Half(Tiny):
        def forward(self, x):
            return SimpleNamespace(loss=(self.first(x).square() + 0 * self.first(self.second(self.first(x)))).mean())

    model = Half()
    add_adalora(model, targets=("first", "second"), rank=RANK, scaling=2.0).routing = ROUTING
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, TOTAL + 1):
        model(inputs(step)).loss.backward()
        optimizer.step()
        allocate(model, step, TOTAL, PLAN)
        optimizer.zero_grad()
    assert {name: int(layer.kept_R.sum()) for name, layer in svd_layers(model)} == {"first": 2 * TARGET, "second": 0}


def test_p_and_q_start_orthonormal_and_the_model_as_its_base():
    model, base = Tiny(), Tiny()
    add_adalora(model, targets=("first", "second"), rank=RANK, scaling=2.0).routing = ROUTING
    assert float(orthogonality(model).detach()) < 1e-5
    torch.testing.assert_close(model(inputs(0)).loss, base(inputs(0)).loss, rtol=0, atol=0)


def test_without_routing_the_base_is_untouched():
    model, base = Tiny(), Tiny()
    add_adalora(model, targets=("first",), rank=2, scaling=2.0)
    for _, layer in svd_layers(model):
        layer.value_R.data.fill_(1.0)
    assert torch.equal(model(inputs(0)).loss, base(inputs(0)).loss)


def test_steps_without_gradients_measure_nothing_and_still_take_ranks_away():
    model = Tiny()
    add_adalora(model, targets=("first", "second"), rank=RANK, scaling=2.0)
    for step in range(1, TOTAL + 1):
        allocate(model, step, TOTAL, PLAN)
    assert sum(int(layer.kept_R.sum()) for _, layer in svd_layers(model)) == 2 * TARGET


def test_the_result_is_plain_lora_that_peft_loads(micro_model, tmp_path):
    whisper = load_whisper(micro_model)
    slot = add_adalora(whisper, targets=("q_proj", "fc1"), rank=4, scaling=2.0)
    generator = torch.Generator().manual_seed(2)
    for _, layer in svd_layers(whisper):
        layer.value_R.data.normal_(generator=generator)
        layer.kept_R.copy_(torch.rand(4, generator=generator) > 0.5)
        layer.value_R.data[~layer.kept_R] = 0.0
    slot.routing = route_to(None, 2, torch.device("cpu"))
    mel = torch.randn(2, 80, 64, generator=generator)
    before = encode(whisper, mel)
    ranks = to_lora(whisper)
    assert max(ranks.values()) == next(mixture_layers(whisper))[1].shared.rank <= 4
    assert min(ranks.values()) < max(ranks.values())
    assert not list(svd_layers(whisper))
    torch.testing.assert_close(encode(whisper, mel), before, rtol=1e-4, atol=1e-5)
    save_expert(whisper, None, tmp_path / "adapter", base_model=str(micro_model))
    peft = PeftModel.from_pretrained(load_whisper(micro_model), tmp_path / "adapter")
    torch.testing.assert_close(encode(peft.get_base_model(), mel), before, rtol=1e-4, atol=1e-5)
