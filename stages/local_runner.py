"""The local runner: plans a run, runs its unfinished tasks, and writes its record."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from common import __version__
from common.config import PLACES, Config, flatten, to_yaml
from common.console import LineFormatter
from common.data.corpus import Corpus
from common.errors import ConfigError, DataError, Preempted, RetryableError
from common.evaluation.routing_hint import corpus_hint
from common.files import MAX_FILE, explained, make_folders
from common.json_files import read_object, to_json
from common.pipeline.plan import Plan, Planned, Task, make_plan
from common.pipeline.runs import read_record as read_record
from common.pipeline.stage import execute, follow
from common.report.model_card import model_card
from common.report.report import RunView, render_report
from common.signals import handle_signals
from common.storage import open_store
from common.storage.artifacts import inspect, quarantine
from common.storage.manifest import Manifest
from common.storage.store import Store
from common.telemetry import PLAN_TASKS, RUNNING, TASKS, Telemetry, serving
from stages import STAGES, run_function
from stages.inputs import base_digest, load_corpus
from stages.processes import parallel_slots, run_in_processes

log = logging.getLogger(__name__)
ROUNDS = 3  # how often a damaged input is recomputed in one run


def cache_folder() -> Path:
    """Folder for inputs from remote stores and unfinished work: $MOE_ASR_CACHE, otherwise in the user's cache
    folder.
    """
    return Path(os.environ.get("MOE_ASR_CACHE") or Path.home() / ".cache" / "moe-asr")


class Run:
    """One run of the pipeline: its configuration, sources, store, record and live metrics.

    Args:
        model: digest of the base model if it is already known, so that a remote model need not be downloaded.
    """

    def __init__(self, config: Config, model: str | None = None) -> None:
        self.config = config
        self.store: Store = open_store(config.store, endpoint_url=config.endpoint_url)
        self.cache = cache_folder()
        self.corpus: Corpus = load_corpus(config, self.cache)
        self.sources = {"corpus": f"sha256:{self.corpus.digest}", "model": model or base_digest(config, self.cache)}
        self.record = self._read_record()
        self.telemetry = Telemetry()

    def _read_record(self) -> dict[str, Any]:
        """The recorded values; empty if the record is damaged, since results do not depend on it and it is written
        again.
        """
        try:
            return read_record(self.store, self.config.run) or {}
        except DataError as error:
            log.warning("%s", error)
            return {}

    def serving(self) -> AbstractContextManager[int | None]:
        """Serves the live metrics while a block runs, if configured."""
        runtime = self.config.runtime
        return serving(self.telemetry, runtime.metrics_port, runtime.metrics_host, runtime.metrics_linger_seconds)

    @property
    def rehashes(self) -> bool:
        """Whether a run first re-hashes all files, as it does in a folder; `moe-asr verify` does it for a bucket."""
        return self.store.local_path("") is not None

    def plan(self, *, deep: bool = False) -> Plan:
        """The plan of the run: finished and unfinished tasks, with reasons."""
        before = self.record.get("keys")
        plan = make_plan(STAGES, self.config, self.corpus, self.sources, self.store, before=before, deep=deep)
        for status in ("done", "todo", "stale"):
            self.telemetry.set(PLAN_TASKS, sum(p.status == status for p in plan.planned), status=status)
        return plan

    def check_same(self, resume: bool) -> None:
        """Refuses a run that has another configuration, unless `--resume` is given.

        Raises:
            ConfigError: the configurations differ; the message lists the first differences.
        """
        if not self.record or resume:
            return
        changed = differences(self.record["config"], self.config.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"run {self.config.run!r} in {self.store.url} has another configuration ({'; '.join(changed[:3])}): "
                "--resume continues it with the new one, --run NAME starts another"
            )

    def save(self, status: str, plan: Plan) -> None:
        """Writes run.json."""
        now = time.time()
        keys = {key.stage: key.ingredients for key in plan.groups.values()}
        self.record = {
            "schema": 1,
            "name": self.config.run,
            "status": status,
            "version": __version__,
            "started": self.record.get("started", now),
            "updated": now,
            "config": self.config.model_dump(mode="json"),
            "sources": self.sources,
            "keys": keys,
            "tasks": {p.task.label: {"key": p.task.key.digest, "stage": p.task.contract.name} for p in plan.planned},
            "timeline": self.timeline(plan),
            "workflow": self.record.get("workflow"),
        }
        self.store.write(f"{self.config.run}/run.json", to_json(self.record))

    def timeline(self, plan: Plan) -> list[dict[str, Any]]:
        """The rows of the plan's finished tasks, without those of another configuration or of damaged results."""
        done = {p.task.key.digest for p in plan.planned if p.status == "done"}
        return [row for row in self.record.get("timeline", []) if row.get("key") in done]

    def note(self, task: Task, manifest: Manifest, ran: bool) -> None:
        """Adds a finished task to the timeline."""
        row = {
            "stage": task.contract.name,
            "key": task.key.digest,
            "shard": None if task.shard is None else str(task.shard),
            "started": manifest.started,
            "seconds": manifest.seconds,
            "attempts": manifest.metrics.get("attempts", 1),
            "host": manifest.host,
            "status": "run" if ran else "skipped",
        }
        rows = [r for r in self.record.get("timeline", []) if (r["stage"], r["shard"]) != (row["stage"], row["shard"])]
        self.record["timeline"] = [*rows, row]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`path old → new` for every value that can change a result."""
    a, b = dict(flatten(old)), dict(flatten(new))
    free = {*PLACES, "cluster.plot"}
    names = [n for n in sorted(a.keys() | b.keys()) if not n.startswith("runtime.") and n not in free]
    return [f"{n} {a.get(n, 'unset')} → {b.get(n, 'unset')}" for n in names if a.get(n) != b.get(n)]


def run_pipeline(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Runs every stage that is not done; returns the run's summary.

    Raises:
        MoeAsrError: as raised by the stages; finished results are kept.
    """
    run = Run(config)
    run.check_same(resume)
    warn_of_shared_speakers(run.corpus)
    with run.serving(), handle_signals() as stopping, log_to_run(run):
        try:
            plan = _run_stages(run, stopping)
            for _ in range(ROUNDS - 1):
                try:
                    return finish(run, plan)
                except RetryableError as error:  # a result of an earlier run turned out damaged when it was fetched
                    log.warning("%s", error)
                    plan = _run_stages(run, stopping)
            return finish(run, plan)
        except BaseException as error:
            stopped = isinstance(error, Preempted) or not isinstance(error, Exception)
            run.save("stopped" if stopped else "failed", run.plan())
            raise


