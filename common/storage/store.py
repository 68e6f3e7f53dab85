"""Stores of bytes under keys, two kinds behind one interface: a folder, or a bucket of an S3-compatible server.

A key is a relative path with `/` between its parts. Nothing is ever seen half written: a reader finds the whole bytes
of some write, or nothing. What is written survives a power cut once the call has returned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import DataError, MoeAsrError
from common.files import MAX_DOCUMENT

log = logging.getLogger(__name__)


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

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes:
        """The whole content. Raises NotFound, and DataError where it has more than `limit` bytes."""

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

    def list(self, prefix: str, *, follow: bool = True) -> Iterator[Entry]:
        """All files whose keys start with `prefix`, sorted by key.

        Args:
            follow: look into folders that are links. Without it a link is an entry itself, and a prefix behind a link
                has none: what is going to be deleted is listed so.
        """

    def leftovers(self) -> Iterator[Entry]:
        """What killed writers left behind and no listing shows: `delete` takes these keys."""

    def delete(self, key: str) -> None:
        """Removes a file, or a link itself; one that is not there is fine."""

    def size(self, key: str) -> int | None:
        """Bytes, None where there is no such file."""

    def now(self) -> float:
        """Seconds since 1970 by the clock that `Entry.modified` is of."""

    def local_path(self, key: str, *, to_write: bool = False) -> Path | None:
        """Where the file lies on this machine, None for a remote store.

        Args:
            to_write: raise StoreError where a link below the store's own folder leads there.
        """

    def get_folder(self, prefix: str, into: Path, *, exact: bool = False) -> None:
        """Copies all files below a prefix, except those that `into` has already with equal size and time.

        Args:
            exact: also delete what `into` has and the store has not.
        """

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Stores all files of a folder; a folder that lies in the store already is only made to last."""


def remove_all(store: Store, prefix: str) -> None:
    """Deletes all files below a prefix that no link leads to.

    A store that refuses is told in one warning per process: what stays there costs space, not the work that is done.
    """
    try:
        for entry in list(store.list(prefix, follow=False)):
            store.delete(entry.key)
    except MoeAsrError as error:
        warn_once(store, error)


def warn_once(store: Store, error: MoeAsrError) -> None:
    """Logs that a store cannot be cleaned up, the first time that it happens."""
    if store.url not in _warned:
        _warned.add(store.url)
        log.warning("what is no longer needed stays in the store, and the work goes on: %s", error)


_warned: set[str] = set()


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        DataError: it would lead out of its store.
    """
    if key.startswith("/") or "\0" in key or "\\" in key or any(part in ("..", ".") for part in key.split("/")):
        raise DataError(f"{key!r} cannot be a key of a store: it must be a plain relative path")
    return key


def is_current(entry: Entry, path: Path) -> bool:
    """Whether a local file has the size and time of a store's."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == entry.size and abs(found.st_mtime - entry.modified) < 1e-3
