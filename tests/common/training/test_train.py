"""The loop: the same gradient however a step is split, the same end however often it is interrupted."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.errors import ConfigError, DataError, Preempted, UsageError
from common.pipeline.metrics import MetricsLog
from common.storage import open_store
from common.storage.checkpoint import Checkpointer
from common.training.backward import forward_backward
from common.training.schedules import learning_rate_factor
from common.training.throughput import Throughput
from common.training.train import TrainOptions, make_accelerator, train

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
TARGETS = POINTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.3


@dataclass(frozen=True)
class Points:
    """Rows of a regression."""

    x: torch.Tensor
    y: torch.Tensor
    seconds: float = 1.0
    padding: float = 0.25

    @property
    def weight(self):
        return torch.tensor(float(len(self.y)))

    def part(self, start, stop):
        return Points(self.x[start:stop], self.y[start:stop])

    def __len__(self):
        return len(self.y)


class Line(nn.Module):
    """Linear regression with dropout, so that random states matter; breaks on batches over `limit`."""

    def __init__(self, dropout=0.2, limit=None):
        super().__init__()
        torch.manual_seed(7)
        self.linear, self.dropout, self.limit = nn.Linear(3, 1), nn.Dropout(dropout), limit

    def forward(self, batch):
        if self.limit and len(batch) > self.limit and self.training:
            raise torch.OutOfMemoryError("simulated")
        loss = (self.linear(self.dropout(batch.x))[:, 0] - batch.y).square().sum()
        return loss, {"ce": loss.detach()}


def plan_epoch(size):
    def plan(epoch):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[i : i + size] for i in range(0, 24, size)]

    return plan


def load(batches):
    for numbers in batches:
        yield Points(POINTS[numbers], TARGETS[numbers])


def evaluate(model, full):
    loss, _ = model(Points(POINTS, TARGETS))
    return {"loss": loss.item() / 24} | ({"wer": loss.item() / 24} if full else {})


OPTIONS = TrainOptions(epochs=4, learning_rate=0.05, patience=9, quiet=True, save_every_n_epochs=1)


def fit(model, options=OPTIONS, *, size=4, folder=None, stop_at=None, scores=evaluate, accelerator=None):
    log = MetricsLog(None)
    steps = iter(range(1, 10_000))
    result = train(
        model,
        accelerator=accelerator or make_accelerator("fp32", "cpu"),
        groups=[{"params": list(model.parameters()), "rate": 1.0, "weight_decay": 0.01}],
        plan_epoch=plan_epoch(size),
        load=load,
        evaluate=scores,
        options=options,
        checkpointer=Checkpointer(open_store(folder), "checkpoints/", scratch=folder) if folder else None,
        metrics=log,
        stopping=lambda: stop_at is not None and next(steps) == stop_at,
    )
    return result, log.rows


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loss_falls_and_the_best_weights_are_left_in_the_model():
    model = Line(dropout=0.0)
    result, rows = fit(model, replace(OPTIONS, epochs=20))
    dev = [row["loss"] for row in rows if row["split"] == "dev"]
    assert dev[-1] < 0.2 * dev[0]
    assert result.value == min(dev) == evaluate(model, True)["loss"]


@pytest.mark.parametrize("rows_logged", [2000, 8])  # of 24 steps: each, and means over three
@pytest.mark.parametrize("stop_at", [1, 5, 6, 7, 13, 23])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path, stop_at, rows_logged, monkeypatch):
    monkeypatch.setattr("common.training.train.LOGGED", rows_logged)
    whole = Line()
    _, expected = fit(whole)
    with pytest.raises(Preempted):
        fit(Line(), folder=tmp_path, stop_at=stop_at)
    resumed = Line()
    torch.manual_seed(99)  # the checkpoint's random state must win
    _, rows = fit(resumed, folder=tmp_path)
    assert rows == expected
    assert torch.equal(weights(resumed), weights(whole))


class OneOfTwo:
    """An accelerator that counts two processes; the other one adds nothing."""

    def __init__(self, rank):
        self.num_processes, self.process_index, self.own = 2, rank, make_accelerator("fp32", "cpu")

    def __getattr__(self, name):
        return getattr(self.own, name)

    def reduce(self, value, reduction):
        return value


def test_each_of_several_processes_draws_its_own_and_after_a_resume_the_same(tmp_path):
    """Augmentation and dropout: the processes start from one seed, and only one of them writes checkpoints."""

    class Drawing(Line):
        def forward(self, batch):
            if self.training:
                drawn.append(torch.rand(()).item())
            return super().forward(batch)

    def draws(rank, **more):
        drawn.clear()
        fit(Drawing(), replace(OPTIONS, accumulate=2), accelerator=OneOfTwo(rank), **more)
        return list(drawn)

    drawn = []
    first, second = draws(0), draws(1)
    assert len({*first, *second}) == 24
    with pytest.raises(Preempted):
        draws(0, folder=tmp_path, stop_at=5)
    for rank, expected in ((1, second), (0, first)):
        assert draws(rank, folder=tmp_path) == expected[5:]


@pytest.mark.parametrize("stop_at", [1, 13, 23])
def test_an_interrupted_training_reports_the_samples_and_seconds_of_all_attempts(tmp_path, stop_at):
    whole, _ = fit(Line())
    with pytest.raises(Preempted):
        fit(Line(), folder=tmp_path, stop_at=stop_at)
    _, _, record = Checkpointer(open_store(tmp_path), "checkpoints/", scratch=tmp_path).latest()
    earlier = record["throughput"]
    assert earlier["samples"] == stop_at * 4 and earlier["training_seconds"] > 0
    outcome, _ = fit(Line(), folder=tmp_path)
    for name in ("samples", "audio_seconds", "padding_percent"):
        assert outcome.throughput[name] == pytest.approx(whole.throughput[name]) != 0
    assert outcome.throughput["training_seconds"] > earlier["training_seconds"]
    assert outcome.throughput["samples_per_second"] == pytest.approx(96 / outcome.throughput["training_seconds"])


@pytest.mark.parametrize("options", [{"epochs": 3, "save_every_n_epochs": 9}, {"patience": 1}], ids=["all", "early"])
def test_a_finished_training_whose_scoring_is_interrupted_takes_no_step_again(tmp_path, options):
    scores = {"loss": 1.0}
    options = replace(OPTIONS, **options)
    first, rows = fit(Line(), options, folder=tmp_path, scores=lambda model, full: scores)
    again, repeated = fit(Line(), options, folder=tmp_path, scores=lambda model, full: pytest.fail("evaluated again"))
    assert (again.steps, again.throughput["samples"], repeated) == (first.steps, first.throughput["samples"], rows)


@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_gives_the_gradient_of_the_large_batch(size, accumulate):
    large, small = Line(dropout=0.0), Line(dropout=0.0)
    fit(large, size=8)
    fit(small, replace(OPTIONS, accumulate=accumulate), size=size)
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-5, atol=1e-6)


def test_a_batch_too_large_for_memory_is_split_and_the_step_repeated():
    roomy, tight = Line(dropout=0.0), Line(dropout=0.0, limit=3)
    fit(roomy, size=8)
    fit(tight, size=8)
    torch.testing.assert_close(weights(roomy), weights(tight), rtol=1e-5, atol=1e-6)


def test_memory_too_small_for_one_row_is_said():
    with pytest.raises(ConfigError, match="out of memory even with single utterances"):
        fit(Line(limit=0.5))


def test_memory_too_small_in_one_of_several_processes_is_not_tried_again():
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), autocast=nullcontext)
    with pytest.raises(ConfigError, match="lower the batch size"):
        forward_backward(Line(limit=3), [Points(POINTS, TARGETS)], torch.ones(()), accelerator, 1)


def test_patience_ends_training_and_keeps_the_best():
    model = Line(dropout=0.0)
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    result, rows = fit(model, replace(OPTIONS, epochs=6, patience=2), scores=lambda m, full: {"loss": next(values)})
    assert (result.value, result.best_step) == (1.0, 12)
    assert sum(row["split"] == "dev" for row in rows) == 4


def test_epochs_between_full_evaluations_look_at_the_loss_only():
    asked = []
    fit(Line(), replace(OPTIONS, eval_every_n_epochs=3), scores=lambda m, full: asked.append(full) or evaluate(m, full))
    assert asked == [False, False, True, True]


def test_max_steps_ends_in_the_middle_of_an_epoch():
    result, _ = fit(Line(), replace(OPTIONS, max_steps=8))
    assert result.steps == 8


def test_selection_by_wer_ignores_evaluations_that_only_saw_the_loss():
    scores = iter([{"loss": 0.1}, {"loss": 5.0, "wer": 0.5}, {"loss": 0.1}, {"loss": 9.0, "wer": 0.4}])
    options = replace(OPTIONS, select_by="wer", eval_every_n_epochs=2)
    result, _ = fit(Line(), options, scores=lambda m, full: next(scores))
    assert result.value == 0.4


def remembering(seen, value=lambda loss: loss):
    """An evaluation that keeps the weights it saw, by their value."""

    def look(model, full):
        scores = evaluate(model, full)
        loss = value(scores["loss"])
        seen.append((loss, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return {"loss": loss}

    return look


def mean_by_hand(rows, name):
    return sum(weights[name] for _, weights in rows) / len(rows)


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_mean_of_n_evaluated_weights_is_left_when_it_is_not_worse(which):
    seen = []
    model = Line(dropout=0.0)
    noisy = replace(OPTIONS, epochs=8, average=3, average_of=which, schedule="none")
    result, rows = fit(model, noisy, size=2, scores=remembering(seen))
    chosen = sorted(seen[:8], key=lambda evaluation: evaluation[0])[:3] if which == "best" else seen[5:8]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, mean_by_hand(chosen, name))
    assert result.averaged == 3 and len(seen) == 9
    assert result.value == seen[-1][0] == evaluate(model, True)["loss"] <= min(value for value, _ in seen[:8])
    assert [(row["split"], row["of"]) for row in rows if "of" in row] == [("average", 3)]


def test_a_mean_that_is_worse_than_the_best_is_not_taken():
    seen = []
    values = iter([3.0, 1.0, 2.0, 2.0, 1.5])
    model = Line(dropout=0.0)
    result, _ = fit(model, replace(OPTIONS, average=2), scores=remembering(seen, lambda loss: next(values)))
    assert (result.value, result.averaged) == (1.0, 0)
    for name, p in model.named_parameters():
        assert torch.equal(p, seen[1][1][name])


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("stop_at", [7, 13, 20])
def test_an_interrupted_training_averages_the_same(tmp_path, which, stop_at):
    options = replace(OPTIONS, average=3, average_of=which)
    whole, resumed = Line(), Line()
    expected, rows = fit(whole, options)
    with pytest.raises(Preempted):
        fit(Line(), options, folder=tmp_path, stop_at=stop_at)
    outcome, again = fit(resumed, options, folder=tmp_path)
    assert again == rows
    assert (outcome.value, outcome.averaged) == (expected.value, expected.averaged)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    class Broken(Line):
        def forward(self, batch):
            loss, logs = super().forward(batch)
            return (loss * float("nan"), logs) if self.training else (loss, logs)

    model = Broken()
    before = weights(model)
    fit(model, replace(OPTIONS, epochs=1))
    assert torch.equal(weights(model), before)


def test_what_fp16s_scaler_skips_is_counted_and_after_step_sees_no_gradient_of_it():
    class Overflows(Line):
        """Its loss overflows in the first three steps, as with a loss scale that is still too large."""

        steps = 0

        def forward(self, batch):
            loss, logs = super().forward(batch)
            self.steps += self.training
            return (loss * float("inf"), logs) if self.training and self.steps <= 3 else (loss, logs)

    accelerator = make_accelerator("fp32", "cpu")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
    model, seen, log = Overflows(dropout=0.0), [], MetricsLog(None)
    train(
        model,
        accelerator=accelerator,
        groups=[{"params": list(model.parameters()), "rate": 1.0, "weight_decay": 0.0}],
        plan_epoch=plan_epoch(4),
        load=load,
        evaluate=evaluate,
        options=replace(OPTIONS, epochs=1),
        metrics=log,
        after_step=lambda step, total: seen.append(model.linear.weight.grad),
    )
    assert [grad is None for grad in seen] == [True] * 3 + [False] * 3
    assert all(grad.isfinite().all() for grad in seen[3:])
    assert accelerator.scaler.get_scale() == 2.0**7
    assert log.live.values()["moe_asr_nonfinite_steps_total"] == 3


def test_a_training_that_diverged_is_refused_not_passed_off_with_the_first_weights():
    with pytest.raises(DataError, match="train: no evaluation gave a finite loss; lower the learning rate"):
        fit(Line(), scores=lambda model, full: {"loss": float("nan")})


def test_a_figure_to_select_by_that_no_evaluation_gives_is_no_silent_success():
    with pytest.raises(KeyError, match="wer"):
        fit(Line(), replace(OPTIONS, select_by="wer"), scores=lambda model, full: {"loss": 1.0})


def test_the_last_row_is_a_mean_over_the_steps_that_it_has(monkeypatch):
    monkeypatch.setattr("common.training.train.LOGGED", 3)
    options = replace(OPTIONS, max_steps=11, epochs=2, schedule="none")
    _, rows = fit(Line(dropout=0.0), options)
    monkeypatch.setattr("common.training.train.LOGGED", 2000)
    _, each = fit(Line(dropout=0.0), options)
    losses = {row["step"]: row["loss"] for row in each if row["split"] == "train"}
    for row in (row for row in rows if row["split"] == "train"):
        steps = range((row["step"] - 1) // 3 * 3 + 1, row["step"] + 1)
        assert row["loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps)), row["step"]
    assert [row["step"] for row in rows if row["split"] == "train"] == [3, 6, 9, 11]


def test_a_resumed_training_does_not_run_out_of_memory_again_to_learn_the_same(tmp_path, caplog):
    with pytest.raises(Preempted):
        fit(Line(limit=3), size=8, folder=tmp_path, stop_at=4)
    assert "batches are split in 4" in caplog.text
    caplog.clear()
    fit(Line(limit=3), size=8, folder=tmp_path)
    assert "out of memory" not in caplog.text


@pytest.mark.parametrize("options", [{"average": 2}, {"patience": 1, "epochs": 6}], ids=["average", "early stop"])
def test_no_evaluation_counts_as_training_time(monkeypatch, options):
    paused = [False]

    def note(self, value):
        assert paused[0] != value
        paused[0] = value

    def look(model, full):
        assert paused[0]
        scores = evaluate(model, full) if "average" in options else {"loss": 1.0}
        return lambda: scores  # as if computed beside the next epoch

    monkeypatch.setattr(Throughput, "pause", lambda self: note(self, True))
    monkeypatch.setattr(Throughput, "resume", lambda self: note(self, False))
    fit(Line(), replace(OPTIONS, **options), scores=look)
    assert not paused[0]


class Recorded:
    """In place of an accelerator: what it was made with."""

    def __init__(self, **given):
        self.given = given


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that says it has two GPUs; the number of the chosen one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("common.training.train.Accelerator", Recorded)
    return chosen


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_only_where_the_gpu_has_it(two_gpus, monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert make_accelerator("auto").given["mixed_precision"] == precision


def test_a_gpu_is_the_one_that_was_named(two_gpus):
    assert make_accelerator("fp32", "cuda").given["cpu"] is False
    assert two_gpus == []
    make_accelerator("fp32", "cuda:1")
    assert two_gpus == [1]
    for wrong in ("cuda:2", "cuda:x"):
        with pytest.raises(UsageError, match=f"--device {wrong}: .*cuda:0 to cuda:1"):
            make_accelerator("fp32", wrong)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=f"--device {device}: this machine has no CUDA device"):
            make_accelerator("fp32", device)
    with pytest.raises(UsageError, match="--device gpu: choose one of auto, cpu, cuda"):
        make_accelerator("fp32", "gpu")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(DataError, match="fp16 needs a GPU"):
        make_accelerator("fp16", "cpu")


def test_learning_rate_warms_up_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 90) and learning_rate_factor(99, 100, 0.1, "cosine") < 0.001


def test_what_passes_through_one_of_several_processes_counts_for_all():
    rates = []
    for processes in (1, 4):
        meter = Throughput(torch.device("cpu"), processes=processes)
        meter.started -= 100
        meter.add([Points(POINTS[:2], TARGETS[:2])] * 2)
        rates.append(meter.rates())
    assert rates[1]["samples_per_second"] == pytest.approx(4 * rates[0]["samples_per_second"], rel=1e-2)
    assert rates[1]["audio_seconds_per_second"] == pytest.approx(4 * rates[0]["audio_seconds_per_second"], rel=1e-2)
    assert (rates[0]["processes"], rates[1]["processes"]) == (1, 4)
    assert rates[0]["padding_percent"] == rates[1]["padding_percent"]
