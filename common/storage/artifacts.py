"""Artifacts of stages: named by their inputs, committed by a manifest written last, checked before use.

    artifacts/<stage>/<key>/manifest.json          create-only; without it the stage is not done
    artifacts/<stage>/<key>/<attempt>/<files…>     what one attempt wrote; the manifest names the attempt that won

Writers of the same key use separate attempts, so that neither a race nor a killed process can mix two outputs.
"""

import hashlib
import json
import logging
import platform
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from common import __version__
from common.errors import DataError, RetryableError
from common.files import NotFound, explained, file_hash, make_folders
from common.storage.local import folder_files
from common.storage.manifest import MANIFEST, SCHEMA, FileRecord, Malformed, Manifest, content_digest
from common.storage.store import Store, remove_all

log = logging.getLogger(__name__)
ROOT = "artifacts/"
HASH_BYTES = 16 * 2**20  # read at once from a remote store
PARALLEL = 8
TRIES = 5  # of a commit that meets damaged manifests
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Key:
    """Name of an artifact, which is known before anything runs.

    Attributes:
        digest: 32 hex digits.
        ingredients: values from which the digest is computed, as plain JSON values.
    """

    stage: str
    digest: str
    ingredients: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def prefix(self) -> str:
        """Prefix of the artifact in its store."""
        return f"{ROOT}{self.stage}/{self.digest}/"


@dataclass(frozen=True, slots=True)
class State:
    """State of the artifact of a key.

    Attributes:
        reason: reason of `missing` and `damaged`.
        raw: bytes of the manifest that was checked.
    """

    status: Literal["done", "missing", "damaged"]
    reason: str = ""
    manifest: Manifest | None = None
    raw: bytes = field(default=b"", repr=False)


def make_key(stage: str, format_version: int, values: Mapping[str, Any], inputs: Mapping[str, str]) -> Key:
    """The key of a stage.

    Args:
        format_version: format version of the stage's output.
        values: every configuration value that the stage reads, by its dotted path.
        inputs: name → key or digest of each input.
    """
    ingredients = {"stage": stage, "format": format_version, "values": dict(values), "inputs": dict(inputs)}
    text = _canonical(ingredients)
    return Key(stage, hashlib.sha256(text).hexdigest()[:32], json.loads(text))


def shard_key(group: Key, index: int) -> Key:
    """The key of one task of a stage that fans out."""
    digest = hashlib.sha256(_canonical({"group": group.digest, "index": index})).hexdigest()[:32]
    return Key(group.stage, digest, {**group.ingredients, "shard": index})


