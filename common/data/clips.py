"""Audio that is not a separate local file: ranges of tar shards, objects of a store, and their cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import MAX_FILE, TEMPORARY, new_file
from common.storage import open_store
from common.storage.store import Store, check_key

log = logging.getLogger(__name__)
PLACE_FIELDS = ("shard", "byte_offset", "byte_size", "sha256")
HASH_BYTES = 32
SPARE = 10  # when the cache is full, a tenth of it is freed at once
STALE_SECONDS = 3600  # a temporary file of this age has lost its writer


@dataclass(frozen=True, slots=True)
class Place:
    """Location of an audio file's bytes in a packed corpus.

    Attributes:
        shard: the tar's path, relative to the corpus.
        byte_offset, byte_size: position and number of the bytes in the shard.
        sha256: of the bytes, in hex.
    """

    shard: str
    byte_offset: int
    byte_size: int
    sha256: str

    @staticmethod
    def from_record(record: dict[str, Any], where: str) -> Place | None:
        """The location given by a line of an index; None if the line names no shard.

        Raises:
            DataError: the location is invalid; the message begins with `where`.
        """
        if record.get("shard") is None:
            return None
        shard, offset, size, sha256 = (record.get(name) for name in PLACE_FIELDS)
        if type(shard) is not str or not shard:
            raise DataError(f"{where}: field 'shard' must name a tar file: pack the corpus again")
        try:
            check_key(shard)
        except DataError:
            raise DataError(f"{where}: field 'shard' leads out of the corpus: {shard!r}: pack it again") from None
        if type(offset) is not int or type(size) is not int or offset < 0 or not 0 < size <= MAX_FILE:
            raise DataError(
                f"{where}: byte_offset {offset!r} and byte_size {size!r} are not a valid range: pack it again"
            )
        if type(sha256) is not str or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise DataError(f"{where}: field 'sha256' must be 64 hex digits, not {sha256!r}: pack the corpus again")
        return Place(sys.intern(shard), offset, size, sha256)


@dataclass(frozen=True, slots=True)
class AudioCache:
    """Cache of remote corpora's audio on this machine's disk, shared by all processes; the least recently used files
    are removed first.

    Every file ends with its own hash, so that a file damaged by a power cut counts as absent. If a file cannot be
    cached (a full disk, missing rights), the run is slower but does not fail.

    Attributes:
        folder: holds `<2 hex>/<64 hex>`, and `used`, the sum of their sizes, which is locked while it changes.
        limit: maximum number of bytes of all files together; 0 disables the cache.
    """

    folder: Path
    limit: int

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """The content cached under a name of 64 hex digits; otherwise the result of `fetch`, which is then cached."""
        path = self.folder / name[:2] / name
        data = self._load(path)
        if data is None:
            data = fetch()
            self._keep(path, data)
        return data

    def _load(self, path: Path) -> bytes | None:
        try:
            kept = path.read_bytes()
            os.utime(path)
        except OSError:  # absent, or just being removed
            return None
        data, digest = kept[:-HASH_BYTES], kept[-HASH_BYTES:]
        if hashlib.sha256(data).digest() == digest:
            return data
        with suppress(OSError):
            path.unlink()
        return None

    def _keep(self, path: Path, data: bytes) -> None:
        size = len(data) + HASH_BYTES
        if size > self.limit:
            return
        try:
            with new_file(path, self._replace_within_limit) as temporary:
                temporary.write_bytes(data + hashlib.sha256(data).digest())
        except OSError as error:
            log.warning("audio is not kept in %s: %s", self.folder, error.strerror or error)

    def _replace_within_limit(self, temporary: Path, path: Path) -> None:
        size = temporary.stat().st_size
        with _locked(self.folder / "used") as counter:
            text = os.pread(counter, 32, 0)
            used = int(text) if text.isdigit() else self.limit  # after a crash: count anew
            if used + size > self.limit:
                used = self._shrink(self.limit - max(size, self.limit // SPARE))
            os.ftruncate(counter, 0)  # killed in the middle of this: count anew
            temporary.replace(path)
            os.pwrite(counter, str(used + size).encode(), 0)

    def _shrink(self, target: int) -> int:
        """Removes the least recently used files until at most `target` bytes are left; returns the number of bytes
        left.
        """
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= target:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file; files left by killed writers are removed."""
        for folder in self.folder.iterdir():
            for entry in os.scandir(folder) if folder.is_dir() else ():
                stat = entry.stat()
                if not entry.name.startswith(TEMPORARY):
                    yield stat.st_mtime, stat.st_size, Path(entry.path)
                elif time.time() - stat.st_mtime > STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A locked file, which only one process at a time can hold open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Remote:
    """The store that contains a corpus.

    Attributes:
        version: the corpus's digest, which names cached files without a known hash. The cache, like every key,
            therefore treats a corpus as unchanged as long as its index is unchanged.
    """

    url: str
    endpoint_url: str | None
    cache: AudioCache
    version: str


@dataclass(frozen=True, slots=True)
class Clip:
    """The bytes of one audio file. Small and picklable: loader processes hold many.

    Attributes:
        root: the corpus's folder where it is local.
        name: the audio file's path in the corpus.
        place: location in a shard; None for a separate file.
    """

    root: Path
    name: str
    place: Place | None
    remote: Remote | None

    @property
    def label(self) -> str:
        """Name in error messages."""
        base = self.remote.url if self.remote else str(self.root)
        return f"{base}/{self.name}" + (f" (in {self.place.shard})" if self.place else "")

    def read(self) -> bytes:
        """The whole file.

        Raises:
            DataError: the file is missing, or its bytes do not match the index.
            StoreError, RetryableError: the store cannot provide it.
        """
        if self.remote is None:
            return self._bring()
        return self.remote.cache.get(self.cache_name, self._bring)

    @property
    def cache_name(self) -> str:
        """Name in the cache: packed audio is named by its content."""
        assert self.remote is not None
        if self.place:
            return self.place.sha256
        return hashlib.sha256(f"{self.remote.url}\0{self.remote.version}\0{self.name}".encode()).hexdigest()

    def _bring(self) -> bytes:
        store = _store(self.remote.url, self.remote.endpoint_url) if self.remote else _store(str(self.root), None)
        if self.place is None:
            return store.read(self.name, MAX_FILE)
        for _ in range(2):  # what is wrong once may have suffered on its way
            data = store.read_range(self.place.shard, self.place.byte_offset, self.place.byte_size)
            if hashlib.sha256(data).hexdigest() == self.place.sha256:
                return data
        raise DataError(
            f"{self.label}: its bytes are not those that the index names: the shard is damaged, or it is of another "
            "packing; pack the corpus again"
        )


@lru_cache(maxsize=8)
def _store(url: str, endpoint_url: str | None) -> Store:
    return open_store(url, endpoint_url=endpoint_url)
