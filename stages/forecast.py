"""Estimate of the remaining work: utterances and steps of each stage, saved progress, and approximate time.

Steps are an upper bound: early stopping may end a training sooner. Times come from finished work of the same stage on
the same base model in the same store, in proportion to the speech (or, in cluster and gating, the utterances) that
passes through; without such measurements there is no estimate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from common.config import Config
from common.cost import measured_work
from common.data.corpus import Utterance
from common.errors import MoeAsrError
from common.pipeline.plan import Plan
from common.progress import clock
from common.sections import SpeechTrainConfig
from common.storage.artifacts import ROOT, Key
from common.storage.manifest import MANIFEST, Manifest
from common.storage.store import Store
from stages.inputs import embedded_utterances, evaluation_subset, training_subset
from stages.local_runner import Run

READ = 20  # manifests of a stage at most, newest first, until one fits


@dataclass(frozen=True)
class Work:
    """The work of one stage or task.

    Attributes:
        steps: maximum number of optimiser steps; None in a stage without training.
        amount: seconds of speech that pass through (utterances in cluster and gating).
        scored: seconds of speech that are decoded at the end.
        exact: whether `steps` is exact; otherwise it is approximate.
    """

    utterances: int
    amount: float
    steps: int | None = None
    scored: float = 0.0
    exact: bool = True


@dataclass(frozen=True)
class Forecast:
    """Forecast of an unfinished task.

    Attributes:
        saved: steps (extract: utterances) in a checkpoint.
        seconds: estimated time of the remaining work; None without measurements.
        host: machine of the measurement.
    """

    work: Work
    saved: int = 0
    seconds: float | None = None
    host: str = ""

    def describe(self) -> str:
        """A description: `60 utterances, at most 36 steps, checkpoint at step 21 of 36, about 2 min 5 s (as on pc)`."""
        parts = [f"{self.work.utterances:,} utterances"]
        if self.work.steps is not None:
            parts.append(f"{'at most' if self.work.exact else 'about'} {self.work.steps:,} steps")
        if self.saved and self.work.steps is not None:
            parts.append(f"checkpoint at step {self.saved:,} of {self.work.steps:,}")
        elif self.saved:
            parts.append(f"{self.saved:,} of them saved")
        if self.seconds is not None:
            parts.append(f"about {clock(self.seconds)} at the pace of {self.host}")
        return ", ".join(parts)

    def row(self) -> dict[str, Any]:
        """The forecast as a JSON object."""
        own = {"utterances": self.work.utterances, "steps": self.work.steps, "saved": self.saved}
        return own | {"expected_seconds": self.seconds}


def forecasts(run: Run, plan: Plan) -> dict[str, Forecast]:
    """Forecasts by label of unfinished tasks, and by name of stages whose tasks are not known yet."""
    by_task: dict[str, Forecast] = {}
    for stage, label, key, shards in _unfinished(plan):
        work = stage_work(run, stage, label, shards)
        saved = _saved(run, key) if key else 0
        measured = _measured(run.store, stage, run.sources["model"])
        seconds = _seconds(work, saved, measured) if measured else None
        by_task[label] = Forecast(
            work, min(saved, work.steps or work.utterances), seconds, measured.host if measured else ""
        )
    return by_task


def _unfinished(plan: Plan) -> Iterator[tuple[str, str, Key | None, int]]:
    """Stage, label, key and number of tasks (0 while it is unknown) of unfinished work."""
    stages = [planned.task.contract.name for planned in plan.planned]
    for planned in plan.planned:
        if planned.status != "done":
            name = planned.task.contract.name
            yield name, planned.task.label, planned.task.key, stages.count(name)
    for contract in plan.open_ended:
        key = plan.groups.get(contract.output) if contract.fan_out is None else None
        yield contract.name, contract.name, key, 0


def stage_work(run: Run, stage: str, label: str, shards: int) -> Work:
    """The work of a task; for experts, whose utterances the gate will choose, an equal share of all utterances."""
    config, corpus = run.config, run.corpus
    if stage == "extract":
        size, number = config.extract.shard_size, int(label.partition("[")[2].rstrip("]") or 0)
        part = embedded_utterances(config, corpus)[number * size : (number + 1) * size]
        return Work(len(part), _seconds_of(part))
    if stage in ("cluster", "gating"):
        clusters = stage == "cluster" or config.gating.target == "cluster"
        count = len(training_subset(config, corpus, "embeddings" if clusters else "asr"))
        gate, steps = config.gating, None
        if stage == "gating":
            steps = gate.epochs * ceil(ceil(count / gate.batch_size) / gate.gradient_accumulation_steps)
            steps = min(steps, gate.max_steps or steps)
        return Work(count, float(count), steps, exact=False)
    if stage == "shared":
        pool = training_subset(config, corpus, "experts")
        limited = config.experts.model_copy(update={"max_steps": config.experts.shared_max_steps})
        steps, passed = _training(config, limited, pool)
        return Work(len(pool), passed, steps, exact=config.experts.batch_seconds is None)
    if stage == "experts":
        pool, share = training_subset(config, corpus, "experts"), shards or 1
        steps, passed = _training(config, config.experts, pool, trainings=shards or config.num_experts or 1)
        return Work(len(pool) // share, passed / share, steps // share, exact=False)
    chosen, test = training_subset(config, corpus, "asr"), evaluation_subset(config, corpus, "test")
    steps, passed = _training(config, config.asr, chosen)
    return Work(len(chosen), passed, steps, 2 * _seconds_of(test), exact=config.asr.batch_seconds is None)


def _training(
    config: Config, section: SpeechTrainConfig, utterances: Sequence[Utterance], *, trainings: int = 1
) -> tuple[int, float]:
    """Steps and seconds of speech of all epochs, or of the maximum number of steps of each training."""
    from common.data.batches import Example
    from common.data.features import context_positions
    from stages.settings import augmentation, epoch_planner

    stretch, audio = augmentation(config).stretch, config.audio
    examples = [
        Example(
            id=u.id,
            path=Path(),
            offset=0.0,
            duration=u.duration,
            positions=context_positions(u.duration * stretch, context=audio.context, margin=audio.margin),
            inputs=(),
            labels=(),
            row=number,
        )
        for number, u in enumerate(utterances)
    ]
    batches = epoch_planner(examples, section, seed=0)(0)
    every = section.epochs * ceil(len(batches) / section.gradient_accumulation_steps)
    steps = min(every, trainings * (section.max_steps or every))
    return steps, _seconds_of(utterances) * section.epochs * steps / max(1, every)


def _seconds_of(utterances: Sequence[Utterance]) -> float:
    return sum(u.duration for u in utterances)


def _saved(run: Run, key: Key) -> int:
    """The step of the newest checkpoint of an unfinished task, or the utterances in its finished parts."""
    names = [entry.key[len(key.prefix) :].split("/") for entry in run.store.list(key.prefix)]
    steps = [int(name[1][:9]) for name in names if name[0] == "checkpoints" and name[-1] == MANIFEST]
    parts = sum(name[0] == "parts" for name in names)
    return max(steps, default=parts * run.config.extract.checkpoint_every)


@dataclass(frozen=True)
class Measured:
    """The pace of finished work: seconds per unit of `Work.amount`, seconds per second of scored speech, and where."""

    per_amount: float
    per_scored: float
    host: str


def _measured(store: Store, stage: str, model: str) -> Measured | None:
    """The pace of the newest finished work of a stage on this base model."""
    prefix = f"{ROOT}{stage}/"
    entries = [e for e in store.list(prefix) if e.key.count("/") == 3 and e.key.endswith(f"/{MANIFEST}")]
    for entry in sorted(entries, key=lambda entry: -entry.modified)[:READ]:
        try:
            manifest = Manifest.from_json(store.read(entry.key), entry.key)
            if manifest.ingredients["inputs"].get("model", model) == model and (pace := _pace(manifest)):
                return pace
        except (MoeAsrError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            continue  # damaged, or of another version: it measures nothing
    return None


def _pace(manifest: Manifest) -> Measured | None:
    """The pace recorded in a manifest; None if it does not record the amount of work."""
    work = measured_work(manifest.seconds, manifest.metrics)
    amount = float(work.speech or manifest.metrics.get("utterances") or 0)
    if amount <= 0:
        return None
    return Measured(work.seconds / amount, work.scoring_seconds / (work.scored or 1.0), manifest.host)


def _seconds(work: Work, saved: int, pace: Measured) -> float:
    """Time of the remaining work at the measured pace."""
    left = 1 - min(1.0, saved / max(1, work.steps or work.utterances))
    return work.amount * left * pace.per_amount + work.scored * pace.per_scored
