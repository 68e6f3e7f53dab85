"""The training loop, shared by gate, experts, joint training and recipes.

It reads from top to bottom: load the step's batches, forward, backward, clip, step, log, evaluate, checkpoint. The
parts that differ between tasks are passed as plain functions. One process or several (torchrun), by accelerate.

A step's loss is the sum over its micro-batches and processes divided by their common weight (tokens), so that the same
utterances give the same gradient however they are split over accumulation, processes or a batch halved for memory. One
term is an exception: the load-balance loss (`routing.balance_loss`) is a product of two means over a batch, so that
with `balance_weight` above 0 the gradient depends a little on the split.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from common.errors import ConfigError, DataError, Preempted, UsageError
from common.pipeline.metrics import MetricsLog
from common.progress import progress
from common.storage.checkpoint import Checkpointer
from common.telemetry import NONFINITE
from common.training.backward import forward_backward
from common.training.schedules import learning_rate_factor
from common.training.state import (
    Evaluation,
    Kept,
    LoopState,
    averaged,
    check_checkpoint,
    copies,
    keep,
    put,
    restore,
    seed_step,
    snapshot,
)
from common.training.throughput import Throughput, TrainBatch

log = logging.getLogger(__name__)
LOGGED = 2000  # rows of a training's metrics; a longer one logs means over several steps
MAX_SPLIT = 64  # a batch is halved at most six times on out-of-memory


B = TypeVar("B", bound=TrainBatch)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of one training; names as in `common.sections.TrainConfig` and `RuntimeConfig`."""

    epochs: int
    learning_rate: float  # at its highest, of a parameter group whose `rate` is 1
    accumulate: int = 1  # batches of a step; several processes share them, so that their number changes no result
    max_steps: int | None = None
    warmup_ratio: float = 0.1
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    patience: int = 3
    eval_every_n_epochs: int = 1
    select_by: str = "loss"
    select_from: float = 0.0  # share of the steps before which only the loss is evaluated
    average: int = 1  # how many evaluated weights are averaged at the end
    average_of: Literal["best", "last"] = "best"
    save_every_n_epochs: int = 5
    checkpoint_minutes: float = 10.0
    save_only_best: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of a training; the model contains the selected weights.

    Attributes:
        value: WER or loss of the selected weights.
        parameters: number of trained parameters.
        averaged: number of evaluated weights of which the result is the mean; 0 if the best weights were kept.
        throughput: `Throughput.rates`: totals and rates of all attempts, those before a resume included, and of all
            processes. Steps that were repeated after a checkpoint count once.
    """

    steps: int
    best_step: int
    value: float
    throughput: dict[str, float]
    parameters: int
    averaged: int


def make_accelerator(precision: str, device: str = "auto", *, unused_parameters: bool = False) -> Accelerator:
    """An accelerator for this process; several stages may run one after the other in the same process.

    Args:
        precision: `auto` (bf16 if the device supports it, fp16 on older GPUs, fp32 on CPU), fp32, fp16 or bf16.
        device: `auto`, `cpu`, `cuda`, or a single GPU such as `cuda:1`.

    Raises:
        UsageError: the machine has no such device.
        DataError: fp16 on a CPU.
    """
    if device.startswith("cuda"):
        _choose_gpu(device)
    elif device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}: choose one of auto, cpu, cuda, cuda:0, cuda:1 …")
    if PartialState._shared_state and torch.distributed.is_initialized():
        AcceleratorState._reset_state()  # keeps the process group
    else:
        AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if precision == "auto":
        # Older GPUs emulate bf16, many times slower than they compute fp16.
        has_bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if on_cpu else "bf16" if has_bf16 else "fp16"
    if on_cpu and precision == "fp16":
        raise DataError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    torch.set_float32_matmul_precision("high")  # TF32
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        cpu=on_cpu,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=unused_parameters,
                broadcast_buffers=False,  # embedding tables are the same everywhere and change with the split
            )
        ],
    )


def _choose_gpu(device: str) -> None:
    """Makes, for example, `cuda:1` this process's GPU; plain `cuda` does not change the choice."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError(f"--device {device}: this machine has no CUDA device; use cpu or auto")
    _, colon, number = device.partition(":")
    if not colon:
        return
    if not number.isdigit() or int(number) >= count:
        raise UsageError(f"--device {device}: this machine's CUDA devices are cuda:0 to cuda:{count - 1}")
    torch.cuda.set_device(int(number))


