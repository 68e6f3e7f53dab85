"""Rows of dense fine-tuning: our loop and loader from audio files, against Seq2SeqTrainer over ready spectrograms."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bench.inputs import short_lengths, write_clips
from bench.measure import TRAINS_SHORT, Measurement, row
from bench.peers import make_trainer, peft_experts, trainer_dataset
from bench.setting import TARGETS, Setting, make_whisper
from common.data.batches import BatchLoader, Example, epoch_batches
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser
from common.training.train import TrainOptions, make_accelerator, train

MAX_ROUNDS = 2


def rows(setting: Setting) -> list[Measurement]:
    """LoRA, and all weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = short_lengths(setting.dense_clips)
        examples = write_clips(folder, setting.dense_model, lengths)
        dataset = trainer_dataset(examples, 80)
        return [_contest(adapt, examples, dataset, setting, folder) for adapt in ("LoRA", "full")]


def _contest(
    adapt: str, examples: Sequence[Example], dataset: Sequence[dict[str, Any]], setting: Setting, folder: Path
) -> Measurement:
    accelerator = make_accelerator(setting.precision, setting.device.type)
    recogniser = make_dense(adapt, setting).to(accelerator.device)
    loader = BatchLoader(examples, num_workers=setting.workers, device=accelerator.device)
    base = make_whisper(setting.dense_model, setting.device)
    model = peft_experts(base, 1, setting.rank) if adapt == "LoRA" else base
    trainer, clock = make_trainer(model, dataset, setting, folder / f"trainer-{adapt}")
    ours: list[float] = []
    theirs: list[float] = []
    throughput: dict[str, float] = {}
    for _ in range(min(MAX_ROUNDS, setting.repetitions)):
        rate, throughput = our_rate(recogniser, examples, loader, setting)
        ours.append(rate)
        clock.times.clear()
        trainer.train()
        # The first step warms up, on both sides; the Trainer's last batch may be smaller.
        counted = len(dataset) - setting.dense_batch
        theirs.append(counted / (clock.times[-1] - clock.times[0]))
    rank = f", rank {setting.rank}" if adapt == "LoRA" else ""
    measured = row(
        f"dense fine-tune ({adapt}), 3–12 s: against Seq2SeqTrainer",
        statistics.median(ours),
        statistics.median(theirs),
        unit="samples/s",
        better="more",
        target=setting.target(3, 3),
        note=setting.words(
            f"{setting.dense_model}{rank}, batches of {setting.dense_batch}, {len(examples)} clips, "
            f"{setting.workers} loader processes on both sides",
            f"ours reads audio and makes spectrograms, waiting {throughput['data_wait_percent']:.1f}% for data, "
            f"padding {throughput['padding_percent']:.0f}%; the Trainer's spectrograms are ready in memory",
        ),
    )
    return measured | TRAINS_SHORT


def make_dense(adapt: str, setting: Setting) -> Recogniser:
    """One always-on LoRA expert, or the whole model."""
    whisper = make_whisper(setting.dense_model, setting.device)
    if adapt == "full":
        return Recogniser(whisper)
    slot = add_mixture(
        whisper, targets=TARGETS, num_experts=0, rank=setting.rank, alpha=2 * setting.rank, shared_rank=setting.rank
    )
    return Recogniser(whisper, slot=slot)


def our_rate(
    recogniser: Recogniser, examples: Sequence[Example], loader: BatchLoader, setting: Setting
) -> tuple[float, dict[str, float]]:
    """Utterances a second of one epoch of the training loop, without its first step; and the loop's own report."""
    times: list[float] = []
    batches = epoch_batches(examples, batch_size=setting.dense_batch)

    def stopping() -> bool:  # the loop checks after every step
        setting.synchronize()
        times.append(time.perf_counter())
        return False

    def evaluate(_: nn.Module, __: bool) -> dict[str, float]:
        return {"loss": 0.0}

    parameters = [p for p in recogniser.parameters() if p.requires_grad]
    result = train(
        recogniser,
        accelerator=make_accelerator(setting.precision, setting.device.type),
        groups=[{"params": parameters, "rate": 1.0, "weight_decay": 0.0}],
        plan_epoch=lambda _: batches,
        load=loader,
        evaluate=evaluate,
        options=TrainOptions(epochs=1, learning_rate=1e-5, warmup_ratio=0.0, quiet=True),
        stopping=stopping,
    )
    counted = sum(len(batch) for batch in batches[1:])
    return counted / (times[-1] - times[0]), result.throughput
