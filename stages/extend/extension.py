"""Makes, lists, removes and joins added experts of models in a store.

A run's record names the artifacts of its added experts in addition to those of its stages. An extension is a run record
with one more such artifact: the model's files are shared, not copied.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import __version__
from common.config import Config
from common.data.corpus import Corpus, index_digest
from common.data.sources import folder_digest
from common.errors import DataError, UsageError
from common.files import NotFound
from common.inference.added_experts import STAGE, model_content, nearest
from common.inference.load_model import OpenedModel, Usage
from common.json_files import Row, read_object, to_json
from common.model.added_experts import NAME, AddedExpert, Method, read_added, remove_last
from common.pipeline.plan import Task
from common.pipeline.runs import RUN_NAME, find_run, read_record, run_names
from common.pipeline.stage import execute
from common.storage.artifacts import Key, download_folder, fetch, inspect, make_key
from common.storage.manifest import MANIFEST
from common.storage.store import Store, remove_all
from common.telemetry import Telemetry, serving
from stages.extend import CONTRACT
from stages.extend.enrolment import enrolled
from stages.extend.run import DETAILS, Request, run


@dataclass(frozen=True)
class Wish:
    """The user's request for an added expert.

    Attributes:
        name: name of the expert.
        column, value: column and value of the utterances on which it is trained and for which it is used.
        method: a method, or `auto`.
        run: name of the run that will contain it; by default made from the names of the model and the expert.
        replace: replace an existing expert of this name.
        curve: measure a learning curve too.
    """

    name: str
    column: str
    value: str
    method: Method | Literal["auto"] = "auto"
    run: str = ""
    replace: bool = False
    curve: bool = False


@dataclass(frozen=True)
class Extension:
    """Result of an extension.

    Attributes:
        run: name of the run that contains it; empty if there is none, or if nothing was added.
        info: description of the expert.
        details: extension.json.
        page: data for the report only (`Request.page`); empty if the artifact existed already.
    """

    run: str
    info: AddedExpert
    details: Row
    page: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A planned extension: its inputs, its key, and whether its artifact exists."""

    task: Task
    request: Request
    run: str
    state: str
    record: dict[str, Any]


def make_plan(
    opened: OpenedModel, corpus: Corpus, config: Config, store: Store, wish: Wish, *, check_run: bool = True
) -> Plan:
    """Finds the enrolment and the key of an extension; runs nothing.

    Args:
        check_run: refuse an existing run of this name that is not this extension; otherwise only one that is no
            extension of the same model.

    Raises:
        UsageError: a name is invalid or already exists.
        DataError: the corpus has no utterances for training.
    """
    if not NAME.fullmatch(wish.name):
        raise UsageError(
            f"{wish.name!r} cannot name an expert: --name takes letters, digits, dots, dashes, underscores"
        )
    record = parent_record(opened, config, store)
    clash = [info for info in opened.added if _same(info, wish)]
    own = opened.added[: len(opened.added) - len(_added_tasks(record))]  # in the model's folder, not in its run
    if clash and (not wish.replace or any(info in own for info in clash)):
        info = clash[0]
        remedy = (
            "it is part of that folder: extend the runs that were merged" if wish.replace else "--replace replaces it"
        )
        raise UsageError(
            f"{wish.name}: model {opened.name} already has an expert {info.name!r} for {info.column} {info.value!r} "
            f"({info.method}, {info.utterances} utterances): {remedy}"
        )
    utterances = enrolled(corpus, wish.column, wish.value)
    parent = parent_digest(opened)
    values: dict[str, Any] = {"name": wish.name, "column": wish.column, "value": wish.value, "method": wish.method}
    values |= {"curve": wish.curve, "seed": config.seed, "context": opened.context, "margin": opened.margin}
    values |= {"language": opened.spoken, "task": opened.task, "precision": config.precision}
    values |= {"decode": config.decode.model_dump(mode="json")}
    key = make_key(STAGE, CONTRACT.format, values, {"parent": parent, "corpus": index_digest(utterances)})
    asr = [Key(task["stage"], task["key"]) for task in record["tasks"].values() if task["stage"] == "asr"]
    task = Task(CONTRACT, None, key, {"parent": tuple(asr)} if asr else {})
    request = Request(wish.name, wish.column, wish.value, wish.method, wish.curve, utterances, parent)
    name = wish.run or f"{slug(opened.name)}-{wish.name}"
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"--run {name}: use letters, digits, dots, dashes and underscores")
    if check_run or name == record["name"]:
        _check_target(store, name, record, key, in_place=name == record["name"])
    else:
        _check_joined(store, name, record)
    return Plan(task, request, name, inspect(store, key).status, record)


