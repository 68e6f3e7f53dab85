"""A folder as a store: whole files only, that outlive a power cut."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from common.errors import DataError
from common.files import (
    NotFound,
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
from common.storage.store import Entry, check_key, is_current

PARALLEL = 8  # files that are copied at once
TRIES = 5  # how often a folder may be removed by another process while we write into it


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
            try:
                if path.read_bytes() != data:
                    return False
                moment()
                path.rename(aside)
            except FileNotFoundError:  # there is none, or another process was faster
                return False
            moment()
            same = aside.read_bytes() == data
            if not same:  # replaced just between the two lines: give it back, unless there is a third one already
                with suppress(FileExistsError):
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