def warn_of_shared_speakers(corpus: Corpus) -> None:
    """Logs a warning if speakers of test are also in train, so that test does not measure new speakers."""
    tested = {u.speaker for u in corpus.split("test")} - {""}
    shared = tested & {u.speaker for u in corpus.split("train")}
    if shared:
        log.warning(
            "%d of %d speakers in test are also in train (%s …): the error rates will say nothing about new speakers",
            *(len(shared), len(tested), min(shared)),
        )


def _run_stages(run: Run, stopping: Callable[[], bool]) -> Plan:
    for _ in range(ROUNDS):
        plan = run.plan(deep=run.rehashes)
        quarantine_stale(run.store, plan.planned)
        run.save("running", plan)
        for planned in plan.planned:
            if planned.status == "stale":
                log.info("%s is recreated: %s", planned.task.label, planned.reason)
            if planned.status == "done":
                run.telemetry.stage(planned.task.contract.name, planned.task.shard).add(TASKS, result="skipped")
        try:
            while not plan.finished:
                _run_next(run, plan, stopping)
                plan = run.plan()
                run.save("running", plan)
            return plan
        except RetryableError as error:
            log.warning("%s", error)
            failed = error
    raise failed


def _run_next(run: Run, plan: Plan, stopping: Callable[[], bool]) -> None:
    """Runs all tasks that are not done of the first stage that has any."""
    waiting = [p for p in plan.planned if p.status != "done"]
    stage = waiting[0].task.contract.name
    planned = [p for p in waiting if p.task.contract.name == stage]
    slots = parallel_slots(run.config) if len(planned) > 1 else []
    together = planned[0].task.contract.processes(run.config) > 1
    if together or len(slots) > 1:
        try:
            with run.telemetry.stage(stage).marked(RUNNING):
                run_in_processes(
                    run.config, planned, [None] if together else slots, scratch=run.cache, stopping=stopping
                )
        finally:  # where one failed, the others are done all the same
            _note_made(run, planned)
        return
    for planned_task in planned:
        log.info("%s: started", planned_task.task.label)
        manifest = run_one(run, planned_task, stopping)
        run.note(planned_task.task, manifest, ran=True)
        log.info("%s: done in %.0f s", planned_task.task.label, manifest.seconds)


def _note_made(run: Run, planned: Sequence[Planned]) -> None:
    """Records the tasks that other processes have finished."""
    for planned_task in planned:
        state = inspect(run.store, planned_task.task.key)
        if state.status == "done" and state.manifest and state.manifest != planned_task.manifest:
            run.note(planned_task.task, state.manifest, ran=True)


def run_one(
    run: Run, planned: Planned, stopping: Callable[[], bool], notes: Mapping[str, Any] | None = None
) -> Manifest:
    """Runs one planned task; a whole artifact that was made from other inputs is quarantined first.

    Args:
        notes: further values for the manifest's metrics.
    """
    quarantine_stale(run.store, [planned])
    task, function = planned.task, run_function(planned.task.contract.name)
    return execute(
        task,
        function,
        run.config,
        run.store,
        corpus=run.corpus,
        scratch=run.cache,
        stopping=stopping,
        notes=notes,
        telemetry=run.telemetry,
    )