def make(
    plan: Plan,
    opened: OpenedModel,
    corpus: Corpus,
    config: Config,
    store: Store,
    cache: Path,
    *,
    stopping: Callable[[], bool],
    notes: Mapping[str, Any] | None = None,
) -> Extension:
    """Makes an added expert unless it exists, and serves live metrics meanwhile if configured. The expert is not yet
    part of a run (see `join`).

    Args:
        notes: further values for the manifest's metrics.

    Raises:
        MoeAsrError: as `run` raises; a checkpoint is kept.
    """
    for _ in opened.added:
        remove_last(opened.recogniser)  # the expert is fitted on the parts shared by all utterances
    bare = replace(opened, added=(), voice=-1)
    function = partial(run, opened=bare, request=plan.request)
    telemetry, runtime = Telemetry(), config.runtime
    with serving(telemetry, runtime.metrics_port, runtime.metrics_host, runtime.metrics_linger_seconds):
        manifest = execute(
            plan.task,
            function,
            config,
            store,
            corpus=corpus,
            scratch=cache,
            stopping=stopping,
            notes=notes,
            telemetry=telemetry,
        )
    folder = fetch(store, plan.task.key, manifest, download_folder(cache, plan.task.key))
    info = read_added(folder)
    return Extension("", info, read_object(folder / DETAILS), plan.request.page)


def join(plans: Sequence[Plan], store: Store, cache: Path) -> list[AddedExpert]:
    """Writes the run with the added experts of plans for one model, in addition to those that the model has.

    Returns:
        The added experts; plans whose result is that nothing is added are omitted, and without any added expert no run
        is written.

    Raises:
        DataError: an expert is not made yet.
        UsageError: the run exists and would lose an expert.
    """
    check_experts_stay(plans, store, cache)
    made = []
    for plan in plans:
        info = _read(store, plan.task.key, plan.request.name, cache)
        made += [(info, plan.task.key)] if info.method != "none" else []
    if made:
        record = plans[0].record
        there = added_of(store, record, cache)
        kept = [key for info, key in there if not any(_same(info, new) for new, _ in made)]
        write_record(store, plans[0].run, record, [*kept, *(key for _, key in made)])
    return [info for info, _ in made]


def check_experts_stay(plans: Sequence[Plan], store: Store, cache: Path) -> None:
    """Refuses to write an existing run if it has added experts that neither the extended model nor the plans have.

    Raises:
        UsageError: there are such experts; the message names them.
    """
    name, record = plans[0].run, plans[0].record
    there = read_record(store, name)
    if there is None:
        return
    kept = {task["key"] for task in _added_tasks(record).values()}
    requests = [plan.request for plan in plans]
    added = [info for info, key in added_of(store, there, cache) if key.digest not in kept]
    lost = [info.name for info in added if not any(_same(info, request) for request in requests)]
    if lost:
        raise UsageError(
            f"run {name!r} in {store.url} already has added experts ({', '.join(lost)}), which it would lose: "
            f"extend that run itself (parent={name} run={name}), or name another by run="
        )


def _same(info: AddedExpert, other: AddedExpert | Request | Wish) -> bool:
    return info.name == other.name or (info.column, info.value) == (other.column, other.value)


def parent_digest(opened: OpenedModel) -> str:
    """The model's part of the keys of its added experts: a digest of its files, including those of its base."""
    return hashlib.sha256(f"{model_content(opened.folder)}/{folder_digest(opened.base)}".encode()).hexdigest()


def parent_record(opened: OpenedModel, config: Config, store: Store) -> dict[str, Any]:
    """The record of the model's run; for a model that is not a run of this store, a record of its location."""
    located = find_run(opened.name, store)
    if located and located[0].url == store.url:
        return located[1]
    if located:
        raise UsageError(f"model {opened.name} is a run of another store: --store {located[0].url}")
    local = Path(opened.name).exists()
    settings = config.model_dump(mode="json")
    settings["model"] |= {"name": opened.name, "language": opened.spoken, "task": opened.task}
    return {
        "name": "",
        "config": settings,
        "keys": {},
        "tasks": {},
        "timeline": [],
        "sources": {},
        "root": {
            "name": str(Path(opened.name).resolve()) if local else opened.name,
            "digest": model_content(opened.folder),
            "usage": Usage(opened.spoken, opened.task, opened.context, opened.margin)._asdict(),
        },
    }


