"""Cost estimate from the pace of a finished run: hours of speech per stage and the processing hours."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.config import Config
from common.sections import SpeechTrainConfig

HELD_OUT = 0.1  # share of a corpus that is assumed for each of dev and test
SCORING = "scoring"  # of the test set, before and after: a part of the asr stage with a pace of its own


@dataclass(frozen=True, slots=True)
class Pace:
    """Pace that a finished run measured.

    Attributes:
        rates: seconds of speech per second and device (GPU or CPU), by stage.
        mean_seconds: duration of an utterance.
        device: `cpu`, `cuda`, or empty where the run did not record it.
    """

    rates: dict[str, float]
    mean_seconds: float
    device: str


@dataclass(frozen=True, slots=True)
class StageCost:
    """Cost of one stage: hours of speech over all epochs, and the hours that one device needs."""

    stage: str
    audio_hours: float
    hours: float


@dataclass(frozen=True, slots=True)
class MeasuredWork:
    """The work of a finished task, all attempts together.

    Attributes:
        speech, seconds: seconds of speech that passed through (over all epochs), and the time without scoring.
        scored, scoring_seconds: seconds of speech that were decoded at the end, and the time.
    """

    speech: float
    seconds: float
    scored: float
    scoring_seconds: float


def measured_work(seconds: float, metrics: Mapping[str, Any]) -> MeasuredWork:
    """The work recorded in a manifest: `seconds` in all, and the task's metrics."""
    scoring = metrics.get("scoring", {"audio_seconds": 0.0, "seconds": 0.0})
    speech = metrics.get("throughput", {}).get("audio_seconds") or metrics.get("audio_seconds", 0.0)
    return MeasuredWork(speech, seconds - scoring["seconds"], scoring["audio_seconds"], scoring["seconds"])


def measured_pace(tasks: Iterable[tuple[str, float, Mapping[str, Any]]]) -> Pace:
    """The pace of a run; for a stage in several tasks, their mean. Without rates if nothing was measured.

    Args:
        tasks: stage, seconds and metrics of each finished task, from its manifest.
    """
    rates_by_stage: dict[str, list[float]] = {}
    utterances = audio = 0.0
    device = ""
    for stage, seconds, metrics in tasks:
        device = device or str(metrics.get("device", ""))
        throughput = metrics.get("throughput", {})
        processes = throughput.get("processes", 1)
        work = measured_work(seconds, metrics)
        if work.speech:
            rates_by_stage.setdefault(stage, []).append(work.speech / max(work.seconds, 1e-9) / processes)
        if work.scored:
            rates_by_stage[SCORING] = [work.scored / max(work.scoring_seconds, 1e-9) / processes]
        utterances += throughput.get("samples", 0)
        audio += throughput.get("audio_seconds", 0)
    rates = {stage: sum(rates) / len(rates) for stage, rates in rates_by_stage.items()}
    return Pace(rates, audio / utterances if utterances else 0.0, device)


def costs(config: Config, *, stages: Collection[str], hours: float, pace: Pace) -> list[StageCost]:
    """The cost of each stage whose pace is known.

    Args:
        stages: names of the stages that this configuration runs.
        hours: of training speech.
    """
    return [
        StageCost(stage, audio, audio / pace.rates[stage])
        for stage, audio in audio_passes(config, hours, pace.mean_seconds).items()
        if pace.rates.get(stage) and (stage in stages or stage == SCORING)
    ]


def audio_passes(config: Config, hours: float, mean_seconds: float) -> dict[str, float]:
    """Hours of speech that would pass through each stage over all epochs, without early stopping.

    Limits of steps and of utterances are applied if the duration of an utterance is known (above 0).
    """
    parts, held_out = config.subsets, HELD_OUT * hours

    def part(whole: float, samples: int | None, percent: float = 100.0) -> float:
        if samples is not None and mean_seconds:
            return min(whole, samples * mean_seconds / 3600)
        return whole * percent / 100

    embedded = part(hours, parts.embeddings_samples, parts.embeddings_percent)
    alone = part(hours, parts.experts_samples, parts.experts_percent)
    joint = part(hours, parts.asr_samples, parts.asr_percent)
    dev, test = part(held_out, parts.dev_samples), part(held_out, parts.test_samples)
    shared = config.experts.model_copy(update={"max_steps": config.experts.shared_max_steps})
    return {
        "extract": max(embedded, alone, joint) + dev + test,
        "shared": _trained(shared, alone, mean_seconds),
        "experts": _trained(config.experts, alone, mean_seconds, trainings=config.num_experts or 1),
        "asr": _trained(config.asr, joint, mean_seconds),
        SCORING: 2 * test,
    }


def _trained(section: SpeechTrainConfig, hours: float, mean_seconds: float, *, trainings: int = 1) -> float:
    """Hours of speech of all epochs, or of the maximum number of steps of each training."""
    every = hours * section.epochs
    if section.max_steps is None or not (section.batch_seconds or mean_seconds):
        return every
    batch = section.batch_seconds or section.batch_size * mean_seconds
    return min(every, trainings * section.max_steps * section.gradient_accumulation_steps * batch / 3600)
