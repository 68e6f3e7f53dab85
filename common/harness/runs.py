"""The records of finished and running runs in a store: `<run>/run.json`, and the artifacts that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.storage import open_store
from common.storage.artifacts import Key, fetch, inspect
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


def stage_folders(store: Store, record: dict[str, Any], stage: str, cache: Path) -> list[Path]:
    """Local folders of a stage's finished pieces.

    Args:
        record: the run's.
        cache: where those of a remote store are brought.

    Raises:
        DataError: the run has no such stage, or it is not done.
    """
    folders = []
    for label, task in record["tasks"].items():
        if task["stage"] == stage:
            key = Key(stage, task["key"], {})
            state = inspect(store, key)
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
