"""Checkpoints of a training, in the stage's store: written by a background thread, checked when they are read.

    <prefix><step>-<time>/state.safetensors, state.json, manifest.json      the manifest is written last

Every checkpoint has a separate folder, so that no checkpoint is overwritten and processes cannot mix their files.
"""

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import DataError, MoeAsrError
from common.files import NotFound, explained, file_hash, make_folders
from common.json_files import to_json
from common.storage.manifest import MANIFEST
from common.storage.store import Entry, Store, remove_all, warn_once
from common.telemetry import StageTelemetry, Telemetry
from common.tensors import first_not_finite

log = logging.getLogger(__name__)
SCHEMA = 1
TENSORS, STATE = "state.safetensors", "state.json"
KEEP = 2  # newest checkpoints
TORN_SECONDS = 3600  # a folder without manifest may be one that another process is writing, for so long


@dataclass(frozen=True, slots=True)
class _Snapshot:
    step: int
    tensors: dict[str, Tensor]  # on the CPU, owned by the snapshot
    state: str  # JSON


class Checkpointer:
    """Saves and finds checkpoints below a prefix of a store. One thread writes; the newest waiting snapshot wins."""

    def __init__(self, store: Store, prefix: str, *, scratch: Path, live: StageTelemetry | None = None) -> None:
        """
        Args:
            prefix: ends with `/`.
            scratch: a folder for uploads to and downloads from a remote store.
            live: counts checkpoints, their seconds and errors.
        """
        self.live = live or Telemetry().stage("")
        self.store, self.prefix, self.scratch = store, prefix, scratch
        self._lock = threading.Lock()
        self._waiting: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Copies the state to CPU memory and returns; it is written in the background.

        Args:
            tensors: by name, on any device; they may be changed after this call returns.
            state: JSON values.
            wait: return only after the checkpoint is written.

        Raises:
            MoeAsrError: this or an earlier write failed.
        """
        self._raise_error()
        with self._lock:
            self._waiting = None  # frees its memory before the next copy is made
        snapshot = _Snapshot(step, to_cpu(tensors), json.dumps(state))
        with self._lock:
            self._waiting = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._drain, name="checkpoint")
                self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written; raises the error of a failed write."""
        thread = self._thread
        if thread is not None:
            thread.join()
        self._raise_error()

    def latest(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint: step, tensors on the CPU, state. A damaged one is skipped with a warning."""
        self.wait()
        for name in sorted(self._folders(), reverse=True):
            for look in (1, 2):  # what is wrong once may have suffered on its way
                try:
                    return self._load(name, self._folders().get(name, {}))
                except _TornError as error:
                    if look == 2:
                        log.warning("checkpoint %s%s is skipped: %s", self.prefix, name, error)
        return None

    def clear(self) -> None:
        """Deletes all checkpoints, if the store allows it."""
        with self._lock:
            self._waiting = None
        self.wait()
        for name in self._folders(follow=False):
            self._delete(name)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _drain(self) -> None:
        """Body of the background thread: writes until nothing waits."""
        while True:
            with self._lock:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._thread = None
                    return
            try:
                with self.live.checkpoint():
                    self._write(snapshot)
                self._prune()
            except BaseException as error:
                self._error = error

    def _write(self, snapshot: _Snapshot) -> None:
        name = f"{snapshot.step:09d}-{time.time_ns() // 1000:016x}{secrets.token_hex(2)}"
        inside = self.store.local_path(self.prefix + name, to_write=True)
        folder = inside or self.scratch / f"checkpoint-{name}"
        try:
            with explained(folder):
                make_folders(folder)
                _save_tensors(snapshot.tensors, folder / TENSORS)
                (folder / STATE).write_text(snapshot.state, encoding="utf-8")
            files = {file: _describe(folder / file) for file in (TENSORS, STATE)}
            self.store.put_folder(folder, self.prefix + name)
            manifest = {"schema": SCHEMA, "step": snapshot.step, "files": files}
            self.store.write(f"{self.prefix}{name}/{MANIFEST}", to_json(manifest))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk, half a checkpoint is in the way
            raise
        if inside is None:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, name: str, entries: Mapping[str, Entry]) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        if MANIFEST not in entries:
            raise _TornError("it was not finished")
        into = self.scratch / f"checkpoint-{name}"
        try:
            manifest = _read_manifest(self.store.read(entries[MANIFEST].key))
            paths = {}
            for file, (size, sha256) in manifest["files"].items():
                if file not in entries or entries[file].size != size:
                    raise _TornError(f"{file} is missing or truncated")
                paths[file] = self.store.local_path(entries[file].key) or into / file
                if self.store.local_path("") is None:
                    self.store.get(entries[file].key, paths[file])
                if file_hash(paths[file]) != sha256:
                    raise _TornError(f"{file} is altered")
            tensors = load_file(paths[TENSORS])
            if broken := first_not_finite(tensors):
                raise _TornError(f"tensor {broken} contains NaN or infinite numbers")
            return manifest["step"], tensors, _read_state(paths[STATE])
        except (NotFound, KeyError, ValueError, SafetensorError) as error:
            raise _TornError(f"{type(error).__name__}: {error}") from None
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def _folders(self, *, follow: bool = True) -> dict[str, dict[str, Entry]]:
        """Folder name → file name → entry."""
        folders: dict[str, dict[str, Entry]] = {}
        for entry in self.store.list(self.prefix, follow=follow):
            folder, _, file = entry.key[len(self.prefix) :].partition("/")
            if file and folder[:9].isdigit():
                folders.setdefault(folder, {})[file] = entry
        return folders

    def _prune(self) -> None:
        try:
            folders, now = self._folders(follow=False), self.store.now()
        except MoeAsrError as error:
            warn_once(self.store, error)
            return
        whole = sorted(name for name, entries in folders.items() if MANIFEST in entries)
        torn = [
            name
            for name, entries in folders.items()
            if name not in whole and all(now - entry.modified > TORN_SECONDS for entry in entries.values())
        ]
        for name in [*whole[:-KEEP], *torn]:
            self._delete(name)

    def _delete(self, name: str) -> None:
        folder = f"{self.prefix}{name}/"
        remove_all(self.store, folder + MANIFEST)  # without it, the rest counts for nothing
        remove_all(self.store, folder)


class _TornError(DataError):
    """A checkpoint that cannot be used."""


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors in CPU memory; tensors of a GPU are copied together, through pinned memory."""
    copies = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it hides the system's error number in its text
        raise OSError(28 if "No space" in str(error) else 5, str(error), str(path)) from None


def _describe(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def _read_state(path: Path) -> dict[str, Any]:
    state = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise _TornError(f"{STATE} contains no JSON object")
    return state


def _read_manifest(data: bytes) -> dict[str, Any]:
    """Reads a manifest; raises DataError if a newer version wrote it."""
    try:
        manifest = json.loads(data)
        if manifest["schema"] > SCHEMA:
            raise DataError(
                f"a checkpoint has format {manifest['schema']}, this version of moe-asr supports {SCHEMA}: upgrade it"
            )
        files = {file: (int(record["size"]), str(record["sha256"])) for file, record in manifest["files"].items()}
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _TornError("its manifest is damaged") from None
    if set(files) != {TENSORS, STATE} or step < 0:
        raise _TornError("its manifest is damaged")
    return {"step": step, "files": files}
