"""Packs a corpus: its audio in uncompressed tar shards, and an index that gives the location of each file's bytes.

    index.jsonl                                 written last; each line also has shard, byte_offset, byte_size, sha256
    shards/000000-<16 hex of its sha256>.tar    plain tar: `tar x` gives the audio back

The same corpus gives the same shards, so a killed packing can be continued. Neither this module nor the loaders unpack
a tar: readers read the ranges that the index names, check each by its hash, and decode them as audio.
"""

import hashlib
import io
import itertools
import re
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.data.audio import audio_info
from common.data.clips import Place
from common.data.corpus import INDEX_NAME, PROVENANCE, Corpus, Utterance, index_lines
from common.errors import DataError, UsageError
from common.files import MAX_FILE, TEMPORARY, explained, file_hash
from common.storage.store import Store

READERS = 8  # audio files that are read at once
AHEAD = 32  # audio files in memory at most
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, slots=True)
class Packed:
    """Result of a packing: numbers of audio files and shards, and their bytes; `stored` shards were newly written."""

    files: int
    shards: int
    stored: int
    size: int


def parse_size(text: str) -> int:
    """`256MB`, `1GiB` or a number of bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size: write it as 256MB")
    return size


def pack_corpus(
    corpus: Corpus,
    store: Store,
    *,
    shard_bytes: int,
    scratch: Path,
    progress: Callable[[int], object] = lambda files: None,
) -> Packed:
    """Writes a corpus's audio as shards, and then its index.

    Args:
        store: store of the packed corpus, at its root.
        shard_bytes: maximum size of a shard; a larger file gets a separate shard.
        scratch: a folder for the shard that is being made.
        progress: called with the number of audio files packed since the last call.

    Raises:
        UsageError: the store already contains another index; nothing is written.
        DataError: an audio file cannot be read; only whole shards are left, and no index.
    """
    existing = {entry.key: entry.size for entry in store.list("")}
    before = store.read(INDEX_NAME, MAX_FILE) if INDEX_NAME in existing else None
    other = UsageError(f"{store.url} already holds another {INDEX_NAME}: name another place for the packed corpus")
    places: dict[str, Place] = {}
    stored = size = shards = 0
    with tempfile.TemporaryDirectory(dir=scratch, prefix=TEMPORARY) as folder:
        for number, (path, members) in enumerate(_shards(_read_all(corpus), shard_bytes, Path(folder))):
            name = f"shards/{number:06d}-{file_hash(path)[:16]}.tar"
            if before is not None and name.encode() not in before:
                raise other
            places |= {source: Place(name, *where) for source, where in members.items()}
            size, shards = size + path.stat().st_size, shards + 1
            if existing.get(name) != path.stat().st_size:
                store.put(name, path)
                stored += 1
            path.unlink()
            progress(len(members))
    index = "".join(index_lines(corpus.utterances, places)).encode()
    if before not in (None, index):
        raise other
    if corpus.remote is None and (corpus.root / PROVENANCE).is_file():
        store.put(PROVENANCE, corpus.root / PROVENANCE)
    if not store.put_if_absent(INDEX_NAME, index) and store.read(INDEX_NAME, MAX_FILE) != index:
        raise other
    return Packed(len(places), shards, stored, size)


def _read_all(corpus: Corpus) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every audio file once, in order of ids, several read at a time."""
    first: dict[str, Utterance] = {}
    for utterance in corpus.utterances:
        first.setdefault(utterance.audio_filepath, utterance)

    def read(utterance: Utterance) -> tuple[str, bytes]:
        name = utterance.audio_filepath
        data = corpus.audio(utterance)
        if len(data) > MAX_FILE:
            raise DataError(f"{name} has {len(data):,} bytes, over {MAX_FILE:,}: cut it into utterances")
        audio_info(data, name=name)  # what is no audio is refused
        return name, data

    with ThreadPoolExecutor(READERS) as pool:
        waiting = iter(first.values())
        coming = deque(pool.submit(read, utterance) for utterance in itertools.islice(waiting, AHEAD))
        try:
            while coming:
                yield coming.popleft().result()
                coming.extend(pool.submit(read, utterance) for utterance in itertools.islice(waiting, 1))
        finally:
            for future in coming:
                future.cancel()


Members = dict[str, tuple[int, int, str]]  # audio path → offset, size, sha256


def _shards(files: Iterable[tuple[str, bytes]], shard_bytes: int, folder: Path) -> Iterator[tuple[Path, Members]]:
    """Writes one tar after the other and yields each when it is closed."""
    path = folder / "shard.tar"
    writer = _Writer(path)
    try:
        for name, data in files:
            if writer.members and writer.size + len(data) + 4 * tarfile.BLOCKSIZE > shard_bytes:
                writer.close()
                yield path, writer.members
                writer = _Writer(path)
            writer.add(name, data)
        writer.close()
        yield path, writer.members
    finally:
        writer.close()


class _Writer:
    """Writer of one tar, whose content does not depend on the machine or the time."""

    def __init__(self, path: Path) -> None:
        self.path, self.members = path, Members()
        with explained(path):
            self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - by close()

    @property
    def size(self) -> int:
        return self._tar.offset

    def add(self, name: str, data: bytes) -> None:
        sha256 = hashlib.sha256(data).hexdigest()
        member = tarfile.TarInfo(member_name(name, sha256))
        member.size = len(data)
        with explained(self.path):
            self._tar.addfile(member, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self.members[name] = (self.size - padded, len(data), sha256)

    def close(self) -> None:
        with explained(self.path):
            self._tar.close()


def member_name(name: str, sha256: str) -> str:
    """An audio path as a name inside a tar; a path that would leave the folder is replaced by a name made from its
    content.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"elsewhere/{sha256[:16]}{path.suffix}"
    return str(path)


def check_shard(path: Path, places: Iterable[Place]) -> None:
    """Compares a local shard, member by member, with the index.

    Raises:
        DataError: the tar is damaged; a member is a link, a device or of a sparse file, has a name that leads out of
            the folder, or is not in the index; or the index names a range that is not exactly a member.
    """
    wanted = {(place.byte_offset, place.byte_size) for place in places}
    remedy = "take the corpus from a source that you trust, or pack it again"
    ranges = set()
    try:
        with explained(path), tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise DataError(f"{path}: {member.name!r} is not a regular file: {remedy}")
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{path}: {member.name!r} leads out of the corpus: {remedy}")
                if (member.offset_data, member.size) not in wanted:
                    raise DataError(
                        f"{path}: the index does not name {member.name!r} of {member.size:,} bytes: {remedy}"
                    )
                ranges.add((member.offset_data, member.size))
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a complete tar file ({error}): {remedy}") from None
    missing = sorted(wanted - ranges)
    if missing:
        offset, size = missing[0]
        raise DataError(f"{path} has no file of {size:,} bytes at {offset:,}, which the index names: {remedy}")
