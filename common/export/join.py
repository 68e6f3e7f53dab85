"""Combines several extensions of one model into that model with all their added experts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from common.errors import UsageError
from common.inference.added_experts import FOLDER, model_content
from common.model.added_experts import read_added


def join_extensions(models: Sequence[Path], added: Sequence[Sequence[Path]], out: Path) -> list[str]:
    """Copies a model and the added experts of all its extensions into one folder, without any computation.

    Args:
        models: the folder of each extension's model.
        added: the folders of each extension's experts.
        out: an empty folder.

    Returns:
        The names of all added experts.

    Raises:
        UsageError: they extend different models, or two experts have the same name, speaker or group.
    """
    if any(model_content(model) != model_content(models[0]) for model in models):
        raise UsageError("these extend different models, and an added expert fits only its own: extend one of them")
    names: list[str] = []
    owners: set[tuple[str, str]] = set()
    for folder in dict.fromkeys(folder for folders in added for folder in folders):  # one that two have counts once
        info = read_added(folder)
        owner = info.column, info.value
        if info.name in names or owner in owners:
            raise UsageError(f"two have an expert {info.name!r}, or one for {info.column} {info.value!r}: remove one")
        shutil.copytree(folder, out / FOLDER / info.name)
        names.append(info.name)
        owners.add(owner)
    shutil.copytree(models[0], out, dirs_exist_ok=True)
    return names
