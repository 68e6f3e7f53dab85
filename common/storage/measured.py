"""A store that counts its calls, seconds, bytes and errors by operation."""

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from common import telemetry
from common.files import NotFound
from common.storage.local import folder_files
from common.storage.store import Store
from common.telemetry import StageTelemetry

# Operation → the bytes that a call moved, from its result and its arguments.
BYTES: dict[str, Callable[..., int]] = {
    "read": lambda data, *_: len(data),
    "read_range": lambda data, *_: len(data),
    "get": lambda _, key, path: path.stat().st_size,
    "put": lambda _, key, path: path.stat().st_size,
    "write": lambda _, key, data: len(data),
    "put_if_absent": lambda written, key, data: len(data) if written else 0,
    "put_folder": lambda _, folder, prefix: sum((folder / name).stat().st_size for name in folder_files(folder)),
}
OPERATIONS = (*BYTES, "move_aside", "list", "leftovers", "delete", "size")


def measured_store(inner: Store, live: StageTelemetry) -> Store:
    """A store that forwards every call to `inner`; NotFound is not counted as an error."""
    for operation in OPERATIONS:
        live.add(telemetry.STORE_ERRORS, 0, operation=operation)  # a rate needs to have seen the zero
    return cast(Store, _MeasuredStore(inner, live))


class _MeasuredStore:
    def __init__(self, inner: Store, live: StageTelemetry) -> None:
        self._inner, self._live = inner, live

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in OPERATIONS:
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            result = self._timed(name, lambda: _whole(value(*arguments, **options)))
            if name in BYTES:
                self._live.add(telemetry.STORE_BYTES, BYTES[name](result, *arguments), operation=name)
            return result

        return call

    def _timed(self, operation: str, call: Callable[[], Any]) -> Any:
        started = time.monotonic()
        try:
            return call()
        except NotFound:
            raise
        except Exception:
            self._live.add(telemetry.STORE_ERRORS, operation=operation)
            raise
        finally:
            self._live.add(telemetry.STORE_SECONDS, time.monotonic() - started, operation=operation)
            self._live.add(telemetry.STORE_REQUESTS, operation=operation)


def _whole(result: Any) -> Any:
    """A listing with all of its pages fetched, so that their time counts; any other result unchanged."""
    return iter(list(result)) if isinstance(result, Iterator) else result
