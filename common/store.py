"""Stores of bytes under keys, two kinds behind one interface: a folder, or a bucket of an S3-compatible server.

A key is a relative path with `/` between its parts. Nothing is ever seen half written: a reader finds the whole bytes
of some write, or nothing. What is written survives a power cut once the call has returned.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from common.errors import ConfigError, DataError
from common.files import NotFound as NotFound
from common.files import (
    explained,
    is_temporary,
    let_others_read,
    link,
    moment,
    new_file,
    prune,
    sync,
    sync_tree,
    write_lasting,
)

PARALLEL = 8  # files that are copied at once
TRIES = 5  # how often a folder may be removed by another process while we write into it


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a store; `size` in bytes, `modified` in seconds since 1970 by the store's clock."""

    key: str
    size: int
    modified: float = 0.0


class Store(Protocol):
    """What the pipeline asks of a place for its files.

    Every method raises StoreError where trying again is of no use (rights, a full disk, a missing bucket) and
    RetryableError where it may be (a server that does not answer).
    """

    url: str

    def read(self, key: str) -> bytes:
        """The whole content. Raises NotFound."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start` on. Raises NotFound, and DataError where the file ends before."""

    def get(self, key: str, path: Path) -> None:
        """Copies to a local file, which is there wholly or not at all. Raises NotFound."""

    def put(self, key: str, path: Path) -> None:
        """Stores a local file."""

    def write(self, key: str, data: bytes) -> None:
        """Stores bytes, over what may be there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Stores bytes unless something is there; False: somebody else's is. Of many racing calls one gets True."""

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        """Renames `key` to `to` if it still holds `data`; False: it does not."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """All files whose keys start with `prefix`, sorted by key."""

    def leftovers(self) -> Iterator[Entry]:
        """What killed writers left behind and no listing shows: `delete` takes these keys."""

    def delete(self, key: str) -> None:
        """Removes a file; one that is not there is fine."""

    def size(self, key: str) -> int | None:
        """Bytes, None where there is no such file."""

    def local_path(self, key: str) -> Path | None:
        """Where the file lies on this machine, None for a remote store."""

    def get_folder(self, prefix: str, into: Path, *, exact: bool = False) -> None:
        """Copies all files below a prefix, except those that `into` has already with equal size and time.

        Args:
            exact: also delete what `into` has and the store has not.
        """

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Stores all files of a folder; a folder that lies in the store already is only made to last."""


