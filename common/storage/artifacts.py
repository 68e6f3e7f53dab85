"""Artifacts of stages: named by what goes in, committed by a manifest written last, checked before they are used.

    artifacts/<stage>/<key>/manifest.json          create-only; without it the stage is not done
    artifacts/<stage>/<key>/<attempt>/<files…>     what one attempt wrote; the manifest names the attempt that won

Writers of one key work in attempts of their own, so neither a race nor a killed process can mix two outputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from common.errors import DataError, RetryableError
from common.files import NotFound, explained, file_hash, make_folders
from common.storage.local import folder_files
from common.storage.store import Store, check_key, remove_all

log = logging.getLogger(__name__)
SCHEMA = 1
MANIFEST = "manifest.json"
ROOT = "artifacts/"
HASH_BYTES = 16 * 2**20  # read at once from a remote store
PARALLEL = 8
TRIES = 5  # of a commit that meets damaged manifests
STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
KEY_DIGEST = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"[0-9a-z]{4,64}")
ONE_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{0,1000}")


class Malformed(DataError):  # noqa: N818 - a state more than an error
    """A manifest that is not one."""


@dataclass(frozen=True, slots=True)
class Key:
    """Name of an artifact: known before anything runs.

    Attributes:
        digest: 32 hex digits.
        ingredients: what the digest was made of, in plain JSON values.
    """

    stage: str
    digest: str
    ingredients: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def prefix(self) -> str:
        """Where the artifact lies in its store."""
        return f"{ROOT}{self.stage}/{self.digest}/"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished artifact consists of and how it came about.

    Attributes:
        attempt: the folder below the key that holds the files.
        files: by path relative to that folder.
        digest: sha256 over names and hashes of all files that are not volatile: equal content, equal digest.
        volatile: patterns of files whose bytes may differ between equal runs.
        inputs: argument name → key and digest of each artifact that was read.
        started: when its first attempt began, in seconds since 1970.
        seconds: wall time of all attempts at it, without what lay between them.
    """

    schema: int
    stage: str
    key: str
    shard: int | None
    attempt: str
    files: dict[str, FileRecord]
    digest: str
    volatile: list[str]
    ingredients: dict[str, Any]
    inputs: dict[str, list[dict[str, str]]]
    version: str
    host: str
    started: float
    seconds: float
    metrics: dict[str, Any]

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Reads and checks a manifest.

        Args:
            where: named in errors.

        Raises:
            Malformed: it is damaged.
            DataError: a newer version wrote it.
        """
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError):
            raise Malformed(f"{where} is not JSON") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            written = f"has format {schema}, written by moe-asr {raw.get('version')}; this one knows up to {SCHEMA}"
            raise DataError(f"{where} {written}: upgrade moe-asr, or use another store")
        return _validated(data, where)


def _validated(data: bytes, where: str) -> Manifest:
    from pydantic import ValidationError

    try:
        manifest: Manifest = _manifest_type().validate_json(data, strict=True)
        _check_names(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise Malformed(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except DataError as error:
        raise Malformed(f"{where}: {error}") from None
    return manifest


def _check_names(manifest: Manifest) -> None:
    """A manifest may come from anywhere: none may point out of its own folder, or write more than a line into a log.

    Raises:
        DataError: a name, digest or version that no stage of ours writes.
    """
    digests = (manifest.digest, *(file.sha256 for file in manifest.files.values()))
    used = [row for rows in manifest.inputs.values() for row in rows]
    checks: list[tuple[re.Pattern[str], Iterable[str]]] = [
        (STAGE_NAME, (manifest.stage, *manifest.inputs)),
        (KEY_DIGEST, (manifest.key, *(row.get("key", "") for row in used))),
        (SHA256, (*digests, *(row.get("digest", "") for row in used))),
        (ATTEMPT, (manifest.attempt,)),
        (ONE_LINE, (manifest.version, manifest.host, *manifest.files)),
    ]
    for pattern, names in checks:
        for name in names:
            if not pattern.fullmatch(name):
                raise DataError(f"{name[:80]!r} is no name that a manifest may hold")
    for name in manifest.files:
        check_key(name)
    if not all(map(math.isfinite, (manifest.started, manifest.seconds))):
        raise DataError("a time that is no number")


@lru_cache(maxsize=1)
def _manifest_type() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a key.

    Attributes:
        reason: of `missing` and `damaged`.
        raw: the manifest's bytes as they were judged.
    """

    status: Literal["done", "missing", "damaged"]
    reason: str = ""
    manifest: Manifest | None = None
    raw: bytes = field(default=b"", repr=False)


def make_key(stage: str, format_version: int, values: Mapping[str, Any], inputs: Mapping[str, str]) -> Key:
    """The key of a stage.

    Args:
        format_version: of the stage's output.
        values: every configuration value that the stage reads, by its dotted path.
        inputs: name → key or digest of each input.
    """
    ingredients = {"stage": stage, "format": format_version, "values": dict(values), "inputs": dict(inputs)}
    text = _canonical(ingredients)
    return Key(stage, hashlib.sha256(text).hexdigest()[:32], json.loads(text))


