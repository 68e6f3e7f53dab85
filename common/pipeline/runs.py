"""The records of finished and running runs in a store: `<run>/run.json`, and the artifacts that it names."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from common.config import PLACES
from common.errors import DataError
from common.files import NotFound
from common.storage import open_store
from common.storage.artifacts import Key, State, download_folder, fetch, inspect
from common.storage.manifest import KEY_DIGEST, ONE_LINE, STAGE_NAME
from common.storage.store import Store

SCHEMA = 1
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _one_line(text: str) -> str:
    if not ONE_LINE.fullmatch(text):
        raise ValueError("not one line of text")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Stage = Annotated[str, Field(pattern=f"^{STAGE_NAME.pattern}$")]


class _Loose(BaseModel):
    """Part of a record; what a later version adds is let through."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Task(_Loose):
    stage: Stage
    key: str = Field(pattern=f"^{KEY_DIGEST.pattern}$")


class _Row(_Loose):
    """Of the timeline."""

    stage: Stage
    shard: Annotated[str, Field(pattern=r"^[0-9]{1,9}$")] | None
    key: str | None = Field(None, pattern=f"^{KEY_DIGEST.pattern}$")
    started: FiniteFloat
    seconds: FiniteFloat
    host: Line
    status: Literal["run", "skipped"]


class _ModelSetting(_Loose):
    language: Line


class _Settings(_Loose):
    """Of the configuration, what is read without validating all of it."""

    seed: int
    model: _ModelSetting
    decode: dict[str, Any]


class _Ingredients(_Loose):
    """Of a key."""

    format: int
    values: dict[Line, Any]
    inputs: dict[Line, Line]


class _Root(_Loose):
    """The model that experts were added to, where that is no run."""

    name: Line
    digest: str = Field(pattern="^[0-9a-f]{64}$")


class _Record(_Loose):
    status: Literal["running", "done", "stopped", "failed"]
    version: Line
    started: FiniteFloat
    updated: FiniteFloat
    config: _Settings
    keys: dict[Stage, _Ingredients]
    tasks: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*(\[[0-9]{1,9}\])?$")], _Task]
    timeline: list[_Row]
    root: _Root | None = None
    extends: Line | None = None


def read_record(store: Store, name: str) -> dict[str, Any] | None:
    """run.json of a run, None when there is none.

    Raises:
        DataError: it is damaged, or of a newer version.
    """
    key = f"{name}/run.json"
    where = f"{store.url.rstrip('/')}/{key}"
    try:
        record = json.loads(store.read(key))
        if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] > SCHEMA:
            raise DataError(
                f"{where} has format {record['schema']}, this version of moe-asr supports {SCHEMA}: upgrade it"
            )
        _Record.model_validate(record)
    except NotFound:
        return None
    except ValidationError as failed:
        problem = failed.errors(include_input=False, include_url=False)[0]
        raise _damaged(where, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (ValueError, RecursionError):
        raise _damaged(where, "it is not JSON") from None
    return {**record, "name": name}  # whatever name the record contains


def _damaged(where: str, reason: str) -> DataError:
    return DataError(f"{where} is damaged ({reason}): `moe-asr run` with the run's configuration writes it again")


def settings_alone(record: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run without locations and `runtime`, which are not taken from a store.

    Args:
        record: the run's record.
    """
    tree: dict[str, Any] = copy.deepcopy({n: v for n, v in record["config"].items() if n not in ("runtime", *PLACES)})
    for path in PLACES:
        section, _, name = path.partition(".")
        if name and isinstance(tree.get(section), dict):
            tree[section].pop(name, None)
    return tree


def run_names(store: Store) -> list[str]:
    """Names of all runs of a store."""
    parts = [entry.key.split("/") for entry in store.list("")]
    return sorted({at[0] for at in parts if len(at) == 2 and at[1] == "run.json" and RUN_NAME.fullmatch(at[0])})


def run_record(store: Store, name: str) -> dict[str, Any]:
    """run.json of a run; `runs/demo` and `demo` both name it.

    Raises:
        DataError: there is no such run.
    """
    record = read_record(store, Path(name).name)
    if record is None:
        names = ", ".join(run_names(store)) or "none"
        raise DataError(f"no run {Path(name).name!r} in {store.url}; runs there: {names}")
    return record


def find_run(name: str, store: Store | None) -> tuple[Store, dict[str, Any]] | None:
    """Store and record of the run given by its name or folder; None if there is no such run.

    Args:
        name: a folder with run.json, or `demo` and, in the store `runs`, `runs/demo`, but no name that can be a hub
            name or an address.
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
    """Label, key and state of each task of a run as recorded; the corpus may have changed since.

    Args:
        record: the run's record.
        stage: stage of the tasks; all stages if None.
        deep: as in `inspect`.
    """
    for label, task in record["tasks"].items():
        if stage in (None, task["stage"]):
            key = Key(task["stage"], task["key"])
            yield label, key, inspect(store, key, deep=deep)


def stage_folders(store: Store, record: dict[str, Any], stage: str, cache: Path) -> list[Path]:
    """Local folders of a stage's finished tasks.

    Args:
        record: the run's record.
        cache: folder for downloads from a remote store.

    Raises:
        DataError: the run has no such stage, or it is not done.
    """
    folders = []
    for label, key, state in recorded_states(store, record, stage):
        if state.manifest is None or state.status != "done":
            raise DataError(
                f"{label} of run {record['name']} is not done ({state.reason}): "
                "`moe-asr run` with its configuration continues it"
            )
        folders.append(fetch(store, key, state.manifest, download_folder(cache, key)))
    if not folders:
        stages = ", ".join(dict.fromkeys(task["stage"] for task in record["tasks"].values()))
        raise DataError(
            f"run {record['name']} has no stage {stage}: its configuration needs {stages} only"
            if record["status"] == "done"
            else f"run {record['name']} has no stage {stage} yet: `moe-asr run` with its configuration continues it"
        )
    return folders
