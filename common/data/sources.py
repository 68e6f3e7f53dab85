"""Finds the two inputs of a run, corpus and base model, and computes their digests.

A model from a store is downloaded to a local folder. Of a corpus in a store, only the index is downloaded; audio is
fetched when it is needed (`common.data.clips`).
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from common.data.clips import AudioCache, Remote
from common.data.corpus import INDEX_NAME, Corpus, read_corpus
from common.errors import DataError, RetryableError
from common.files import file_hash
from common.storage import open_store
from common.storage.local import LocalStore
from common.storage.store import Entry, Store, check_key

PARALLEL = 8  # files that are copied at once
MODEL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json")
# As the hub's client requires: begins and ends with a letter, a digit or _, without -- and .., no .git at the end.
HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?")


def open_corpus(path: str, cache: Path, *, endpoint_url: str | None = None, cache_bytes: int = 0) -> Corpus:
    """Opens a corpus in a folder, or in a store, from which only the index is downloaded.

    Args:
        path: a folder, an index file, or the `s3://` address of either.
        cache: folder for the index and audio of a remote corpus; all corpora share the audio cache.
        cache_bytes: maximum size of the audio cache.

    Raises:
        DataError: the corpus cannot be found or read.
    """
    if not path.startswith("s3://"):
        return read_corpus(path)
    base, name = path.rstrip("/"), INDEX_NAME
    if base.endswith((".json", ".jsonl")):
        base, _, name = base.rpartition("/")
    store = open_store(base, endpoint_url=endpoint_url)
    index = _kept(cache / "corpus", base, endpoint_url) / name
    entry = next((entry for entry in store.list(name) if entry.key == name), None)
    if entry is None:
        raise DataError(f"{base}/{name} does not exist: give the address of a folder with {INDEX_NAME}")
    _refresh(store, entry, index)
    try:
        corpus = read_corpus(index)
    except DataError as error:
        raise DataError(str(error).replace(str(index), f"{base}/{name}")) from None
    remote = Remote(store.url, endpoint_url, AudioCache(cache / "audio", cache_bytes), corpus.digest)
    return replace(corpus, remote=remote)


def locate_model(name: str, cache: Path, *, revision: str | None = None, endpoint_url: str | None = None) -> Path:
    """A local folder that contains the base model, downloaded from the hub or a store if necessary.

    Args:
        name: a folder, a hub name or the `s3://` address of a folder.
        cache: folder for downloads from a store.
        revision: commit of a hub model.
        endpoint_url: address of an S3-compatible store.

    Raises:
        DataError: there is no such model.
        RetryableError: the hub does not answer.
    """
    if name.startswith("s3://"):
        folder = _kept(cache / "model", name, endpoint_url)
        download_folder(open_store(name, endpoint_url=endpoint_url), folder)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise DataError(f"model.name {name!r} is neither a folder nor a hub name (organisation/model)")
    return _from_hub(name, revision)


def download_folder(store: Store, folder: Path) -> None:
    """Copies all files of a store into a folder, and deletes other files that are in it."""
    entries = {check_key(entry.key): entry for entry in store.list("")}
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda name: _refresh(store, entries[name], folder / name), entries))
    for entry in LocalStore(folder).list("", follow=False):
        if entry.key not in entries:
            (folder / entry.key).unlink(missing_ok=True)


def _refresh(store: Store, entry: Entry, path: Path) -> None:
    """Copies a file of a store, unless there is a local one of equal size and time."""
    status = path.stat() if path.is_file() else None
    if status is None or status.st_size != entry.size or abs(status.st_mtime - entry.modified) >= 1e-3:
        store.get(entry.key, path)
        os.utime(path, (entry.modified, entry.modified))


def _kept(cache: Path, address: str, endpoint_url: str | None) -> Path:
    """The cache folder of an address at an endpoint, since two servers may have buckets of the same name."""
    return cache / hashlib.sha256(f"{endpoint_url}\0{address}".encode()).hexdigest()[:16]


def is_hub_name(name: str) -> bool:
    """Whether a model's name is looked up on the hub: no such folder exists, and it has the form organisation/model."""
    return not name.startswith("s3://") and not Path(name).is_dir() and HUB_NAME.fullmatch(name) is not None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise DataError(
            f"model.name {name!r} at revision {revision or 'main'}: the hub does not have this model"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise RetryableError(
            f"model.name {name!r} is not a local folder, and the hub cannot be reached: {type(error).__name__}; "
            "give a folder or a store URI to work without a hub"
        ) from None


def model_digest(name: str, cache: Path, *, revision: str | None = None, endpoint_url: str | None = None) -> str:
    """The base model's part of keys: its content, or hub name and revision.

    A folder is identified by the bytes of its weights and configuration, so that a local folder and a store address of
    the same checkpoint give the same keys.
    """
    if is_hub_name(name):
        return f"hub:{name}@{revision or 'main'}"
    return f"sha256:{folder_digest(locate_model(name, cache, endpoint_url=endpoint_url))}"


@lru_cache(maxsize=8)
def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint's weights and configuration.

    Raises:
        DataError: the folder contains no safetensors.
    """
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"model folder {folder} contains no *.safetensors: give a Hugging Face checkpoint")
    parts = {}
    for name in [*weights, *MODEL_FILES]:
        if (folder / name).is_file():
            parts[name] = file_hash(folder / name)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