def train(
    model: nn.Module,
    *,
    accelerator: Accelerator,
    groups: Sequence[dict[str, Any]],
    plan_epoch: Callable[[int], list[list[int]]],
    load: Callable[[Sequence[list[int]]], Iterator[B]],
    evaluate: Callable[[nn.Module, bool], Mapping[str, float] | Callable[[], Mapping[str, float]]],
    options: TrainOptions,
    checkpointer: Checkpointer | None = None,
    metrics: MetricsLog | None = None,
    stopping: Callable[[], bool] = lambda: False,
    after_step: Callable[[int, int], None] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    label: str = "train",
) -> TrainResult:
    """Trains the parameters of `groups` and leaves the selected weights in the model.

    Args:
        model: `model(batch)` returns (summed loss, {name: summed value} to log); its loss is divided by `batch.weight`.
        groups: AdamW parameter groups, each with `params`, `weight_decay` and `rate`, a multiple of the learning rate.
        plan_epoch: epoch → its batches, as lists of example numbers; deterministic, and with the same number of batches
            in each epoch.
        load: yields the batches of such lists, on the device.
        evaluate: (model, full) → metrics of dev: always `loss`, and `wer` if `full` and checkpoints are selected by
            WER. Called by all processes. It may return a function that returns the metrics instead: the next epoch is
            then trained meanwhile, with the same result except for steps after the one that should have been the last.
        options: options of the training.
        checkpointer: saves and restores the state; None for trainings without checkpoints.
        metrics: rows for metrics.jsonl.
        stopping: asked at every step; true ends the training with a checkpoint.
        after_step: called with the number of the finished step and of all steps, before finite gradients are cleared.
        extra: tensors that `after_step` changes in place and the next step depends on: checkpointed too.
        label: label of the progress bar.

    Raises:
        Preempted: `stopping` became true; a checkpoint is written.
        UsageError: a step's batches cannot be shared equally among the processes.
        ConfigError: memory is not sufficient for one utterance.
        DataError: no evaluation gave a finite value for selection, because the training diverged.
    """
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    peak, seed = options.learning_rate, torch.initial_seed()
    optimizer = torch.optim.AdamW([{**group, "lr": peak * group["rate"]} for group in groups], fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    extra = extra or {}

    if options.accumulate % world:
        raise UsageError(f"{world} processes cannot share {options.accumulate} batches per step equally")
    batches = plan_epoch(0)
    per_step = options.accumulate
    steps_per_epoch = math.ceil(len(batches) / per_step)
    total = options.epochs * steps_per_epoch
    total = min(total, options.max_steps or total)
    log_every = max(1, total // LOGGED)
    running = torch.zeros((), device=device)  # loss since the last row

    state = LoopState(best=copies(trained))
    overflows = 0  # steps in a row whose gradient was not finite
    saved_at = time.monotonic()
    meter = Throughput(device, metrics.live if metrics else None, world)

    def start_evaluation(at: int, epoch: int) -> Evaluation:
        """Begins an evaluation of the current weights, which are those of step `at`."""
        due = (epoch + 1) % options.eval_every_n_epochs == 0 and at >= options.select_from * total
        full = due or at >= total
        model.eval()
        with torch.no_grad():
            scores = evaluate(wrapped, full)
        return Evaluation(at, epoch, full, copies(trained), scores)

    latest = checkpointer.latest() if checkpointer else None
    if latest and checkpointer:
        check_checkpoint(trained, extra, latest, checkpointer.prefix)
        step, tensors, record = latest
        pending = None
        if at := record["pending"]:  # its scores were still being computed: once more
            put(trained, tensors, "model." if at == step else "pending.")
            meter.pause()
            pending = start_evaluation(at, record["epochs_evaluated"] - 1)
            meter.resume()
        restore(trained, optimizer, accelerator, tensors, record)
        state = LoopState.restored(trained, step, tensors, record)
        state.pending = pending
        running += record["running"] if not rank else 0  # what is saved is that of rank 0
        put(extra, tensors, "extra.")
        meter.restore(record["throughput"])
        if metrics:
            metrics.restore(record["rows"])

    def save(*, wait: bool = False) -> None:
        if checkpointer is None or rank:
            return
        tensors, record = snapshot(trained, optimizer, accelerator)
        tensors |= state.tensors() | {f"extra.{name}": value for name, value in extra.items()}
        record |= state.record() | {"running": running.item(), "rows": metrics.rows if metrics else []}
        record["throughput"] = meter.totals()
        checkpointer.save(state.step, tensors, record, wait=wait)

    bar = progress(total, label, initial=state.step, unit="steps", hidden=options.quiet or rank > 0)
    for epoch in range(state.epochs_evaluated, math.ceil(total / steps_per_epoch)):
        if state.evals_without_improvement >= options.patience:
            break
        model.train()
        batches = plan_epoch(epoch)
        assert math.ceil(len(batches) / per_step) == steps_per_epoch
        done = state.step - epoch * steps_per_epoch
        own = [batches[i] for i in range(done * per_step + rank, len(batches), world)]
        # All processes exchange gradients: one that the last step leaves without a batch gets one that counts nothing.
        filler = (steps_per_epoch - 1) * per_step + rank >= len(batches)
        loaded = load([*own, batches[0]] if filler else own)
        while state.step < min(total, (epoch + 1) * steps_per_epoch):
            with meter.waiting():
                micro = [b for b in (next(loaded, None) for _ in range(per_step // world)) if b is not None]
            counts = not (filler and state.step + 1 == (epoch + 1) * steps_per_epoch)
            weight = counts * sum((b.weight for b in micro), torch.zeros((), device=device)).float()
            wishes = None  # several processes stop together: the one that got the signal informs the others
            if world > 1:
                seed_step(seed, state.step, rank)
                both = torch.stack([weight, torch.full_like(weight, float(stopping()))])
                weight, wishes = accelerator.reduce(both, "sum").unbind()
            weight = weight.clamp_min(1e-9)
            divisor = weight if counts else torch.full_like(weight, math.inf)
            learning_rate = peak * learning_rate_factor(state.step, total, options.warmup_ratio, options.schedule)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            while True:
                loss, logs, fits = forward_backward(wrapped, micro, divisor, accelerator, 2**state.split)
                if fits:
                    break
                optimizer.zero_grad()  # halve the batches and repeat the step: the same gradient, less memory
                state.split += 1
                if 2**state.split > MAX_SPLIT:
                    raise ConfigError("out of memory even with single utterances; use a smaller model or GPU preset")
                log.warning(
                    "%s: out of memory at step %d: batches are split in %d from here on",
                    *(label, state.step, 2**state.split),
                )
            norm = accelerator.clip_grad_norm_(list(trained.values()), options.max_grad_norm)
            # A gradient that is not finite must not reach the weights; fp16's scaler skips such a step by itself.
            finite, scaled = math.isfinite(float(norm)), accelerator.scaler is not None
            overflows = 0 if finite else overflows + 1
            if not finite:
                if not scaled or overflows > 1:  # a scaler finds its scale by one overflow now and then
                    log.warning("%s: gradient is not finite at step %d: the step is skipped", label, state.step)
                if metrics:
                    metrics.live.add(NONFINITE)
                if not scaled:
                    optimizer.zero_grad()
            optimizer.step()
            if not finite:
                optimizer.zero_grad()  # the scaler leaves them, and `after_step` must not see them
            state.step += 1
            if after_step:
                after_step(state.step, total)
            optimizer.zero_grad()
            running += loss
            meter.add(micro if counts else [])
            bar.update()
            if metrics:
                metrics.progress(state.step, total)
            if state.step % log_every == 0 or state.step == total:
                row = {"step": state.step, "epoch": epoch, "split": "train", "lr": learning_rate}
                mean = accelerator.reduce(running, "sum").item() / (state.step % log_every or log_every)
                shown = {name: accelerator.reduce(value * counts, "sum") / weight for name, value in logs.items()}
                row |= {"loss": mean, "grad_norm": float(norm)} | {name: float(value) for name, value in shown.items()}
                running.zero_()
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                if metrics:
                    metrics.log(row)
                    meter.publish()
            if stopping() if wishes is None else wishes > 0:
                save(wait=True)
                bar.close()
                raise Preempted(
                    f"{label}: stopped by a signal at step {state.step} of {total}; a checkpoint is written"
                )
            if checkpointer and time.monotonic() - saved_at > 60 * options.checkpoint_minutes:
                save()
                saved_at = time.monotonic()

        meter.pause()
        improved = finish_evaluation(state, options, metrics)  # of the epoch before, if computed during this one
        if state.evals_without_improvement >= options.patience:
            meter.resume()
            save()
            break
        state.pending = start_evaluation(state.step, epoch)
        state.epochs_evaluated = epoch + 1
        if state.step >= total or not callable(state.pending.scores):
            improved |= finish_evaluation(state, options, metrics)
        meter.resume()
        due = (epoch + 1) % options.save_every_n_epochs == 0 and not options.save_only_best
        # The last one too: scoring, which follows, can then be interrupted without a loss of training.
        if due or improved or state.step >= total or state.evals_without_improvement >= options.patience:
            save()
            saved_at = time.monotonic()
    bar.close()
    if checkpointer:
        checkpointer.wait()
    model.eval()
    mean_of = 0
    if len(state.kept) > 1:  # their mean is evaluated as they were: it stays only where it is not worse than the best
        put(trained, averaged([kept.weights for kept in state.kept]))
        meter.pause()
        with torch.no_grad():
            found_scores = evaluate(wrapped, True)
        scores = dict(found_scores() if callable(found_scores) else found_scores)
        meter.resume()
        if metrics:
            metrics.log({"step": state.step, "split": "average", "of": len(state.kept), **scores})
        if (value := scores[options.select_by]) <= state.best_value:
            state.best, state.best_value, mean_of = copies(trained), value, len(state.kept)
    if not math.isfinite(state.best_value):
        raise DataError(f"{label}: no evaluation gave a finite {options.select_by}; lower the learning rate")
    put(trained, state.best)
    parameters = sum(p.numel() for p in trained.values())
    return TrainResult(state.step, state.best_step, state.best_value, meter.rates(), parameters, mean_of)


def finish_evaluation(state: LoopState, options: TrainOptions, metrics: MetricsLog | None) -> bool:
    """Waits for the scores of the pending evaluation, if there is one; returns whether it is the best so far."""
    if state.pending is None:
        return False
    seen, state.pending = state.pending, None
    scores = dict(seen.scores() if callable(seen.scores) else seen.scores)
    if metrics:
        metrics.log({"step": seen.step, "epoch": seen.epoch, "split": "dev", **scores})
    value = scores[options.select_by] if seen.full else math.inf
    if seen.full and options.average > 1:
        state.kept = keep(state.kept, Kept(seen.step, value, seen.weights), options.average, options.average_of)
    if value < state.best_value:
        state.best, state.best_value, state.best_step = seen.weights, value, seen.step
        state.evals_without_improvement = 0
        return True
    state.evals_without_improvement += seen.full
    return False
