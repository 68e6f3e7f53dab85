"""Execution of a stage: fetches its inputs, provides checkpoints and metrics, commits its output.

A stage's `run` uses neither stores nor workflows: it is a function over folders and a corpus.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.data.corpus import Corpus
from common.data.sources import locate_model
from common.errors import DataError, Preempted, RetryableError
from common.files import MAX_FILE
from common.pipeline.attempts import Attempt, attempt_at
from common.pipeline.contract import VOLATILE
from common.pipeline.metrics import MetricsLog
from common.pipeline.plan import Task
from common.pipeline.shared_results import SharedResults
from common.storage.artifacts import Key, commit, download_folder, fetch, inspect, new_attempt, quarantine
from common.storage.manifest import Manifest
from common.storage.measured import measured_store
from common.storage.store import Store, remove_all
from common.telemetry import TASKS, StageTelemetry, Telemetry

if TYPE_CHECKING:
    from torch import Tensor

    from common.storage.checkpoint import Checkpointer

log = logging.getLogger(__name__)


class Parts:
    """Finished parts of a stage, in its store, each whole or absent, from which a killed extraction continues."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def names(self) -> list[str]:
        """Names of existing parts, without their digests."""
        return [entry.key.rpartition("/")[2].split(".")[0] for entry in self.store.list(self.prefix)]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores a part under a name that contains its digest."""
        from safetensors.torch import save

        data = save(dict(tensors))
        self.store.write(f"{self.prefix}{name}.{hashlib.sha256(data).hexdigest()}.safetensors", data)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """A part, or None if its bytes are not those that were written."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        for entry in self.store.list(f"{self.prefix}{name}."):
            for _ in range(2):  # what is wrong once may have suffered on its way
                data = self.store.read(entry.key, MAX_FILE)
                if hashlib.sha256(data).hexdigest() == entry.key.split(".")[-2]:
                    with suppress(SafetensorError):
                        return dict(load(data))
            log.warning("%s is damaged and will be recreated", entry.key)
        return None


@dataclass
class Context:
    """Services of the pipeline for a running stage.

    Attributes:
        shard: number of the shard, None for a stage with one task.
        parts: finished parts of an earlier attempt.
        results: results that several runs of a store share.
        checkpointer: opens the stage's checkpoints, or those of one of its trainings by a name.
        metrics: rows for metrics.jsonl and Prometheus.
        attempt: the current attempt; `moe-asr status` shows its activity.
        stopping: true after the process received a signal to stop.
        summary: small results that are written to the manifest (and are not part of the content).
        scratch: a temporary folder.
        sources: digests of the sources, corpus and base model, as in the task's key.
    """

    shard: int | None
    parts: Parts
    results: SharedResults
    checkpointer: Callable[..., Checkpointer]
    metrics: MetricsLog
    attempt: Attempt
    stopping: Callable[[], bool]
    scratch: Path
    sources: Mapping[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def check_stop(self) -> None:
        """Raises Preempted if the process received a signal to stop; saved parts are kept."""
        if self.stopping():
            raise Preempted("stopped by a signal; finished parts are saved")


def execute(
    task: Task,
    run: Callable[..., None],
    config: Config,
    store: Store,
    *,
    corpus: Corpus,
    scratch: Path,
    stopping: Callable[[], bool] = lambda: False,
    notes: Mapping[str, Any] | None = None,
    telemetry: Telemetry | None = None,
) -> Manifest:
    """Runs one task if its output does not exist yet, and commits it.

    Args:
        run: the stage's function: (config, context, *, corpus, model, <inputs>, output).
        corpus: the run's corpus, after treatment of long utterances.
        scratch: folder for inputs from a remote store and unfinished work.
        notes: further values for the manifest's metrics.
        telemetry: the process's live metrics, whose last values are written to the manifest too.

    Returns:
        The manifest, of this run or of another run that was faster.

    Raises:
        RetryableError: an input is damaged and was quarantined.
        MoeAsrError: as raised by the stage.
    """
    live = (telemetry or Telemetry()).stage(task.contract.name, task.shard)
    measured = measured_store(store, live)
    state = inspect(measured, task.key)
    if state.status == "done" and state.manifest:
        live.add(TASKS, result="skipped")
        manifest = state.manifest
    else:
        with live.running():
            if state.status == "damaged":
                log.warning("%s: %s; it will be recreated", task.label, state.reason)
                quarantine(measured, task.key, state)
            manifest = _make(task, run, config, measured, corpus, scratch, stopping, notes or {}, live)
        for folder in ("checkpoints/", "parts/"):
            remove_all(store, task.key.prefix + folder)
    return manifest


def _make(
    task: Task,
    run: Callable[..., None],
    config: Config,
    store: Store,
    corpus: Corpus,
    scratch: Path,
    stopping: Callable[[], bool],
    notes: Mapping[str, Any],
    live: StageTelemetry,
) -> Manifest:
    """Runs the stage's function and commits its output."""
    with _workplace(task, scratch) as work:
        folders, used = _fetch_inputs(task, config, store, corpus, scratch)
        output = new_attempt(store, task.key, work)
        try:
            with attempt_at(store, task.key) as attempt:
                context = _context(task, store, work, output, stopping, live, attempt)
                run(config, context, **folders, output=output)
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)  # unfinished output is of no use to anyone
            raise
        return commit(
            store,
            task.key,
            output,
            shard=task.shard,
            volatile=VOLATILE,
            inputs=used,
            started=attempt.first,
            seconds=attempt.seconds,
            metrics={**context.summary, "attempts": attempt.number, "live": last_values(live), **notes},
        )


