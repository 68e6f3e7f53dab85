"""A folder as a store, with atomic and durable writes."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from common.errors import DataError, StoreError
from common.files import (
    MAX_DOCUMENT,
    NotFound,
    check_size,
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
from common.storage.store import Entry, check_key

PARALLEL = 8  # files that are copied at once
MOST_LINKS = 10_000  # to folders, that one listing follows
TRIES = 5  # how often a folder may be removed by another process while we write into it


class LocalStore:
    """A folder as a store. Files are written under a temporary name, synced to the disk, and renamed or linked."""

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        self.root = Path(root)

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes:
        path = self.local_path(key)
        with explained(path), _regular(path).open("rb") as file:
            check_size(os.fstat(file.fileno()).st_size, limit, path)
            return file.read()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        path = self.local_path(key)
        with explained(path), _regular(path).open("rb") as file:
            # Before memory is allocated, since the length may be wrong.
            whole = os.fstat(file.fileno()).st_size >= start + length
            file.seek(start)
            data = file.read(length) if whole else b""
        if len(data) < length:
            raise DataError(f"{path} ends before byte {start + length:,}: it is truncated")
        return data

    def get(self, key: str, path: Path) -> None:
        source = self.local_path(key)
        with explained(source), new_file(path) as temporary:
            shutil.copyfile(_regular(source), temporary)

    def put(self, key: str, path: Path) -> None:
        if not path.is_file():
            raise NotFound(f"{path} does not exist")
        self._place(key, lambda temporary: shutil.copyfile(path, temporary))

    def write(self, key: str, data: bytes) -> None:
        self._place(key, lambda temporary: temporary.write_bytes(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.local_path(key).exists():
            return False
        try:
            self._place(key, lambda temporary: temporary.write_bytes(data), link)
        except FileExistsError:
            return False
        return True

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        path, aside = self.local_path(key), self.local_path(to)
        for place in (path.parent, aside.parent):
            self._refuse_links(place)
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

    def list(self, prefix: str, *, follow: bool = True) -> Iterator[Entry]:
        return (entry for entry in self._entries(prefix, follow) if not is_temporary(entry.key))

    def leftovers(self) -> Iterator[Entry]:
        return (entry for entry in self._entries("", follow=False) if is_temporary(entry.key))

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        self._refuse_links(path.parent)
        with explained(path):
            moment()
            path.unlink(missing_ok=True)
            moment()
        prune(path.parent, self.root)

    def size(self, key: str) -> int | None:
        path = self.local_path(key)
        try:
            with explained(path):
                return _regular(path).stat().st_size
        except NotFound:
            return None

    def now(self) -> float:
        """See Store. The clock is read from a newly written file, since a mounted folder uses the clock of its
        server.
        """
        with suppress(OSError), tempfile.TemporaryFile(dir=self.root) as file:
            return os.fstat(file.fileno()).st_mtime
        return time.time()

    def local_path(self, key: str, *, to_write: bool = False) -> Path:
        path = self.root / check_key(key)
        if to_write:
            self._refuse_links(path)
        return path

    def put_folder(self, folder: Path, prefix: str) -> None:
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
        self._refuse_links(path.parent)
        with explained(path):
            for _ in range(TRIES - 1):
                try:
                    write_lasting(path, fill, name)
                    return
                except FileNotFoundError:  # the folder was empty for a moment, and another process removed it
                    continue
            write_lasting(path, fill, name)

    def _refuse_links(self, path: Path) -> None:
        """Refuses links in a store, which is not trusted: a link could redirect writes and deletes to another folder.

        Raises:
            StoreError: a folder below the store's own, or the path itself, is a link.
        """
        for place in _below(path, self.root):
            if place.is_symlink():
                raise StoreError(f"{place} is a link: in a store, links are read and nothing is written through them")

    def _entries(self, prefix: str, follow: bool) -> Iterator[Entry]:
        folder, _, start = prefix.rpartition("/")
        path = self.local_path(folder)
        if follow or not any(place.is_symlink() for place in _below(path, self.root)):
            yield from _walk(path, f"{folder}/" if folder else "", start, follow)


def folder_files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, sorted, without unfinished ones."""
    return [entry.key for entry in LocalStore(folder).list("")]


def _below(path: Path, root: Path) -> Iterator[Path]:
    """The path and its parents, as far as they lie below `root`."""
    while path != root and path != path.parent:
        yield path
        path = path.parent


def _regular(path: Path) -> Path:
    """The path itself; anything but a plain file counts as absent, since reading a pipe or a device may never end."""
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        plain = False  # a link to itself
    if not plain:
        raise FileNotFoundError
    return path


def _walk(folder: Path, prefix: str, start: str, follow: bool) -> Iterator[Entry]:
    """Files below a folder whose first part begins with `start`, in the order of their keys.

    Raises:
        StoreError: there are too many links to folders, which can form an endless number of paths.
    """
    links = iter(range(MOST_LINKS))

    def walk(folder: Path, prefix: str, start: str, above: tuple[Path, ...]) -> Iterator[Entry]:
        for item, is_folder in _items(folder, start, follow):
            if not is_folder:
                yield from _entry(item, prefix, follow)
                continue
            path, behind = Path(item.path), above
            if item.is_symlink():
                behind = (*above, folder.resolve())
                if any(place.is_relative_to(path.resolve()) for place in behind):  # it leads back
                    continue
                if next(links, None) is None:
                    raise StoreError(f"{folder} leads through more than {MOST_LINKS:,} links: this cannot be a store")
            yield from walk(path, f"{prefix}{item.name}/", "", behind)

    yield from walk(folder, prefix, start, ())


def _items(folder: Path, start: str, follow: bool) -> list[tuple[os.DirEntry[str], bool]]:
    """The content of a folder, in the order of keys, and whether each item is a folder."""
    try:
        with explained(folder), os.scandir(folder) as listing:
            items = [(item, _is_folder(item, follow)) for item in listing if item.name.startswith(start)]
    except NotFound:
        return []
    return sorted(items, key=lambda pair: pair[0].name + "/" * pair[1])


def _is_folder(item: os.DirEntry[str], follow: bool) -> bool:
    with suppress(OSError):  # a link to itself
        return item.is_dir(follow_symlinks=follow)
    return False


def _entry(item: os.DirEntry[str], prefix: str, follow: bool) -> Iterator[Entry]:
    """The entry of a plain file, otherwise nothing; a link is an entry if links are not followed."""
    with suppress(OSError):  # deleted while we look, or a link to nothing
        status = item.stat(follow_symlinks=follow)
        if stat.S_ISREG(status.st_mode) or not follow:
            yield Entry(prefix + item.name, status.st_size, status.st_mtime)
