"""A store that counts its calls, seconds, bytes and errors by operation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import telemetry
from common.files import MAX_DOCUMENT, NotFound
from common.storage.local import folder_files
from common.storage.store import Entry, Store
from common.telemetry import StageTelemetry

OPERATIONS = (
    *("read", "read_range", "get", "put", "write", "put_if_absent", "move_aside"),
    *("list", "leftovers", "delete", "size", "get_folder", "put_folder"),
)


class MeasuredStore:
    """Forwards every call to `inner` (see Store); NotFound is not counted as an error."""

    def __init__(self, inner: Store, live: StageTelemetry) -> None:
        self.inner, self.live = inner, live
        self.url = inner.url
        for operation in OPERATIONS:
            live.add(telemetry.STORE_ERRORS, 0, operation=operation)  # a rate needs to have seen the zero

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes:
        """See Store."""
        with self._timed("read"):
            return self._counted("read", self.inner.read(key, limit))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        with self._timed("read_range"):
            return self._counted("read_range", self.inner.read_range(key, start, length))

    def get(self, key: str, path: Path) -> None:
        """See Store."""
        with self._timed("get"):
            self.inner.get(key, path)
        self._bytes("get", path.stat().st_size)

    def put(self, key: str, path: Path) -> None:
        """See Store."""
        with self._timed("put"):
            self.inner.put(key, path)
        self._bytes("put", path.stat().st_size)

    def write(self, key: str, data: bytes) -> None:
        """See Store."""
        with self._timed("write"):
            self.inner.write(key, data)
        self._bytes("write", len(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store."""
        with self._timed("put_if_absent"):
            written = self.inner.put_if_absent(key, data)
        self._bytes("put_if_absent", len(data) if written else 0)
        return written

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        """See Store."""
        with self._timed("move_aside"):
            return self.inner.move_aside(key, to, data)

    def list(self, prefix: str, *, follow: bool = True) -> Iterator[Entry]:
        """See Store."""
        with self._timed("list"):
            return iter([*self.inner.list(prefix, follow=follow)])

    def leftovers(self) -> Iterator[Entry]:
        """See Store."""
        with self._timed("leftovers"):
            return iter([*self.inner.leftovers()])

    def delete(self, key: str) -> None:
        """See Store."""
        with self._timed("delete"):
            self.inner.delete(key)

    def size(self, key: str) -> int | None:
        """See Store."""
        with self._timed("size"):
            return self.inner.size(key)

    def now(self) -> float:
        """See Store."""
        return self.inner.now()

    def local_path(self, key: str, *, to_write: bool = False) -> Path | None:
        """See Store."""
        return self.inner.local_path(key, to_write=to_write)

    def get_folder(self, prefix: str, into: Path, *, exact: bool = False) -> None:
        """See Store."""
        before = _files(into)
        with self._timed("get_folder"):
            self.inner.get_folder(prefix, into, exact=exact)
        changed = _files(into).items() - before.items()
        self._bytes("get_folder", sum(size for _, (size, _) in changed))

    def put_folder(self, folder: Path, prefix: str) -> None:
        """See Store."""
        with self._timed("put_folder"):
            self.inner.put_folder(folder, prefix)
        self._bytes("put_folder", sum(size for size, _ in _files(folder).values()))

    @contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except NotFound:
            raise
        except Exception:
            self.live.add(telemetry.STORE_ERRORS, operation=operation)
            raise
        finally:
            self.live.add(telemetry.STORE_SECONDS, time.monotonic() - started, operation=operation)
            self.live.add(telemetry.STORE_REQUESTS, operation=operation)

    def _counted(self, operation: str, data: bytes) -> bytes:
        self._bytes(operation, len(data))
        return data

    def _bytes(self, operation: str, count: int) -> None:
        self.live.add(telemetry.STORE_BYTES, count, operation=operation)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Relative path → (bytes, time of change)."""
    files = {}
    for name in folder_files(folder):
        status = (folder / name).stat()
        files[name] = (status.st_size, status.st_mtime_ns)
    return files