def shard_key(group: Key, index: int) -> Key:
    """The key of one piece of a stage that fans out."""
    digest = hashlib.sha256(_canonical({"group": group.digest, "index": index})).hexdigest()[:32]
    return Key(group.stage, digest, {**group.ingredients, "shard": index})


def _canonical(value: Mapping[str, Any]) -> bytes:
    """One text for equal values, whatever the order of names."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def inspect(store: Store, key: Key, *, deep: bool = False) -> State:
    """Whether an artifact is there and whole; `damaged` only where a second look has found damage too.

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
    """The first file that is not as the manifest says; empty when all are."""
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
            return next((f"{name} is altered" for (name, file), found in files if found != file.sha256), "")
    return ""


def _stored_hash(store: Store, key: str, size: int) -> str:
    """sha256 of a stored file; empty where it is gone, or shorter, since it was listed."""
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
    """An empty folder for the outputs: in the store itself where that is a folder, else under `scratch`."""
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
    shard: int | None,
    volatile: Sequence[str],
    inputs: Mapping[str, Sequence[Mapping[str, str]]],
    version: str,
    host: str,
    started: float,
    seconds: float,
    metrics: Mapping[str, Any],
) -> Manifest:
    """Makes an attempt the artifact: hashes and stores its files, then its manifest, unless another one was faster.

    Args:
        folder: from `new_attempt`.
        volatile: patterns of files that are no part of the content digest.
        inputs: argument name → key and digest of each artifact that was read.

    Returns:
        The manifest that counts: this one, or that of the writer who won (then this attempt is deleted).
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
        inputs={name: [dict(one) for one in used] for name, used in inputs.items()},
        version=version,
        host=host,
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
            return state.manifest  # written, but a network file system or a repeated request said that it was taken
        if state.status == "done" and state.manifest:
            log.info("%s/%s: another process was faster; its result is used", key.stage, key.digest[:8])
            remove_all(store, own)
            shutil.rmtree(folder, ignore_errors=True)
            return state.manifest
        if state.status == "damaged":
            quarantine(store, key, state)
    raise RetryableError(f"{store.url}/{key.prefix}{MANIFEST} is taken and cannot be read: run it again")


def content_digest(files: Mapping[str, FileRecord], volatile: Sequence[str]) -> str:
    """sha256 over sorted names and hashes of the files that match none of the patterns."""
    kept = [[name, file.sha256] for name, file in sorted(files.items()) if not any(fnmatch(name, p) for p in volatile)]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode()).hexdigest()


def fetch(store: Store, key: Key, manifest: Manifest, into: Path) -> Path:
    """Brings an artifact's files here, each with its hash checked.

    Args:
        into: for a remote store; files that are there and right are not brought again.

    Returns:
        The folder with the files: the store's own where that is a folder, else `into`.

    Raises:
        RetryableError: a file is damaged; the artifact is quarantined and will be made again.
    """
    prefix = f"{key.prefix}{manifest.attempt}/"
    folder = store.local_path(prefix) or into

    def bring(name: str) -> str:
        """Empty when the file is right."""
        for _ in range(2):  # what is wrong once may have suffered on its way
            if _is_right(folder / name, manifest.files[name]):
                return ""
            if store.size(prefix + name) is not None and folder == into:
                store.get(prefix + name, into / name)
        if _is_right(folder / name, manifest.files[name]):
            return ""
        return f"{name} is {'missing' if store.size(prefix + name) is None else 'altered'}"

    with ThreadPoolExecutor(PARALLEL) as pool:
        damage = next((told for told in pool.map(bring, sorted(manifest.files)) if told), "")
    if damage:
        state = inspect(store, key)
        if state.manifest == manifest:  # else somebody has already put it right
            quarantine(store, key, state)
        name = f"{key.stage}/{key.digest[:8]} in {store.url}"
        raise RetryableError(f"{name} is damaged ({damage}): it is quarantined and has to be made again")
    return folder


def _is_right(path: Path, expected: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == expected.size and file_hash(path) == expected.sha256


def quarantine(store: Store, key: Key, state: State) -> None:
    """Renames the manifest that was judged, if it is still the same one: the key counts as missing from then on."""
    aside = f"{key.prefix}manifest.{hashlib.sha256(state.raw).hexdigest()[:8]}.damaged.json"
    store.move_aside(key.prefix + MANIFEST, aside, state.raw)


def verify(store: Store) -> Iterator[tuple[str, State]]:
    """Re-hashes every artifact of a store; yields `stage/key` and what was found."""
    for entry in store.list(ROOT):
        parts = entry.key.split("/")
        if len(parts) == 4 and parts[3] == MANIFEST:
            try:
                state = inspect(store, Key(parts[1], parts[2]), deep=True)
            except DataError as error:  # one manifest that cannot be judged hides no other
                state = State("damaged", str(error))
            yield f"{parts[1]}/{parts[2]}", state
