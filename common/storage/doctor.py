"""Tests the operations of a store on which the pipeline relies."""

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import DataError, MoeAsrError, StoreError
from common.files import NotFound, file_hash
from common.storage.store import Store, remove_all

MANY = 1_050  # more keys than one answer of an S3 server lists
LARGE = 40 * 2**20  # bytes; more than goes in one part
RACES = 16
CLOCK_SECONDS = 300.0

Test = Callable[[Store, str], str]  # (store, prefix) → what it promises


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check: passed (`ok`), passed with a remark (`note`), or preventing runs (`fail`)."""

    name: str
    state: Literal["ok", "note", "fail"]
    detail: str


def check_store(store: Store) -> Iterator[Check]:
    """Runs all checks under a separate prefix, which is removed afterwards if the store allows it.

    Yields:
        One result per check; a `note` for features that runs do not require.
    """
    prefix = f"doctor-{secrets.token_hex(6)}/"
    cleaned = True
    try:
        for name, test in TESTS.items():
            if not cleaned and test in BULKY:
                yield Check(name, "note", "not tried: what it writes could not be removed again")
                continue
            try:
                yield Check(name, "ok", test(store, prefix))
            except StoreError as error:
                if test not in WITHOUT:
                    yield Check(name, "fail", str(error))
                    return  # without rights or space, the others would say the same
                cleaned = cleaned and test is not _delete
                yield Check(name, "note", f"{WITHOUT[test]} ({error})")
            except MoeAsrError as error:
                yield Check(name, "fail", str(error))
    finally:
        remove_all(store, prefix)


def _write_and_read(store: Store, prefix: str) -> str:
    for body in (b"one", b"two"):
        store.write(f"{prefix}small", body)
        _expect(store.read(f"{prefix}small") == body, "a read after a write gives other bytes")
    return "a read sees the last write"


def _absent(store: Store, prefix: str) -> str:
    _expect(store.size(f"{prefix}absent") is None, "a key that was never written has a size")
    try:
        store.read(f"{prefix}absent")
    except NotFound:
        return "a missing key is distinguished from a refusal"
    raise DataError("a key that was never written can be read")


def _clock(store: Store, prefix: str) -> str:
    store.write(f"{prefix}clock", b"")
    entry = next(iter(store.list(f"{prefix}clock")), None)
    if entry is None:
        raise DataError("a key that was just written is not listed")
    ahead = entry.modified - time.time()
    _expect(
        abs(ahead) < CLOCK_SECONDS, f"the clocks of the store and of this machine differ by {ahead:.0f} s: set them"
    )
    return f"within {max(1.0, abs(ahead)):.0f} s of this machine's"


def _many_keys(store: Store, prefix: str) -> str:
    keys = [f"{prefix}many/{i:05d}" for i in range(MANY)]
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    rate = MANY / (time.monotonic() - started)
    _expect(
        [entry.key for entry in store.list(f"{prefix}many/")] == keys, f"a listing of {MANY:,} keys is not complete"
    )
    return f"{MANY:,} keys listed, in order; {rate:,.0f} small writes/s"


def _large_file(store: Store, prefix: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(os.urandom(2**20) * (LARGE // 2**20))
        started = time.monotonic()
        store.put(f"{prefix}large", source)
        put = LARGE / 1e6 / (time.monotonic() - started)
        started = time.monotonic()
        store.get(f"{prefix}large", target)
        got = LARGE / 1e6 / (time.monotonic() - started)
        _expect(file_hash(source) == file_hash(target), "a file of 40 MiB comes back altered")
    return f"40 MiB in parts; {put:,.0f} MB/s up, {got:,.0f} MB/s down"


def _ranges(store: Store, prefix: str) -> str:
    body = hashlib.sha256(b"seed").digest() * 4096
    store.write(f"{prefix}ranges", body)
    for start, length in ((0, 1), (70_000, 1_000), (len(body) - 5, 5)):
        part = store.read_range(f"{prefix}ranges", start, length)
        _expect(part == body[start : start + length], f"bytes {start}+{length} are not those that were written")
    return "any range of bytes"


def _race(store: Store, prefix: str) -> str:
    """Repeated races of two writers, of which exactly one must win."""
    for number in range(RACES):
        bodies = [f"{number} {who}".encode() for who in ("a", "b")]
        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(lambda body, key=f"{prefix}race/{number}": store.put_if_absent(key, body), bodies))
        _expect(won.count(True) == 1, f"of two racing create-only writes {won.count(True)} succeed")
        _expect(
            store.read(f"{prefix}race/{number}") == bodies[won.index(True)], "the loser of a race overwrote the winner"
        )
    return f"{RACES} races of two create-only writes, one winner each"


def _move_aside(store: Store, prefix: str) -> str:
    store.write(f"{prefix}judged", b"new")
    _expect(not store.move_aside(f"{prefix}judged", f"{prefix}aside", b"old"), "a key with other bytes was quarantined")
    _expect(store.move_aside(f"{prefix}judged", f"{prefix}aside", b"new"), "a key cannot be quarantined")
    _expect(store.size(f"{prefix}judged") is None, "a key that was quarantined still exists")
    return "a damaged manifest can be quarantined"


def _delete(store: Store, prefix: str) -> str:
    store.delete(f"{prefix}small")
    store.delete(f"{prefix}small")
    _expect(store.size(f"{prefix}small") is None, "a deleted key still exists")
    return "deleted keys disappear immediately; deleting again is not an error"


def _leftovers(store: Store, prefix: str) -> str:
    return f"{sum(1 for _ in store.leftovers())} unfinished uploads remain (`moe-asr gc`)"


def _expect(held: bool, otherwise: str) -> None:
    if not held:
        raise DataError(otherwise)


TESTS: dict[str, Test] = {
    "store: write and read": _write_and_read,
    "store: missing keys": _absent,
    "store: delete": _delete,
    "store: clock": _clock,
    "store: many keys": _many_keys,
    "store: large file": _large_file,
    "store: ranges": _ranges,
    "store: create-only writes": _race,
    "store: quarantine": _move_aside,
    "store: unfinished uploads": _leftovers,
}
# What a run can do without, and what that costs.
WITHOUT: dict[Test, str] = {
    _delete: "refused: checkpoints of finished stages stay and take space",
    _move_aside: "refused: a damaged result cannot be recreated",
    _leftovers: "not listed: uploads of killed processes stay, unless the bucket has a rule that ends them",
}
BULKY = (_many_keys, _large_file)