def slug(text: str) -> str:
    """A name of letters, digits, dots, dashes and underscores that is made from another."""
    return re.sub(r"[^\w.-]+", "_", text.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("._-") or "model"


def _check_target(store: Store, name: str, record: Mapping[str, Any], key: Key, *, in_place: bool) -> None:
    """Refuses an existing run unless it is the same extension or its parent."""
    there = read_record(store, name)
    if there is None or in_place:
        if in_place and not _added_tasks(record):
            raise UsageError(f"--run {name} is the model itself: give its extension a name of its own")
        return
    ours = {task["key"] for task in _added_tasks(record).values()} | {key.digest}
    if {task["key"] for task in _added_tasks(there).values()} - ours or not _added_tasks(there):
        raise UsageError(f"run {name!r} already exists in {store.url}: name another by --run, or extend {name} itself")


def _check_joined(store: Store, name: str, record: Mapping[str, Any]) -> None:
    """Refuses an existing run that is no extension of the same model."""
    there = read_record(store, name)
    parent = record.get("extends") or record["name"]
    if there is not None and (not _added_tasks(there) or there.get("extends") != parent):
        raise UsageError(f"run {name!r} already exists in {store.url} and is no extension of {parent}: name another")


def _added_tasks(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {label: task for label, task in record["tasks"].items() if task["stage"] == STAGE}


def added_of(store: Store, record: Mapping[str, Any], cache: Path) -> list[tuple[AddedExpert, Key]]:
    """The added experts of a run and their keys, in order.

    Raises:
        DataError: an added expert is missing.
    """
    experts = []
    for label, task in _added_tasks(record).items():
        key = Key(STAGE, task["key"])
        experts.append((_read(store, key, label, cache), key))
    return experts


def _read(store: Store, key: Key, label: str, cache: Path) -> AddedExpert:
    state = inspect(store, key)
    if state.manifest is None or state.status != "done":
        raise DataError(f"{label} ({key.digest[:8]}) is not in {store.url} ({state.reason}): extend the model again")
    return read_added(fetch(store, key, state.manifest, download_folder(cache, key)))


def write_record(store: Store, name: str, parent: Mapping[str, Any], keys: Sequence[Key]) -> None:
    """Writes a run with a model's stages and these added experts."""
    tasks = {label: task for label, task in parent["tasks"].items() if task["stage"] != STAGE}
    tasks |= {f"{STAGE}[{number}]": {"key": key.digest, "stage": STAGE} for number, key in enumerate(keys)}
    now = time.time()
    record = {**parent, "schema": 1, "name": name, "status": "done", "version": __version__, "tasks": tasks}
    record |= {"started": now, "updated": now, "workflow": None, "extends": parent.get("extends") or parent["name"]}
    store.write(f"{name}/run.json", to_json(record))
    _write_card(store, name, record["extends"], len(keys))


def _write_card(store: Store, name: str, root: str, count: int) -> None:
    """Writes the model's card with the number of its added experts, without their speakers, for privacy."""
    card = f"# {name}\n"
    if root:  # the model is a run
        with suppress(NotFound):
            card = store.read(f"{root}/README.md").decode()
    sentence = f"Speakers and groups that got an expert of their own after training: {count}."
    store.write(f"{name}/README.md", f"{card.rstrip()}\n\n## Added experts\n\n{sentence}\n".encode())


def remove(name: str, expert: str, store: Store, cache: Path) -> list[str]:
    """Removes an added expert from a run; deletes its files unless another run uses them.

    Returns:
        The other runs that use it.

    Raises:
        DataError: there is no such run.
        UsageError: the run has no such expert.
    """
    located = find_run(name, store)
    if located is None:
        raise DataError(f"no run {name!r} in {store.url}; runs there: {', '.join(run_names(store)) or 'none'}")
    store, record = located
    added = added_of(store, record, cache)
    key = next((key for info, key in added if info.name == expert), None)
    if key is None:
        raise UsageError(
            f"run {record['name']} has no added expert {expert!r}{nearest(expert, [a.name for a, _ in added])}"
        )
    write_record(store, record["name"], record, [other for _, other in added if other != key])
    others = [other for other in run_names(store) if other != record["name"] and _names_key(store, other, key)]
    if not others:
        _delete_artifact(store, key, cache)
    return others


def _names_key(store: Store, name: str, key: Key) -> bool:
    try:
        record = read_record(store, name)
    except (DataError, NotFound):  # a damaged record: its use is unknown, so nothing is deleted
        return True
    return record is not None and key.digest in (task["key"] for task in _added_tasks(record).values())


def _delete_artifact(store: Store, key: Key, cache: Path) -> None:
    """Deletes an artifact, beginning with its manifest, and its downloaded files."""
    remove_all(store, f"{key.prefix}{MANIFEST}")
    remove_all(store, key.prefix)
    shutil.rmtree(download_folder(cache, key), ignore_errors=True)
