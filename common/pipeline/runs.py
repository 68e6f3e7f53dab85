"""The records of finished and running runs in a store: `<run>/run.json`, and the artifacts that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.storage import open_store
from common.storage.artifacts import Key, State, fetch, inspect
from common.storage.store import Store


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """run.json of a run, None when there is none."""
    key = f"{name}/run.json"
    return dict(json.loads(store.read(key))) if store.size(key) is not None else None


def run_names(store: Store) -> list[str]:
    """Names of all runs of a store."""
    keys = (entry.key for entry in store.list(""))
    return sorted({key.split("/")[0] for key in keys if key.count("/") == 1 and key.endswith("/run.json")})


def run_record(store: Store, name: str) -> dict[str, Any]:
    """run.json of a run; `runs/demo` and `demo` both name it.

    Raises:
        DataError: there is no such run.
    """
    found = read_record(store, Path(name).name)
    if found is None:
        names = ", ".join(run_names(store)) or "none"
        raise DataError(f"no run {Path(name).name!r} in {store.url}; runs there: {names}")
    return found


def find_run(name: str, store: Store | None) -> tuple[Store, dict[str, Any]] | None:
    """Store and record of the run that a name or its own folder stands for; None where it stands for no run.

    Args:
        name: a folder with run.json; or `demo` and, in the store `runs`, `runs/demo`: not what has the look of a hub
            name or of an address.
    """
    folder = Path(name)
    if (folder / "run.json").is_file():
        store = open_store(folder.resolve().parent)
        return store, run_record(store, folder.resolve().name)
    plain = "://" not in name and ("/" not in name.rstrip("/") or (store and folder.parent == Path(store.url)))
    record = read_record(store, folder.name) if store and plain else None
    return (store, record) if store and record else None


def recorded_states(
    store: Store, record: Mapping[str, Any], stage: str | None = None, *, deep: bool = False
) -> Iterator[tuple[str, Key, State]]:
    """Label, key and state of each piece of a run, as it was recorded: the corpus may have changed since.

    Args:
        record: the run's.
        stage: whose pieces; those of all when left out.
        deep: as of `inspect`.
    """
    for label, task in record["tasks"].items():
        if stage in (None, task["stage"]):
            key = Key(task["stage"], task["key"])
            yield label, key, inspect(store, key, deep=deep)


def stage_folders(store: Store, record: dict[str, Any], stage: str, cache: Path) -> list[Path]:
    """Local folders of a stage's finished pieces.

    Args:
        record: the run's.
        cache: where those of a remote store are brought.

    Raises:
        DataError: the run has no such stage, or it is not done.
    """
    folders = []
    for label, key, state in recorded_states(store, record, stage):
        if state.manifest is None or state.status != "done":
            raise DataError(
                f"{label} of run {record['name']} is not done ({state.reason}): "
                "`moe-asr run` with its configuration goes on with it"
            )
        folders.append(fetch(store, key, state.manifest, cache / "inputs" / stage / key.digest))
    if not folders:
        raise DataError(
            f"run {record['name']} has no stage {stage} yet: `moe-asr run` with its configuration goes on with it"
        )
    return folders