def open_store(url: str | Path, *, endpoint_url: str | None = None) -> Store:
    """The store at a folder's path or an `s3://bucket/prefix`.

    Args:
        endpoint_url: of an S3-compatible server; AWS and the AWS variables and profiles where it is not given.

    Raises:
        ConfigError: another scheme, no bucket, or credentials in an address.
    """
    text = str(url)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        if not text:
            raise ConfigError("store is empty: give a folder or s3://bucket/prefix")
        return LocalStore(url)
    bucket, _, prefix = text[scheme.end() :].partition("/")
    if scheme[1].lower() != "s3":
        raise ConfigError(f"store {scheme[1]}://…: only folders and s3://bucket/prefix are known (with endpoint_url)")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise ConfigError("store s3://…: what follows s3:// must be a bucket's name, without credentials or port")
    if endpoint_url and "@" in urlsplit(endpoint_url).netloc:  # it would be in the record of every run
        raise ConfigError("endpoint_url holds credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    from common.s3 import S3Store

    return S3Store(bucket, prefix, endpoint_url=endpoint_url)


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        DataError: it would lead out of its store.
    """
    if key.startswith("/") or "\0" in key or "\\" in key or any(part in ("..", ".") for part in key.split("/")):
        raise DataError(f"{key!r} cannot be a key of a store: it must be a plain relative path")
    return key


class LocalStore:
    """A folder as a store. Writes go to a temporary name, reach the disk, and get their name by link or rename."""

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        self.root = Path(root)

    def read(self, key: str) -> bytes:
        """See Store."""
        path = self.local_path(key)
        with explained(path):
            return path.read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        path = self.local_path(key)
        with explained(path), path.open("rb") as file:
            # Before asking for memory: a length may lie.
            whole = os.fstat(file.fileno()).st_size >= start + length
            file.seek(start)
            data = file.read(length) if whole else b""
        if len(data) < length:
            raise DataError(f"{path} ends before byte {start + length:,}: it is truncated")
        return data

    def get(self, key: str, path: Path) -> None:
        """See Store."""
        source = self.local_path(key)
        with explained(source), new_file(path) as temporary:
            shutil.copyfile(source, temporary)

    def put(self, key: str, path: Path) -> None:
        """See Store."""
        if not path.is_file():
            raise NotFound(f"{path} is not there")
        self._place(key, lambda temporary: shutil.copyfile(path, temporary))

    def write(self, key: str, data: bytes) -> None:
        """See Store."""
        self._place(key, lambda temporary: temporary.write_bytes(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store."""
        if self.local_path(key).exists():
            return False
        try:
            self._place(key, lambda temporary: temporary.write_bytes(data), link)
        except FileExistsError:
            return False
        return True

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        """See Store."""
        path, aside = self.local_path(key), self.local_path(to)
        with explained(path):
            if not path.is_file() or path.read_bytes() != data:
                return False
            moment()
            path.rename(aside)
            moment()
            same = aside.read_bytes() == data
            if not same:  # replaced just between the two lines: give it back, unless there is a third one already
                os.link(aside, path)
                aside.unlink()
            sync(path.parent)
        return same

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Store."""
        return (entry for entry in self._entries(prefix) if not is_temporary(entry.key))

    def leftovers(self) -> Iterator[Entry]:
        """See Store."""
        return (entry for entry in self._entries("") if is_temporary(entry.key))

    def delete(self, key: str) -> None:
        """See Store."""
        path = self.local_path(key)
        with explained(path):
            moment()
            path.unlink(missing_ok=True)
            moment()
        prune(path.parent, self.root)

    def size(self, key: str) -> int | None:
        """See Store."""
        path = self.local_path(key)
        try:
            with explained(path):
                return path.stat().st_size if not path.is_dir() else None
        except NotFound:
            return None

    def local_path(self, key: str) -> Path:
        """See Store."""
        return self.root / check_key(key)

    def get_folder(self, prefix: str, into: Path, *, exact: bool = False) -> None:
        """See Store."""
        entries = list(self.list(prefix))
        stale = [entry for entry in entries if not is_current(entry, into / entry.key[len(prefix) :])]

        def one(entry: Entry) -> None:
            path = into / entry.key[len(prefix) :]
            self.get(entry.key, path)
            os.utime(path, (entry.modified, entry.modified))

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(one, stale))
        if exact:
            remove_others(into, {entry.key[len(prefix) :] for entry in entries})

    def put_folder(self, folder: Path, prefix: str) -> None:
        """See Store."""
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        if self.local_path(prefix).resolve() == folder.resolve():
            with explained(folder):
                let_others_read(folder)
                sync_tree(folder)
                moment()
            return
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda name: self.put(prefix + name, folder / name), folder_files(folder)))

    def _place(self, key: str, fill: Callable[[Path], object], name: Callable[[Path, Path], None] = os.replace) -> None:
        path = self.local_path(key)
        with explained(path):
            for _ in range(TRIES - 1):
                try:
                    write_lasting(path, fill, name)
                    return
                except FileNotFoundError:  # the folder was empty for a moment, and somebody removed it
                    continue
            write_lasting(path, fill, name)

    def _entries(self, prefix: str) -> Iterator[Entry]:
        folder, _, start = prefix.rpartition("/")
        yield from _walk(self.local_path(folder), f"{folder}/" if folder else "", start)


def folder_files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted, without unfinished ones."""
    return [entry.key for entry in LocalStore(folder).list("")]


def is_current(entry: Entry, path: Path) -> bool:
    """Whether a local file has the size and time of a store's."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == entry.size and abs(found.st_mtime - entry.modified) < 1e-3


def remove_others(folder: Path, names: set[str]) -> None:
    """Deletes the files of a folder that are not among `names`."""
    for name in folder_files(folder):
        if name not in names:
            (folder / name).unlink(missing_ok=True)


def _walk(folder: Path, prefix: str, start: str) -> Iterator[Entry]:
    """Files below a folder whose first part begins with `start`, in the order of their keys."""
    try:
        with explained(folder), os.scandir(folder) as found:
            items = [(item, item.is_dir()) for item in found if item.name.startswith(start)]
    except NotFound:
        return
    for item, is_folder in sorted(items, key=lambda pair: pair[0].name + "/" * pair[1]):
        if is_folder:
            path = Path(item.path)
            if not (item.is_symlink() and folder.resolve().is_relative_to(path.resolve())):  # a link to a folder above
                yield from _walk(path, f"{prefix}{item.name}/", "")
            continue
        try:
            stat = item.stat()
        except FileNotFoundError:  # deleted while we look, or a dangling link
            continue
        yield Entry(prefix + item.name, stat.st_size, stat.st_mtime)
