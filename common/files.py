"""Atomic and durable writing of files and folders, and errors of the file system as one line."""

import errno
import hashlib
import itertools
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError, RetryableError, StoreError, UsageError

TEMPORARY = ".tmp-"  # how names of unfinished files start; no listing shows them
MAX_DOCUMENT = 64 * 2**20  # bytes of a JSON document: a record, a manifest, a tokenizer; large ones have a few MiB
MAX_FILE = 2**30  # bytes of any other file that is held in memory whole: nine hours of speech

UMASK = os.umask(0o022)  # can only be read by setting it
os.umask(UMASK)

_moments = itertools.count(1)


class NotFound(DataError):  # noqa: N818 - reads better where it is caught
    """Nothing is stored under this name."""


def moment() -> None:
    """Marks a point between two durable changes, at which a killed process leaves a distinct state.

    For tests: with MOE_ASR_DIE_AT_STORE_OP=n in the environment, the process kills itself at the n-th such point.
    """
    deadly = os.environ.get("MOE_ASR_DIE_AT_STORE_OP")
    if deadly and next(_moments) == int(deadly):
        os.kill(os.getpid(), signal.SIGKILL)


def check_size(size: int, limit: int, name: object) -> None:
    """Refuses a file that is too large to be read into memory.

    Args:
        size, limit: bytes.
        name: name of the file, for the message.

    Raises:
        DataError: it is larger than the limit.
    """
    if size > limit:
        raise DataError(f"{name} has {size:,} bytes, but at most {limit:,} are read: check that it is the right file")


def read_document(path: Path) -> bytes:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        DataError: it is larger than `MAX_DOCUMENT`.
    """
    with path.open("rb") as file:
        check_size(os.fstat(file.fileno()).st_size, MAX_DOCUMENT, path)
        return file.read(MAX_DOCUMENT)


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(name: str) -> bool:
    """Whether a path is the temporary name of an unfinished file."""
    return name.rpartition("/")[2].startswith(TEMPORARY)


def write_lasting(path: Path, fill: Callable[[Path], object], name: Callable[[Path, Path], None] = os.replace) -> None:
    """Writes a temporary file in the folder of `path`, syncs it, renames it to `path`, and syncs the folder."""
    make_folders(path.parent)
    with new_file(path, name) as temporary:
        fill(temporary)
        sync(temporary)
        moment()
    moment()
    sync(path.parent)
    moment()


@contextmanager
def new_file(path: Path, name: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """A temporary path in the same folder, which is renamed to the real name when the block succeeds."""
    make_folders(path.parent, lasting=False)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        yield temporary
        name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, mark: str = "") -> Iterator[Path]:
    """An empty folder next to `path`, which is renamed to `path` when the block succeeds and deleted otherwise.

    Args:
        overwrite: replace an existing folder if it contains a file named `mark`, which shows that this program made it.
        mark: empty where nothing is ever replaced.

    Raises:
        UsageError: `path` exists and may not be replaced.
    """
    path = path.absolute()  # `.` has no name from which a neighbouring folder's name could be made
    taken = is_taken(path, overwrite=overwrite, mark=mark)
    with explained(path):
        make_folders(path.parent, lasting=False)
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        temporary.mkdir()
    try:
        yield temporary
        let_others_read(temporary)
        if taken:
            old = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_taken(path: Path, *, overwrite: bool, mark: str) -> bool:
    """Whether `new_folder` would replace a folder; what it would refuse is refused, so before long work too.

    Raises:
        UsageError: as `new_folder`.
    """
    path = path.absolute()
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        remedy = "give --overwrite" if mark else "remove it first"
        raise UsageError(f"{path} already exists: name another folder, or {remedy}")
    if taken and not (path / mark).is_file():
        raise UsageError(
            f"{path} contains no {mark}, so it was not made by this command and is kept: name another folder"
        )
    return taken


def let_others_read(folder: Path) -> None:
    """Gives read permissions, as far as the umask allows, to a folder and everything below it.

    safetensors and `tempfile` make files that only their owner can read, but a store on a shared disk has many readers:
    other people of a group, and containers that run as other users.
    """
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444) & ~UMASK)


def link(temporary: Path, path: Path) -> None:
    """Gives a file a second name.

    Raises:
        FileExistsError: the name is taken.
        StoreError: the file system does not support links.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise StoreError(f"{path}: its file system has no hard links; keep the store on another one") from None
        raise
    moment()


def make_folders(path: Path, lasting: bool = True) -> None:
    """Makes a folder and its parents durably, so that they survive a power cut.

    Another process may make the same folders, or remove them while they are empty: the caller then gets
    FileNotFoundError, here or when it writes, and may try again.

    Raises:
        StoreError: a file exists at the path of one of the folders.
    """
    if path.is_dir():
        return
    make_folders(path.parent, lasting)
    try:
        path.mkdir()  # exist_ok=True looks a second time, and fails where the folder went in between
    except FileExistsError:
        if path.is_file():
            raise StoreError(f"{path} is a file where a folder is needed; move it away") from None
    if lasting:
        sync(path.parent)
        moment()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, for folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all files and folders below it are on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def prune(folder: Path, root: Path) -> None:
    """Removes a folder and its parents below `root`, as far as they are empty."""
    while folder not in (root, folder.parent):
        try:
            folder.rmdir()
        except OSError:  # not empty, or not ours to remove
            return
        folder = folder.parent


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Converts errors of the file system into the errors of `common.errors`: one line with the path and the remedy."""
    try:
        yield
    except FileExistsError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR):
            raise RetryableError(f"{path}: the file system fails ({reason}); try again") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full ({reason}); free some space, then run it again"
        elif error.errno == errno.EROFS:
            reason = "the file system is read-only; choose another place, or mount it writable"
        elif isinstance(error, PermissionError):
            reason = "no permission; change its owner or mode, or choose another place"
        raise StoreError(f"{path}: {reason}") from None