def _canonical(value: Mapping[str, Any]) -> bytes:
    """A text that is the same for equal values, independent of the order of names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def inspect(store: Store, key: Key, *, deep: bool = False) -> State:
    """Whether an artifact exists and is whole; `damaged` only if a second check confirms the damage.

    Args:
        deep: re-hash all files; otherwise names and sizes are compared.

    Raises:
        DataError: a newer version wrote it.
    """
    state = _inspect_once(store, key, deep)
    return _inspect_once(store, key, deep) if state.status == "damaged" else state


def _inspect_once(store: Store, key: Key, deep: bool) -> State:
    where = f"{store.url}/{key.prefix}{MANIFEST}"
    try:
        raw = store.read(key.prefix + MANIFEST)
    except NotFound:
        return State("missing", "not made yet")
    try:
        manifest = Manifest.from_json(raw, where)
    except Malformed as error:
        return State("damaged", str(error), None, raw)
    if (manifest.stage, manifest.key) != (key.stage, key.digest):
        return State("damaged", f"{where} belongs to {manifest.stage}/{manifest.key}", manifest, raw)
    if manifest.digest != content_digest(manifest.files, manifest.volatile):
        return State("damaged", f"{where} has a digest that is not that of its files", manifest, raw)
    damage = _find_damage(store, f"{key.prefix}{manifest.attempt}/", manifest, deep)
    return State("damaged" if damage else "done", damage, manifest, raw)


def _find_damage(store: Store, folder: str, manifest: Manifest, deep: bool) -> str:
    """The first file that differs from the manifest; empty if there is none."""
    sizes = {entry.key[len(folder) :]: entry.size for entry in store.list(folder)}
    for name, file in sorted(manifest.files.items()):
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != file.size:
            return f"{name} has {sizes[name]:,} bytes instead of {file.size:,}"
    if deep:
        with ThreadPoolExecutor(PARALLEL if store.local_path("") is None else 2) as pool:
            hashes = pool.map(
                lambda name: _stored_hash(store, folder + name, manifest.files[name].size), manifest.files
            )
            files = zip(manifest.files.items(), hashes, strict=True)
            return next((f"{name} is altered" for (name, file), actual in files if actual != file.sha256), "")
    return ""


def _stored_hash(store: Store, key: str, size: int) -> str:
    """sha256 of a stored file; empty if it was removed or shortened since it was listed."""
    path = store.local_path(key)
    digest = hashlib.sha256()
    try:
        if path is not None:
            return file_hash(path)
        for start in range(0, size, HASH_BYTES):
            digest.update(store.read_range(key, start, min(HASH_BYTES, size - start)))
    except DataError:
        return ""
    return digest.hexdigest()


def new_attempt(store: Store, key: Key, scratch: Path) -> Path:
    """An empty folder for the outputs: in the store if the store is a folder, otherwise in `scratch`."""
    attempt = secrets.token_hex(6)
    folder = store.local_path(f"{key.prefix}{attempt}", to_write=True) or scratch / attempt
    with explained(folder):
        make_folders(folder)
    return folder


def commit(
    store: Store,
    key: Key,
    folder: Path,
    *,
    shard: int | None = None,
    volatile: Sequence[str] = (),
    inputs: Mapping[str, Sequence[Mapping[str, str]]] = EMPTY,
    started: float,
    seconds: float,
    metrics: Mapping[str, Any] = EMPTY,
) -> Manifest:
    """Commits an attempt as the artifact: hashes and stores its files, then its manifest, unless another was faster.

    Args:
        folder: result of `new_attempt`.
        volatile: patterns of files that are not part of the content digest.
        inputs: argument name → key and digest of each artifact that was read.

    Returns:
        The valid manifest: of this attempt, or of another writer that was faster (this attempt is then deleted).
    """
    paths = {name: folder / name for name in folder_files(folder)}
    files = {name: FileRecord(path.stat().st_size, file_hash(path)) for name, path in paths.items()}
    manifest = Manifest(
        schema=SCHEMA,
        stage=key.stage,
        key=key.digest,
        shard=shard,
        attempt=folder.name,
        files=files,
        digest=content_digest(files, volatile),
        volatile=list(volatile),
        ingredients=dict(key.ingredients),
        inputs={name: [dict(artifact) for artifact in used] for name, used in inputs.items()},
        version=__version__,
        host=platform.node(),
        started=started,
        seconds=seconds,
        metrics=dict(metrics),
    )
    own = f"{key.prefix}{folder.name}/"
    store.put_folder(folder, own)
    for _ in range(TRIES):
        if store.put_if_absent(key.prefix + MANIFEST, manifest.to_json()):
            return manifest
        state = inspect(store, key)
        if state.manifest and state.manifest.attempt == folder.name:
            return state.manifest  # written, but a network file system or a retry reported that it exists
        if state.status == "done" and state.manifest:
            log.info("%s/%s: another process finished first; its result is used", key.stage, key.digest[:8])
            remove_all(store, own)
            shutil.rmtree(folder, ignore_errors=True)
            return state.manifest
        if state.status == "damaged":
            quarantine(store, key, state)
    raise RetryableError(f"{store.url}/{key.prefix}{MANIFEST} is taken and cannot be read: run it again")


def download_folder(cache: Path, key: Key) -> Path:
    """The folder in a cache to which an artifact is downloaded."""
    return cache / "inputs" / key.stage / key.digest


def fetch(store: Store, key: Key, manifest: Manifest, into: Path) -> Path:
    """Downloads an artifact's files and checks the hash of each.

    Args:
        into: target folder for a remote store; correct files that exist already are not downloaded again.

    Returns:
        The folder with the files: that of the store if the store is a folder, otherwise `into`.

    Raises:
        RetryableError: a file is damaged; the artifact is quarantined and will be recomputed.
    """
    prefix = f"{key.prefix}{manifest.attempt}/"
    folder = store.local_path(prefix) or into

    def download(name: str) -> str:
        """Downloads a file; returns an empty text if it is correct."""
        for _ in range(2):  # what is wrong once may have suffered on its way
            if _is_right(folder / name, manifest.files[name]):
                return ""
            if store.size(prefix + name) is not None and folder == into:
                store.get(prefix + name, into / name)
        if _is_right(folder / name, manifest.files[name]):
            return ""
        return f"{name} is {'missing' if store.size(prefix + name) is None else 'altered'}"

    with ThreadPoolExecutor(PARALLEL) as pool:
        damage = next(filter(None, pool.map(download, sorted(manifest.files))), "")
    if damage:
        state = inspect(store, key)
        if state.manifest == manifest:  # otherwise another process has already repaired it
            quarantine(store, key, state)
        name = f"{key.stage}/{key.digest[:8]} in {store.url}"
        raise RetryableError(f"{name} is damaged ({damage}): it is quarantined and must be recreated")
    return folder


def _is_right(path: Path, expected: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == expected.size and file_hash(path) == expected.sha256


def quarantine(store: Store, key: Key, state: State) -> None:
    """Renames the checked manifest if it is unchanged, so that the key then counts as missing."""
    aside = f"{key.prefix}manifest.{hashlib.sha256(state.raw).hexdigest()[:8]}.damaged.json"
    store.move_aside(key.prefix + MANIFEST, aside, state.raw)
