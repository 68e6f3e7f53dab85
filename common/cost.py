"""What a run costs at the pace of a finished one: hours of speech through each stage, and the GPU hours they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import Config


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: hours of speech that pass through it, epochs counted, and the GPU hours that this takes."""

    stage: str
    audio_hours: float
    gpu_hours: float


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
