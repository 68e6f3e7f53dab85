"""What training an expert and training all of them have in common: groups of parameters, batches, loss on dev.

Shape letters: N utterances, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from common.config import Config
from common.data.augment import Augmentation
from common.data.batches import BatchLoader, Example, epoch_batches, make_examples
from common.data.corpus import Corpus, Utterance
from common.decoding.decode import Decoding
from common.model.whisper import TextCodec
from common.sections import SpeechTrainConfig, TrainConfig
from common.training.train import TrainOptions


def train_options(section: TrainConfig, config: Config) -> TrainOptions:
    """The loop's numbers from a stage's section and the runtime's."""
    return TrainOptions(
        epochs=section.epochs,
        accumulate=section.gradient_accumulation_steps,
        max_steps=section.max_steps,
        warmup_ratio=section.warmup_ratio,
        max_grad_norm=section.max_grad_norm,
        patience=section.patience,
        eval_every_n_epochs=section.eval_every_n_epochs,
        select_by=section.select_by,
        average=section.average,
        average_of=section.average_of,
        save_every_n_epochs=config.runtime.save_every_n_epochs,
        checkpoint_minutes=config.runtime.checkpoint_minutes,
        save_only_best=config.runtime.save_only_best,
        quiet=config.runtime.quiet,
    )


def decoding_options(config: Config) -> Decoding:
    """How the configuration wants text decoded."""
    return Decoding(**config.decode.model_dump(), seed=config.seed)


def augmentation(config: Config) -> Augmentation:
    """What the configuration wants done to training audio."""
    return Augmentation(**config.augment.model_dump())


def speech_examples(
    config: Config, corpus: Corpus, utterances: Sequence[Utterance], codec: TextCodec, *, training: bool = False
) -> list[Example]:
    """Examples by the configuration's audio section; for training with room for what augmentation makes longer."""
    return make_examples(
        corpus,
        utterances,
        codec,
        context=config.audio.context,
        margin=config.audio.margin,
        stretch=augmentation(config).stretch if training else 1.0,
    )


def epoch_planner(
    examples: Sequence[Example], section: SpeechTrainConfig, seed: int
) -> Callable[[int], list[list[int]]]:
    """epoch → batches, for the loop."""
    return lambda epoch: epoch_batches(
        examples,
        batch_size=section.batch_size,
        batch_seconds=section.batch_seconds,
        batch_tokens=section.batch_tokens,
        seed=seed,
        epoch=epoch,
    )


def mean_loss(
    model: nn.Module, examples: Sequence[Example], loader: BatchLoader, accelerator: Accelerator, batch_seconds: float
) -> float:
    """Cross-entropy per token over a set, split over the processes."""
    batches = epoch_batches(examples, batch_size=1, batch_seconds=batch_seconds, shuffle=False)
    total = torch.zeros(2, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in loader(batches[accelerator.process_index :: accelerator.num_processes]):
            _, logs = model(batch)
            total += torch.stack([logs["ce"].float(), batch.weight.float()])
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1].clamp_min(1))


def lora_scope(modules: str) -> str:
    """`lora.modules` as the part of a module's name that `moe.add_mixture` looks for."""
    return {"all": "", "encoder": "encoder.layers", "decoder": "decoder.layers"}[modules]


def read_jsonl_column(path: Path, column: str) -> dict[str, int]:
    """id → an integer column of a JSON Lines table."""
    import json

    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: int(row[column]) for row in rows}
