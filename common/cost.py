"""What a run costs: operations of each stage, and the time they take at a measured or an assumed rate.

Operations count multiplications and additions separately: a D×D matrix times a vector is 2·D². The backward pass
through frozen weights costs as much as the forward pass (only activations get gradients), through trained ones twice
as much. Adapters, norms and softmax are left out: they are a few percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import Config
from common.data.features import POSITIONS_PER_SECOND, context_positions
from common.limits import MAX_SECONDS

TOKENS_PER_SECOND = 4.0  # of speech, with Whisper's tokenizer
DECODING_PENALTY = 4.0  # operations of step-by-step decoding take so much longer than those of training


@dataclass(frozen=True, slots=True)
class Shape:
    """Width and depth of a Whisper, and its vocabulary."""

    width: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int = 51_865


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(384, 4, 4),
    "base": Shape(512, 6, 6),
    "small": Shape(768, 12, 12),
    "medium": Shape(1024, 24, 24),
    "large": Shape(1280, 32, 32),
    "turbo": Shape(1280, 32, 4),
}

# Dense bf16 operations per second that the makers state; none is stated for a CPU.
PEAK: Mapping[str, float] = {"a100-40": 312e12, "a100-80": 312e12, "h100-80": 989e12, "h200-141": 989e12}
ASSUMED_SHARE = 0.15  # of the peak, where nothing was measured: about what good fine-tuning of a large Whisper reaches


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: hours of speech that pass through it, epochs counted, and the GPU hours that this takes."""

    stage: str
    audio_hours: float
    gpu_hours: float


def encoder_operations(shape: Shape, positions: int) -> float:
    """Operations of the encoder on `positions` (20 ms each): products with weights, and attention."""
    weights = 12 * shape.width**2 * shape.encoder_layers
    attention = 2 * positions * shape.width * shape.encoder_layers
    return 2.0 * positions * (weights + attention)


def decoder_operations(shape: Shape, positions: int, tokens: int) -> float:
    """Operations of the decoder over a whole text beside an encoded utterance, logits included."""
    D = shape.width
    per_token = shape.decoder_layers * (14 * D**2 + 2 * (tokens + positions) * D) + shape.vocabulary * D
    keys_and_values = 2 * D**2 * shape.decoder_layers
    return 2.0 * (tokens * per_token + positions * keys_and_values)


def training_operations(shape: Shape, positions: int, tokens: int, *, full: bool) -> float:
    """Forward and backward pass of one utterance; `full` trains all weights, not adapters alone."""
    forward = encoder_operations(shape, positions) + decoder_operations(shape, positions, tokens)
    return forward * (3 if full else 2)


def cluster_seconds(utterances: float) -> float:
    """Time of clustering on two processor cores, from that of 100,000 (bench/results/cpu.json).

    PCA grows with the utterances, HDBSCAN with their square: it looks at all pairs.
    """
    part = utterances / 100_000
    return 4.7 * part + 29.9 * part**2


def estimate(
    config: Config, *, hours: float, mean_seconds: float, shape: Shape, operations_per_second: float
) -> list[StageCost]:
    """The cost of a configuration on a corpus, from operations at one rate.

    Args:
        hours: of speech in the training split; dev and test are taken for a tenth of it each.
        mean_seconds: of an utterance; all are taken for equally long.
        operations_per_second: that a GPU does of these, in training.
    """
    seconds = min(mean_seconds, MAX_SECONDS)
    positions = context_positions(seconds, context=config.audio.context, margin=config.audio.margin)
    tokens = round(TOKENS_PER_SECOND * seconds) + 4
    passes = audio_passes(config, hours)
    full = config.asr.adapt == "full"
    rate = operations_per_second * 3600
    encode = encoder_operations(shape, positions) / rate
    decode = encode + DECODING_PENALTY * decoder_operations(shape, positions, tokens) / rate
    per_utterance = {
        "extract": encode,
        "experts": training_operations(shape, positions, tokens, full=False) / rate,
        "asr": training_operations(shape, positions, tokens, full=full) / rate,
        "evaluate": decode,
    }
    utterances = {stage: audio * 3600 / mean_seconds for stage, audio in passes.items()}
    costs = [StageCost(s, passes[s], utterances[s] * per_utterance[s]) for s in passes if s in per_utterance]
    if "cluster" in passes:
        costs.insert(1, StageCost("cluster", passes["cluster"], cluster_seconds(utterances["cluster"]) / 3600))
    return costs


def from_rates(config: Config, *, hours: float, rates: Mapping[str, float]) -> list[StageCost]:
    """The cost by the rates of a finished run: seconds of speech per second, by stage; others are left out."""
    return [
        StageCost(stage, audio, audio / rates[stage])
        for stage, audio in audio_passes(config, hours).items()
        if rates.get(stage)
    ]


def audio_passes(config: Config, hours: float) -> dict[str, float]:
    """Hours of speech that pass through each stage, all epochs counted (as if none stopped early)."""
    held_out = 0.1 * hours  # each of dev and test
    experts, joint = config.subsets.experts_percent / 100, config.subsets.asr_percent / 100
    passes = {"extract": hours * joint + 2 * held_out}
    if config.asr.pretrain != "none":
        passes["cluster"] = hours * config.subsets.embeddings_percent / 100
        if config.asr.pretrain == "alone":
            passes["experts"] = hours * experts * config.experts.epochs
    passes["asr"] = hours * joint * config.asr.epochs
    passes["evaluate"] = 2 * held_out  # test, before and after
    return passes


def describe_positions(config: Config, mean_seconds: float) -> str:
    """How much of 30 s the encoder runs on, for an utterance of the mean length."""
    positions = context_positions(mean_seconds, context=config.audio.context, margin=config.audio.margin)
    return f"{mean_seconds:.1f} s of speech encoded as {positions / POSITIONS_PER_SECOND:.1f} s"
