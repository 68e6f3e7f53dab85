"""Interface of stores of bytes under keys, with two implementations: a folder, or a bucket of an S3-compatible server.

A key is a relative path with `/` between its parts. Writes are atomic: a reader finds all bytes of one write, or
nothing. Written data survives a power cut after the call has returned.
"""

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
    """Operations that the pipeline requires of a store.

    Every method raises StoreError if a retry cannot help (rights, a full disk, a missing bucket) and RetryableError if
    it may (a server that does not answer).
    """

    url: str

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes:
        """The whole content. Raises NotFound, and DataError if it has more than `limit` bytes."""

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`. Raises NotFound, and DataError if the file is too short."""

    def get(self, key: str, path: Path) -> None:
        """Copies to a local file, atomically. Raises NotFound."""

    def put(self, key: str, path: Path) -> None:
        """Stores a local file."""

    def write(self, key: str, data: bytes) -> None:
        """Stores bytes and replaces existing content."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Stores bytes if the key does not exist; returns False if it exists. Of many racing calls exactly one returns
        True.
        """

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        """Renames `key` to `to` if it still contains `data`; returns False if it does not."""

    def list(self, prefix: str, *, follow: bool = True) -> Iterator[Entry]:
        """All files whose keys start with `prefix`, sorted by key.

        Args:
            follow: list the content of folders that are links. Otherwise a link is an entry itself, and a prefix behind
                a link has no entries; this form is used before deleting.
        """

    def leftovers(self) -> Iterator[Entry]:
        """Keys of unfinished writes that killed writers left behind and listings do not show; `delete` accepts these
        keys.
        """

    def delete(self, key: str) -> None:
        """Removes a file, or a link itself; a missing file is not an error."""

    def size(self, key: str) -> int | None:
        """Size in bytes; None if there is no such file."""

    def now(self) -> float:
        """Current time in seconds since 1970, by the clock of `Entry.modified`."""

    def local_path(self, key: str, *, to_write: bool = False) -> Path | None:
        """Local path of the file; None for a remote store.

        Args:
            to_write: raise StoreError if the path contains a link below the store's folder.
        """

    def put_folder(self, folder: Path, prefix: str) -> None:
        """Stores all files of a folder; a folder that is already in the store is only synced."""


def remove_all(store: Store, prefix: str) -> None:
    """Deletes all files below a prefix, without following links.

    If a store refuses, one warning per process is logged: remaining files use space but do not affect results.
    """
    try:
        for entry in list(store.list(prefix, follow=False)):
            store.delete(entry.key)
    except MoeAsrError as error:
        warn_once(store, error)


def warn_once(store: Store, error: MoeAsrError) -> None:
    """Logs once that a store cannot be cleaned up."""
    if store.url not in _warned:
        _warned.add(store.url)
        log.warning("files that are no longer needed stay in the store, and the command continues: %s", error)


_warned: set[str] = set()


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        DataError: the key would lead out of the store.
    """
    if key.startswith("/") or "\0" in key or "\\" in key or any(part in ("..", ".") for part in key.split("/")):
        raise DataError(f"{key!r} cannot be a key of a store: it must be a plain relative path")
    return key
