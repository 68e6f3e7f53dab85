"""A configuration as the plain values that data, model, decoding and training take."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

from common.config import Config
from common.data.augment import Augmentation
from common.data.batches import Example, epoch_batches, make_examples
from common.data.corpus import Corpus, Utterance
from common.data.tokens import TextCodec
from common.decoding.decode import Decoding
from common.sections import SpeechTrainConfig, TrainConfig
from common.training.train import TrainOptions


def train_options(section: TrainConfig, config: Config) -> TrainOptions:
    """The loop's numbers from a stage's section and the runtime's."""
    names = {field.name for field in fields(TrainOptions)}
    given = {name: v for name, v in (section.model_dump() | config.runtime.model_dump()).items() if name in names}
    return TrainOptions(accumulate=section.gradient_accumulation_steps, **given)


def decoding_options(config: Config) -> Decoding:
    """The configured decoding options."""
    return Decoding(**config.decode.model_dump(), seed=config.seed)


def augmentation(config: Config) -> Augmentation:
    """The configured augmentation of training audio."""
    return Augmentation(**config.augment.model_dump())


def mixture_options(config: Config) -> dict[str, Any]:
    """The configured rank, scale and layers of experts, for `add_mixture`."""
    lora = config.lora
    options = {name: getattr(lora, name) for name in ("targets", "rank", "alpha", "dropout", "magnitude")}
    return options | {"within": lora_scope(lora.modules)}


def speech_examples(
    config: Config,
    corpus: Corpus,
    utterances: Sequence[Utterance],
    codec: TextCodec,
    *,
    training: bool = False,
    context: Literal["dynamic", "30s"] | None = None,
) -> list[Example]:
    """Examples according to the configuration's audio section; for training with room for utterances lengthened by
    augmentation.

    Args:
        context: audio context instead of the configured one: 30 s for a base model, which was not trained on shorter
            ones.
    """
    return make_examples(
        corpus,
        utterances,
        codec,
        context=context or config.audio.context,
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


def lora_scope(modules: str) -> str:
    """`lora.modules` as the part of a module's name that `mixture.add_mixture` looks for."""
    return {"all": "", "encoder": "encoder.layers", "decoder": "decoder.layers"}[modules]