def quarantine_stale(store: Store, planned: Sequence[Planned]) -> None:
    """Quarantines artifacts that a plan found stale although their names and sizes are right, so that a process which
    plans without re-hashing makes them again too.
    """
    for one in planned:
        if one.status == "stale" and one.manifest is not None:
            state = inspect(store, one.task.key)
            if state.status == "done" and state.manifest == one.manifest:
                quarantine(store, one.task.key, state)


def follow_one(run: Run, planned: Planned, stopping: Callable[[], bool]) -> None:
    """The part of a process that trains a task together with the one that commits it (torchrun's rank 0)."""
    if planned.status != "done":
        function = run_function(planned.task.contract.name)
        follow(planned.task, function, run.config, run.store, corpus=run.corpus, scratch=run.cache, stopping=stopping)


def finish(run: Run, plan: Plan) -> dict[str, Any]:
    """Writes summary.json, report.html and the model card of a finished run, and returns the summary."""
    from common.storage.artifacts import download_folder, fetch

    seconds: dict[str, float] = {}
    folders: dict[str, list[Path]] = {}
    for planned in plan.planned:
        assert planned.manifest is not None
        name = planned.task.contract.name
        seconds[name] = round(seconds.get(name, 0.0) + planned.manifest.seconds, 2)
        if not any(row.get("key") == planned.task.key.digest for row in run.record["timeline"]):
            run.note(planned.task, planned.manifest, ran=False)
        folder = fetch(run.store, planned.task.key, planned.manifest, download_folder(run.cache, planned.task.key))
        folders.setdefault(planned.task.contract.output, []).append(folder)
    summary = read_object(folders["model"][0] / "summary.json")
    name = run.config.run
    summary |= {"seconds": seconds, "run": name, "report": f"{run.store.url.rstrip('/')}/{name}/report.html"}
    summary["model"] = f"{run.store.url.rstrip('/')}/{plan.groups['model'].prefix}"
    if hint := _hint(run.config, folders):
        summary["hint"] = hint
        log.info("hint: %s", hint)
    view = RunView(
        name=name,
        subject={"model": run.config.model.name, "corpus": run.config.corpus.path, "seed": str(run.config.seed)},
        config_yaml=to_yaml(run.config),
        version=__version__,
        summary=summary,
        cluster=_first(folders, "clusters"),
        gate=_first(folders, "gate"),
        experts=[*folders.get("shared", []), *folders.get("experts", [])],
        asr=folders["model"][0],
        timeline=run.timeline(plan),
        audio_root=run.corpus.url,
        etiologies={u.id: u.etiology for u in run.corpus.utterances},
    )
    run.store.write(f"{name}/summary.json", to_json(summary))
    run.store.write(f"{name}/report.html", render_report(view).encode())
    run.store.write(f"{name}/README.md", _card(run, plan, summary, folders["model"][0]).encode())
    run.save("done", plan)
    return summary


def _card(run: Run, plan: Plan, summary: Mapping[str, Any], asr: Path) -> str:
    """The model card of a finished run."""
    (manifest,) = [p.manifest for p in plan.planned if p.task.contract.output == "model"]
    assert manifest is not None
    return model_card(
        run.config,
        summary=summary,
        report=read_object(asr / "report.json"),
        manifest=manifest,
        model_digest=run.sources["model"],
        corpus_digest=run.sources["corpus"],
        utterances=run.corpus.utterances,
    )


def _hint(config: Config, folders: Mapping[str, list[Path]]) -> str:
    """The hint on the routing that fits the corpus."""
    gate, clusters = (_first(folders, name) for name in ("gate", "clusters"))
    report = read_object(folders["model"][0] / "report.json")
    return corpus_hint(
        read_object(gate / "report.json") if gate else None,
        read_object(clusters / "report.json") if clusters else None,
        report["experts_judged"],
        route_by=config.asr.route_by,
        routed=report["experts"],
    )


def _first(folders: Mapping[str, list[Path]], name: str) -> Path | None:
    return folders[name][0] if name in folders else None


@contextmanager
def log_to_run(run: Run) -> Iterator[None]:
    """Writes the log lines of this run next to its record (into a remote store when the block ends, after those of
    other machines; lines of a killed process wait in the cache).
    """
    name = f"{run.config.run}/logs/run.log"
    inside = run.store.local_path(name, to_write=True)
    place = hashlib.sha256(run.store.url.encode()).hexdigest()[:16]
    path = inside or run.cache / "logs" / place / f"{run.config.run}.log"
    with explained(path.parent):
        make_folders(path.parent)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        if inside is None:
            earlier = run.store.read(name, MAX_FILE) if run.store.size(name) is not None else b""
            run.store.write(name, earlier + path.read_bytes())
            path.unlink()
