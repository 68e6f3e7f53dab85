"""Attempts at one task: progress of the current attempt, and durations of all attempts.

Each attempt writes a small record next to the checkpoints of its stage, `checkpoints/attempt-<id>.json`. It is updated
every half minute and when the attempt ends, so that `moe-asr status` shows the current activity of a stage, and an
interrupted stage reports the time of all its attempts. The records are deleted when the stage is done.
"""

import json
import logging
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from common.errors import MoeAsrError, RetryableError, StoreError
from common.progress import progress
from common.storage.artifacts import Key
from common.storage.store import Store

log = logging.getLogger(__name__)
EVERY = 30.0  # seconds between two records of a running attempt
FAR = 1e11  # seconds; what is beyond is no time of an attempt


@dataclass
class Activity:
    """Current activity of a stage: `name` ("training", "scoring the trained model"), `done` of `total` units."""

    name: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""

    def begin(self, name: str, done: int, total: int, unit: str) -> None:
        """Begins another activity."""
        self.name, self.done, self.total, self.unit = name, done, total, unit


@contextmanager
def counting(
    activity: Activity, total: int, name: str, *, unit: str, hidden: bool
) -> Iterator[Callable[[int], object]]:
    """Begins an activity and shows a progress bar of the same name while the block runs; yields what counts units."""
    activity.begin(name, 0, total, unit)

    def count(units: int) -> None:
        activity.done += units
        bar.update(units)

    with closing(progress(total, name, unit=unit, hidden=hidden)) as bar:
        yield count


@dataclass
class Attempt:
    """One attempt at a task.

    Attributes:
        first: start of the first attempt at the task, in seconds since 1970.
        number: number of this attempt, from 1.
        earlier: total duration of the earlier attempts, in seconds.
        activity: current activity, updated by the stage.
    """

    first: float
    number: int
    earlier: float
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)  # the time of day may be set meanwhile
    activity: Activity = field(default_factory=Activity)

    @property
    def seconds(self) -> float:
        """Wall time of all attempts, without the time between them."""
        return self.earlier + time.monotonic() - self.clock

    def record(self) -> dict[str, Any]:
        """The attempt alone, as JSON."""
        seconds = time.monotonic() - self.clock
        own = {"started": self.started, "updated": time.time(), "seconds": seconds, "host": platform.node()}
        return own | {name: getattr(self.activity, name) for name in ("name", "done", "total", "unit")}


@contextmanager
def attempt_at(store: Store, key: Key) -> Iterator[Attempt]:
    """Records an attempt while the block runs, and its end."""
    earlier = attempts_at(store, key)
    seconds = sum(float(record["seconds"]) for record in earlier)
    first = min((float(record["started"]) for record in earlier), default=time.time())
    attempt = Attempt(first, len(earlier) + 1, seconds)
    name = f"{_prefix(key)}{secrets.token_hex(6)}.json"
    over = threading.Event()

    def write() -> None:
        try:
            store.write(name, json.dumps(attempt.record()).encode())
        except (MoeAsrError, OSError) as error:  # the work matters more than its record
            log.debug("%s cannot be written: %s", name, error)

    def renew() -> None:
        while not over.wait(EVERY):
            write()

    thread = threading.Thread(target=renew, name="attempt", daemon=True)
    thread.start()
    try:
        yield attempt
    except BaseException as error:
        over.set()
        # A record must not delay a failing store or the end after a second signal.
        if not isinstance(error, KeyboardInterrupt | StoreError | RetryableError):
            thread.join()
            write()
        raise
    over.set()
    thread.join()


def attempts_at(store: Store, key: Key) -> list[dict[str, Any]]:
    """The records of the attempts at an unfinished task, oldest first; damaged records are omitted."""
    records = []
    for entry in store.list(_prefix(key)):
        try:
            record = json.loads(store.read(entry.key))
            times = {name: float(record[name]) for name in ("started", "updated", "seconds")}
            if not all(0 <= value < FAR for value in times.values()):
                raise ValueError(f"{times} are not valid times")
            records.append(record | times)
        except (MoeAsrError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is omitted: %s", entry.key, error)
    return sorted(records, key=lambda record: record["started"])


def describe_attempt(record: dict[str, Any], *, now: float) -> str:
    """A description of an attempt: `scoring the trained model: 40 of 72 utterances`, with its age if it is not
    updated.
    """
    name, done, total, unit = (record.get(key, "") for key in ("name", "done", "total", "unit"))
    text = f"{name}: {done} of {total} {unit}" if total else str(name or "started")
    silent = now - record["updated"]
    return text if silent < 3 * EVERY else f"stopped {silent / 60:.0f} min ago, {text}"


def _prefix(key: Key) -> str:
    return f"{key.prefix}checkpoints/attempt-"