def follow(
    task: Task,
    run: Callable[..., None],
    config: Config,
    store: Store,
    *,
    corpus: Corpus,
    scratch: Path,
    stopping: Callable[[], bool],
) -> None:
    """Runs a task together with the process that `execute`s it: with the same inputs, but its output is discarded."""
    with _workplace(task, scratch) as work:
        folders, _ = _fetch_inputs(task, config, store, corpus, scratch)
        output = work / "output"
        output.mkdir()
        live = Telemetry().stage(task.contract.name, task.shard)
        context = _context(task, store, work, output, stopping, live, Attempt(time.time(), 1, 0.0))
        run(config, context, **folders, output=output)


@contextmanager
def _workplace(task: Task, scratch: Path) -> Iterator[Path]:
    """A temporary folder for one attempt at a task."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{task.contract.name}-") as temporary:
        yield Path(temporary)


def last_values(live: StageTelemetry) -> dict[str, float | None]:
    """The stage's metrics for its manifest; None for values that are not finite, which JSON cannot represent."""
    values = {name: value for name, value in live.values().items() if not name.startswith("moe_asr_stage_")}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _context(
    task: Task,
    store: Store,
    work: Path,
    output: Path,
    stopping: Callable[[], bool],
    live: StageTelemetry,
    attempt: Attempt,
) -> Context:
    prefix = task.key.prefix

    def checkpointer(name: str = "") -> Checkpointer:
        from common.storage.checkpoint import Checkpointer

        own = f"{prefix}checkpoints/{name}/" if name else f"{prefix}checkpoints/"
        return Checkpointer(store, own, scratch=work, live=live)

    return Context(
        shard=task.shard,
        parts=Parts(store, f"{prefix}parts/"),
        results=SharedResults(store, work),
        checkpointer=checkpointer,
        metrics=MetricsLog(output / "metrics.jsonl", live, attempt.activity),
        attempt=attempt,
        stopping=stopping,
        scratch=work,
        sources={name: task.key.ingredients["inputs"][name] for name in task.contract.sources},
    )


def _fetch_inputs(
    task: Task, config: Config, store: Store, corpus: Corpus, scratch: Path
) -> tuple[dict[str, Corpus | Path | list[Path]], dict[str, list[dict[str, str]]]]:
    """Corpus and folders of all inputs by argument name, and the inputs' entries in the manifest."""
    folders: dict[str, Corpus | Path | list[Path]] = {}
    if "corpus" in task.contract.sources:
        folders["corpus"] = corpus
    if "model" in task.contract.sources:
        name, revision = config.model.name, config.model.revision
        folders["model"] = locate_model(name, scratch, revision=revision, endpoint_url=config.endpoint_url)
    used: dict[str, list[dict[str, str]]] = {}
    for name, keys in task.inputs.items():
        manifests = [_require(store, key) for key in keys]
        fetched = [
            fetch(store, key, manifest, download_folder(scratch, key))
            for key, manifest in zip(keys, manifests, strict=True)
        ]
        used[name] = [{"key": key.digest, "digest": m.digest} for key, m in zip(keys, manifests, strict=True)]
        folders[name] = fetched
    return folders, used


def _require(store: Store, key: Key) -> Manifest:
    state = inspect(store, key)
    if state.status == "done" and state.manifest:
        return state.manifest
    if state.status == "damaged":
        quarantine(store, key, state)
        raise RetryableError(f"input {key.stage}/{key.digest[:8]} is damaged ({state.reason}): it must be recreated")
    raise DataError(
        f"input {key.stage}/{key.digest[:8]} is not in {store.url} yet: run `moe-asr run`, or "
        f"`python -m stages {key.stage}` with the same configuration, first"
    )
