"""Added experts of models in a store: made, listed, removed, joined.

A run's record names the artifacts of its added experts beside those of its stages. An extension is a run record that
names one more: the model's own files are shared, none is copied.
"""

from __future__ import annotations

import hashlib
import json
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
from common.errors import DataError, UsageError
from common.files import NotFound
from common.inference.added import STAGE, model_content, nearest
from common.inference.load_model import OpenedModel
from common.json_files import Row, read_object
from common.model.added import NAME, AddedExpert, Method, read_added, remove_last
from common.pipeline.plan import Task
from common.pipeline.runs import RUN_NAME, find_run, read_record, run_names
from common.pipeline.stage import execute
from common.storage.artifacts import Key, fetch, inspect, make_key
from common.storage.manifest import MANIFEST, Manifest
from common.storage.store import Store, remove_all
from stages.extend import CONTRACT
from stages.extend.enrolment import enrolled
from stages.extend.run import DETAILS, Request, run


@dataclass(frozen=True)
class Wish:
    """What a user asks for.

    Attributes:
        name: of the expert.
        column, value: whose utterances it learns from and will get.
        method: a way, or `auto`.
        run: name of the run that will name it; by default that of the model and the expert.
        replace: an expert of this name that is there gives way.
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
    """What came of it.

    Attributes:
        run: name of the run that names it; empty where none does, or nothing was added.
        info: of the expert.
        details: extension.json.
        page: what only a report shows (`Request.page`); empty where the artifact was there already.
    """

    run: str
    info: AddedExpert
    details: Row
    page: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A planned extension: what it is made from, under which key, and whether that is there."""

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
        check_run: refuse a run of this name that is something else.

    Raises:
        UsageError: a name that cannot be used, or is there already.
        DataError: the corpus has no utterance to learn from.
    """
    _check_name(wish.name)
    record = parent_record(opened, config, store)
    clash = [
        one for one in opened.added if one.name == wish.name or (one.column, one.value) == (wish.column, wish.value)
    ]
    if clash and not wish.replace:
        one = clash[0]
        raise UsageError(
            f"{wish.name}: model {opened.name} has an expert {one.name!r} for {one.column} {one.value!r} already "
            f"({one.method}, {one.utterances} utterances): --replace puts the new one in its place"
        )
    utterances = enrolled(corpus, wish.column, wish.value)
    parent = parent_digest(opened)
    values: dict[str, Any] = {"name": wish.name, "column": wish.column, "value": wish.value, "method": wish.method}
    values |= {"curve": wish.curve, "seed": config.seed, "context": opened.context, "margin": opened.margin}
    key = make_key(STAGE, CONTRACT.format, values, {"parent": parent, "corpus": index_digest(utterances)})
    asr = [Key(task["stage"], task["key"]) for task in record["tasks"].values() if task["stage"] == "asr"]
    task = Task(CONTRACT, None, key, {"parent": tuple(asr)} if asr else {})
    request = Request(wish.name, wish.column, wish.value, wish.method, wish.curve, utterances, parent)
    name = wish.run or f"{_slug(opened.name)}-{wish.name}"
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"--run {name}: use letters, digits, dots, dashes and underscores")
    if check_run or name == record["name"]:
        _check_target(store, name, record, key, in_place=name == record["name"])
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
    """Makes an added expert, unless it is there; no run names it yet (`join`).

    Args:
        notes: further values for the manifest's metrics.

    Raises:
        MoeAsrError: as `run` raises; a checkpoint is kept.
    """
    for _ in opened.added:
        remove_last(opened.recogniser)  # the expert is fitted on what is the same for everybody
    bare = replace(opened, added=(), voice=-1)
    function = partial(run, opened=bare, request=plan.request)
    manifest = execute(plan.task, function, config, store, corpus=corpus, scratch=cache, stopping=stopping, notes=notes)
    folder = fetch(store, plan.task.key, manifest, cache / "inputs" / STAGE / plan.task.key.digest)
    info = read_added(folder)
    return Extension("", info, read_object(folder / DETAILS), plan.request.page)


def join(plans: Sequence[Plan], store: Store, cache: Path) -> list[AddedExpert]:
    """Writes the run that names the added experts of plans for one model, beside those that the model has.

    Returns:
        Those that were added; those of which nothing came are left out, and where all are, no run is written.

    Raises:
        DataError: one is not made yet.
    """
    made = []
    for plan in plans:
        manifest = _made(store, plan.task.key, plan.request.name)
        info = read_added(fetch(store, plan.task.key, manifest, cache / "inputs" / STAGE / plan.task.key.digest))
        made += [(info, plan.task.key)] if info.method != "none" else []
    if made:
        record = plans[0].record
        there = added_of(store, record, cache)
        kept = [key for one, key in there if not any(_same(one, info) for info, _ in made)]
        write_record(store, plans[0].run, record, [*kept, *(key for _, key in made)])
    return [info for info, _ in made]


def _same(one: AddedExpert, other: AddedExpert) -> bool:
    return one.name == other.name or (one.column, one.value) == (other.column, other.value)


def parent_digest(opened: OpenedModel) -> str:
    """What a model contributes to the keys of its added experts: all weights, those of its base too."""
    base = opened.info.base_digest if opened.info else model_content(opened.base)
    return hashlib.sha256(f"{model_content(opened.folder)}/{base}".encode()).hexdigest()


def parent_record(opened: OpenedModel, config: Config, store: Store) -> dict[str, Any]:
    """The record of the model's run; of a model that is no run of this store, one that names where it lies."""
    found = find_run(opened.name, store)
    if found and found[0].url == store.url:
        return found[1]
    if found:
        raise UsageError(f"model {opened.name} is a run of another store: --store {found[0].url}")
    local = Path(opened.name).exists()
    settings = config.model_dump(mode="json")
    settings["model"] |= {"name": opened.name, "language": opened.language}
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
        },
    }


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name an expert: --name takes letters, digits, dots, dashes, underscores")


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("._-") or "model"


