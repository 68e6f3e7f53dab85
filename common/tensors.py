"""Checks of tensors from files: all values are finite, and the names are those of the model."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import DataError

WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FILE_TYPES = ("F64", "F32", "F16", "BF16")  # the same in a safetensors header


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that contains NaN or an infinite number; None where all are finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # NaN comes through; no copy of the tensor's size is made
            if not (math.isfinite(low) and math.isfinite(high)):
                return name
    return None


def check_weights(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses weights that are not floating-point numbers of 16 bits or more, or not all finite.

    Args:
        source: origin of the weights, for the message.

    Raises:
        DataError: there is such a tensor; the message names the first.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_TYPES:
            raise DataError(f"{source}: tensor {name} has type {tensor.dtype}, and weights are float16 to float64")
    if broken := first_not_finite(tensors):
        raise DataError(f"{source}: tensor {broken} contains NaN or infinite numbers: restore the file from its source")


def check_names(present: Iterable[str], expected: Iterable[str], source: str) -> None:
    """Refuses a set of tensors with missing or additional names.

    Raises:
        DataError: a name is missing or additional; the message names the first and gives their number.
    """
    present, expected = set(present), set(expected)
    for names, problem in ((expected - present, "lacks tensor"), (present - expected, "holds tensor")):
        if names:
            count = f" and {len(names) - 1} more" if len(names) > 1 else ""
            place = ", which the model needs" if problem.startswith("lacks") else ", which the model has no place for"
            raise DataError(f"{source} {problem} {min(names)}{count}{place}")


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name, from its header alone.

    Raises:
        DataError: a tensor has a type that weights do not have.
        SafetensorError, OSError: the file cannot be read.
    """
    shapes = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            if part.get_dtype() not in FILE_TYPES:
                raise DataError(f"{path}: tensor {name} has type {part.get_dtype()}, and weights are F16 to F64")
            shapes[name] = tuple(part.get_shape())
    return shapes
