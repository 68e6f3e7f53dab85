"""Selection of an expert for all audio: an added one by the model's table of speakers and groups, or any by name."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.corpus import Utterance
from common.data.identities import identity_key
from common.data.sources import MODEL_FILES
from common.errors import UsageError
from common.files import file_hash
from common.json_files import Row, read_object
from common.model.adapters import CONFIG
from common.model.added_experts import ADDED, AddedExpert
from common.model.bundle import DESCRIPTION
from common.pipeline.runs import stage_folders
from common.storage.store import Store

if TYPE_CHECKING:
    from common.inference.load_model import OpenedModel

FOLDER = "added"  # of a model's own folder
STAGE = "extend"  # whose artifacts added experts are, in a store
SHOWN = 12  # names in a message
PLACES = ("base", "base_model_name_or_path")  # where descriptions say that the base is, on one machine or another


def added_folders(run: tuple[Store, dict[str, object]] | None, folder: Path, cache: Path) -> list[Path]:
    """Folders of a model's added experts, in order: those named by its run, or those in its own folder."""
    if run is not None:
        store, record = run
        tasks = record["tasks"]
        assert isinstance(tasks, dict)
        has_added = any(task["stage"] == STAGE for task in tasks.values())
        return stage_folders(store, record, STAGE, cache) if has_added else []
    return sorted(path.parent for path in (folder / FOLDER).glob(f"*/{ADDED}"))


@lru_cache(maxsize=8)
def model_content(folder: Path) -> str:
    """sha256 over names and contents of all files that decide what a model computes, without its added experts and its
    base: weights, descriptions of the mixture and of adapters, and configuration.
    """
    names = {DESCRIPTION, CONFIG, *MODEL_FILES}
    files = [path for path in sorted(folder.rglob("*")) if path.name in names or path.suffix == ".safetensors"]
    own = [path for path in files if path.relative_to(folder).parts[0] != FOLDER]
    parts = {path.relative_to(folder).as_posix(): _content(path) for path in own}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> Row | str:
    """A description's values without the place of the base, or the sha256 of another file."""
    if path.name not in (DESCRIPTION, CONFIG):
        return file_hash(path)
    return {name: value for name, value in read_object(path).items() if name not in PLACES}


def added_number(added: Sequence[AddedExpert], utterance: Utterance) -> int:
    """Number of an utterance's added expert by the table: its speaker's expert, otherwise its group's; -1 for none.

    Names are compared in whatever spelling, since another corpus may write them in another.
    """
    numbers = [
        n
        for n, expert in enumerate(added)
        if expert.value and identity_key(getattr(utterance, expert.column, "")) == identity_key(expert.value)
    ]
    return min(numbers, key=lambda n: (added[n].column != "speaker", n), default=-1)


def with_added(opened: OpenedModel, *, speaker: str | None = None, expert: str | None = None) -> OpenedModel:
    """The model with one expert for all audio: an added one, given by its speaker or by its name, or the one of a group
    in a model with routing by a table.

    Raises:
        UsageError: the model has no such expert; the message lists the nearest known names.
    """
    if speaker is not None and expert is not None:
        raise UsageError("--speaker and --expert: give one of them")
    if speaker is None and expert is None:
        return opened
    own = [added for added in opened.added if added.column == "speaker"] if speaker is not None else list(opened.added)
    wanted, names = (
        (speaker, [added.value for added in own]) if speaker is not None else (expert, [added.name for added in own])
    )
    assert wanted is not None
    groups = opened.info.groups if opened.info is not None and speaker is None else ()
    if wanted in names:
        return replace(opened, voice=opened.added.index(own[names.index(wanted)]))
    if wanted in groups:
        return replace(opened, group=groups.index(wanted))
    asked_for = f"speaker {wanted!r}" if speaker is not None else f"expert {wanted!r}"
    raise UsageError(f"model {opened.name} has no {asked_for}{nearest(wanted, [*names, *groups])}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: the known names that are most similar to an unknown name."""
    if not known:
        return ": nothing was added to it (`moe-asr extend` does)"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"; it knows {', '.join(sorted(known)[:SHOWN])}{more}"