def _check_target(store: Store, name: str, record: Mapping[str, Any], key: Key, *, in_place: bool) -> None:
    """Refuses a run that is something else; the same extension once more, or its parent itself, is fine."""
    there = read_record(store, name)
    if there is None or in_place:
        if in_place and not _added_tasks(record):
            raise UsageError(f"--run {name} is the model itself: give its extension a name of its own")
        return
    ours = {task["key"] for task in _added_tasks(record).values()} | {key.digest}
    if {task["key"] for task in _added_tasks(there).values()} - ours or not _added_tasks(there):
        raise UsageError(f"run {name!r} is in {store.url} already: name another with --run, or extend {name} itself")


def _added_tasks(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {label: task for label, task in record["tasks"].items() if task["stage"] == STAGE}


def added_of(store: Store, record: Mapping[str, Any], cache: Path) -> list[tuple[AddedExpert, Key]]:
    """The added experts of a run and their keys, in order.

    Raises:
        DataError: one is not there.
    """
    found = []
    for label, task in _added_tasks(record).items():
        key = Key(STAGE, task["key"])
        manifest = _made(store, key, label)
        found.append((read_added(fetch(store, key, manifest, cache / "inputs" / STAGE / key.digest)), key))
    return found


def _made(store: Store, key: Key, label: str) -> Manifest:
    state = inspect(store, key)
    if state.manifest is None or state.status != "done":
        raise DataError(f"{label} ({key.digest[:8]}) is not in {store.url} ({state.reason}): extend the model again")
    return state.manifest


def write_record(store: Store, name: str, parent: Mapping[str, Any], keys: Sequence[Key]) -> None:
    """Writes the run that has a model's stages and these added experts."""
    tasks = {label: task for label, task in parent["tasks"].items() if task["stage"] != STAGE}
    tasks |= {f"{STAGE}[{number}]": {"key": key.digest, "stage": STAGE} for number, key in enumerate(keys)}
    now = time.time()
    record = {**parent, "schema": 1, "name": name, "status": "done", "version": __version__, "tasks": tasks}
    record |= {"started": now, "updated": now, "workflow": None, "extends": parent.get("extends") or parent["name"]}
    store.write(f"{name}/run.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    _write_card(store, name, record["extends"], len(keys))


def _write_card(store: Store, name: str, root: str, count: int) -> None:
    """The model's own card with the number of its added experts: who they are for is nobody else's business."""
    card = f"# {name}\n"
    if root:  # the model is a run
        with suppress(NotFound):
            card = store.read(f"{root}/README.md").decode()
    told = f"Speakers and groups that got an expert of their own after training: {count}."
    store.write(f"{name}/README.md", f"{card.rstrip()}\n\n## Added experts\n\n{told}\n".encode())


def extension_record(name: str, store: Store) -> tuple[Store, dict[str, Any]]:
    """Store and record of a run with added experts.

    Raises:
        DataError: it is no run.
    """
    found = find_run(name, store)
    if found is None:
        raise DataError(f"no run {name!r} in {store.url}; runs there: {', '.join(run_names(store)) or 'none'}")
    return found


def remove(name: str, expert: str, store: Store, cache: Path) -> list[str]:
    """Takes an added expert out of a run; deletes its files unless another run names them.

    Returns:
        The other runs that name it.

    Raises:
        UsageError: the run has no such expert.
    """
    store, record = extension_record(name, store)
    added = added_of(store, record, cache)
    key = next((key for one, key in added if one.name == expert), None)
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
    except (DataError, NotFound):  # a damaged record: nobody can tell, so nothing of it is deleted
        return True
    return record is not None and key.digest in (task["key"] for task in _added_tasks(record).values())


def _delete_artifact(store: Store, key: Key, cache: Path) -> None:
    """Deletes an artifact, its manifest first, and what was brought here of it."""
    remove_all(store, f"{key.prefix}{MANIFEST}")
    remove_all(store, key.prefix)
    shutil.rmtree(cache / "inputs" / key.stage / key.digest, ignore_errors=True)
