"""Files of a store to which nothing refers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from common.errors import DataError, MoeAsrError
from common.files import NotFound
from common.storage.artifacts import ROOT, Key
from common.storage.manifest import MANIFEST, Manifest
from common.storage.store import Entry, Store, warn_once


def garbage(store: Store, *, older_than_hours: float = 24.0) -> list[Entry]:
    """Files that nothing refers to: attempts that lost or were killed, quarantined manifests, checkpoints and parts of
    finished stages, temporary files. A link counts as a file itself; its target is not followed.

    Args:
        older_than_hours: minimum age by the store's clock; a key with newer files is left alone, since an attempt may
            be running.
    """
    before = store.now() - 3600 * older_than_hours
    by_key: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in store.list(ROOT, follow=False):
        parts = entry.key.split("/")
        if len(parts) >= 4:
            by_key[tuple(parts[1:3])].append(entry)
    removable = [entry for entry in _leftovers(store) if entry.modified < before]
    for (stage, digest), entries in by_key.items():
        if all(entry.modified < before for entry in entries):
            removable += _unreferenced(store, Key(stage, digest), entries)
    return removable


def _leftovers(store: Store) -> list[Entry]:
    """Unfinished writes; empty, with a warning, if a server does not list them."""
    try:
        return list(store.leftovers())
    except MoeAsrError as error:
        warn_once(store, error)
        return []


def _unreferenced(store: Store, key: Key, entries: Iterable[Entry]) -> Iterator[Entry]:
    kept = {"checkpoints", "parts"}  # from which an interrupted stage continues
    try:
        kept = {MANIFEST, Manifest.from_json(store.read(key.prefix + MANIFEST), key.prefix).attempt}
    except NotFound:
        pass
    except DataError:  # not ours to judge
        return
    for entry in entries:
        if entry.key[len(key.prefix) :].partition("/")[0] not in kept:
            yield entry
