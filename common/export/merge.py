"""Merges several trained models: averages the deltas that their adapters add to the weights, W + Σ w·scale·B A.

The mean of the products B A is not the product of the means of A and B. Concatenated, the matrices of n adapters are
one adapter of n times the rank that adds exactly the weighted sum.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from common.errors import DataError, UsageError
from common.json_files import write_object
from common.model.adapters import Matrices, adapter_matrices, save_adapter
from common.model.bundle import DESCRIPTION, BundleInfo, read_info

MARK = "merge.json"
GATE = ("gate.json", "gate.safetensors")
# What has to be equal for adapters to be used in place of each other.
SAME = ("base_digest", "language", "task", "context", "margin", "num_experts", "targets", "within")
SAME_IN_MIXTURES = ("mixture", "top_k", "layer", "pooling", "route_by", "column", "groups", "gate")


def merge_models(folders: Sequence[Path], weights: Sequence[float], out: Path) -> int:
    """Writes the weighted sum of trained models as a model that `common.inference.load_model.open_model` reads.

    Args:
        folders: outputs of the asr stage.
        weights: weight of each model.
        out: an empty folder.

    Returns:
        The largest rank of the written adapters.

    Raises:
        UsageError: the models cannot be merged.
        DataError: a model cannot be read.
    """
    infos = [read_info(folder) for folder in folders]
    _refuse_strangers(folders, infos)
    scales = [weight * info.alpha / info.rank for weight, info in zip(weights, infos, strict=True)]
    final = {"experts": 1, "shared": 0}  # ranks
    parts = [f"experts/{number}" for number in range(infos[0].num_experts)] + ["shared"] * bool(infos[0].shared_rank)
    for part in parts:
        summed = _side_by_side([adapter_matrices(folder / part) for folder in folders], scales)
        rank = len(next(iter(summed.values()))[0])
        final[part.split("/")[0]] = rank
        save_adapter(summed, out / part, base_model=infos[0].base, alpha=rank)
    routed, shared = final["experts"], final["shared"]
    info = replace(infos[0], adapt="lora", rank=routed, alpha=float(routed), shared_rank=shared)
    write_object(out / DESCRIPTION, asdict(info))
    if info.gate:
        for name in GATE:
            shutil.copyfile(folders[0] / name, out / name)
    return max(final.values())


def _refuse_strangers(folders: Sequence[Path], infos: Sequence[BundleInfo]) -> None:
    """Raises UsageError unless the models are adapters of the same base with the same audio context and routing."""
    first = infos[0]
    for folder, info in zip(folders, infos, strict=True):
        if info.adapt == "full":
            raise UsageError(f"{folder} is a full fine-tune: only adapters can be merged")
        if bool(info.shared_rank) != bool(first.shared_rank):
            raise UsageError(f"one of {folder} and {folders[0]} has a shared expert and one has none")
        for name in SAME + SAME_IN_MIXTURES * (first.num_experts > 1):
            if (theirs := getattr(info, name)) != (ours := getattr(first, name)):
                raise UsageError(f"{folder} has {name} {theirs!r}, {folders[0]} has {ours!r}: they cannot be merged")
        if info.gate and _gate(folder) != _gate(folders[0]):
            raise UsageError(
                f"{folder} and {folders[0]} are mixtures with different gates: expert 3 of one has nothing to do with "
                "expert 3 of the other, and the gates' outputs cannot be compared. Train one mixture on all the data, "
                "or merge runs of one expert"
            )


def _gate(folder: Path) -> list[bytes]:
    try:
        return [(folder / name).read_bytes() for name in GATE]
    except OSError:
        raise DataError(f"{folder} is a mixture without a gate: it is incomplete") from None


def _side_by_side(adapters: Sequence[Matrices], scales: Sequence[float]) -> Matrices:
    """One adapter of scale 1, equal to Σ scale · B A."""
    for adapter in adapters:
        if strange := adapter.keys() ^ adapters[0].keys():
            raise DataError(f"the adapters differ in {min(strange)}: one of them is incomplete")
        for name in adapter:
            if _layer_size(adapter[name]) != _layer_size(adapters[0][name]):
                raise DataError(f"the adapters differ in the size of {name}: they were trained on different bases")
    return {
        name: (
            torch.cat([adapter[name][0].float() for adapter in adapters]),
            torch.cat([s * adapter[name][1].float() for s, adapter in zip(scales, adapters, strict=True)], 1),
        )
        for name in adapters[0]
    }


def _layer_size(matrices: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Input and output features of the layer that an adapter's two matrices are for."""
    return matrices[0].shape[1], matrices[1].shape[0]
