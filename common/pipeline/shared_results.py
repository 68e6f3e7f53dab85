"""Results that are shared by runs and belong to no stage: artifacts of the store with separate keys."""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import RetryableError
from common.storage.artifacts import Key, commit, download_folder, fetch, inspect, new_attempt, quarantine
from common.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedResults:
    """Finds and adds shared results in one store.

    Attributes:
        scratch: folder for downloads from a remote store.
    """

    store: Store
    scratch: Path

    def find(self, key: Key) -> Path | None:
        """The folder of a result, after a check of each file's hash; None if the result does not exist or is
        damaged.
        """
        state = inspect(self.store, key)
        if state.status == "damaged":
            log.warning("%s/%s: %s; it will be recreated", key.stage, key.digest[:8], state.reason)
            quarantine(self.store, key, state)
        if state.status != "done" or state.manifest is None:
            return None
        try:
            return fetch(self.store, key, state.manifest, download_folder(self.scratch, key))
        except RetryableError as error:  # it is quarantined
            log.warning("%s", error)
            return None

    def add(self, key: Key, fill: Callable[[Path], None], *, started: float) -> None:
        """Commits the files that `fill` writes into an empty folder, unless another process was faster.

        Args:
            started: start of the computation, in seconds since 1970.
        """
        folder = new_attempt(self.store, key, self.scratch)
        try:
            fill(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        commit(self.store, key, folder, started=started, seconds=time.time() - started)
