"""Reading the weights of a CTranslate2 model (`model.bin`) with numpy alone.

All little-endian; a string is a u16 length that counts its closing NUL, then the bytes:

    u32 version (6) · string kind of model · u32 revision · u32 number of variables
    each variable:  string name · u8 rank · u32 dims[rank] · u8 dtype · u32 bytes · data
    u32 number of aliases · each alias: string name · string name of the variable that it repeats

A quantised weight `w` has a `w_scale` by which it is divided: one number for int16, one for each row for int8.
"""

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

BINARY_VERSION = 6
SPEC_NAME = "WhisperSpec"
# By CTranslate2's type number. bfloat16 has no numpy type: its bits are read as u16 and widened.
DTYPES = tuple(np.dtype(name) for name in ("<f4", "<i1", "<i2", "<i4", "<f2", "<u2"))
BFLOAT16 = 5
MAX_RANK, MAX_NAME = 8, 300

Array = NDArray[Any]


@dataclass(slots=True)
class Ct2Model:
    """The variables of a model.bin, and which of them have been read.

    Args:
        path: of model.bin, for messages.
        variables: name to array as stored, views of the mapped file.
        used: names read so far.
    """

    path: Path
    variables: dict[str, Array]
    used: set[str] = field(default_factory=set)

    def take(self, name: str) -> Array:
        """The float32 value of a variable: converted, or divided by its scale(s) where it is quantised."""
        self.used |= {name, f"{name}_scale"}
        if name not in self.variables:
            raise DataError(f"{self.path}: no variable {name!r}, which a Whisper model has")
        stored = self.variables[name]
        value = stored.astype(np.float32)
        if stored.dtype.kind == "i":
            if (scale := self.variables.get(f"{name}_scale")) is None:
                raise DataError(f"{self.path}: {name!r} is {stored.dtype.name} but has no {name + '_scale'!r}")
            # One scale for all (int16) or one for each row (int8).
            if not value.ndim or scale.size not in (1, len(value)) or not scale.all():
                raise DataError(f"{self.path}: {name + '_scale'!r} of shape {scale.shape} is no scale of {name!r}")
            value /= scale.astype(np.float32).reshape(-1, *[1] * (value.ndim - 1))
        if not np.isfinite(value).all():
            raise DataError(f"{self.path}: {name!r} contains NaN or infinite numbers")
        return value

    def scalar(self, name: str, default: int) -> int:
        """An integer variable of rank 0."""
        value = self.variables.get(name)
        if value is None:
            return default
        if value.ndim or value.dtype.kind != "i":
            raise DataError(f"{self.path}: {name!r} is {value.dtype.name} of shape {value.shape}, not an integer")
        return int(value)

    def count_layers(self, part: str) -> int:
        """How many layers there are, by the highest number."""
        numbers = {int(m[1]) for name in self.variables if (m := re.match(rf"{part}/layer_([0-9]{{1,4}})/", name))}
        return max(numbers, default=-1) + 1

    def refuse_unused(self) -> None:
        """Raises DataError if a tensor was not read: the model has a part that Whisper has not."""
        unused = [name for name, value in self.variables.items() if value.ndim and name not in self.used]
        if unused:
            raise DataError(f"{self.path}: variable {unused[0]!r} (of {len(unused)}) has no place in a Whisper model")


@dataclass(slots=True)
class _Cursor:
    """A place in a mapped file; every read says what it expects."""

    path: Path
    data: mmap.mmap
    offset: int = 0

    def fail(self, expected: str, actual: object, at: int) -> DataError:
        return DataError(f"{self.path}: expected {expected} at byte {at:,}, found {actual}")

    def advance(self, size: int, expected: str) -> int:
        at, left = self.offset, len(self.data) - self.offset
        if size > left:
            raise self.fail(f"{expected} ({size:,} bytes)", f"{left:,} bytes to the end: the file is cut short", at)
        self.offset += size
        return at

    def number(self, code: str, expected: str) -> int:
        at = self.advance(struct.calcsize(f"<{code}"), expected)
        return int(struct.unpack_from(f"<{code}", self.data, at)[0])

    def string(self, expected: str) -> str:
        size = self.number("H", f"the length of {expected}")
        if size > MAX_NAME:
            raise self.fail(f"the length of {expected}, at most {MAX_NAME}", size, self.offset - 2)
        at = self.advance(size, expected)
        raw = self.data[at : at + size]
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise self.fail(f"{expected} (ASCII, closed by a NUL)", repr(raw[:32]), at)
        return raw[:-1].decode("ascii")


def read_model(path: Path) -> Ct2Model:
    """Maps a CTranslate2 model.bin of a Whisper model.

    Raises:
        DataError: the file is missing, cut short or of another kind; the message names file, offset and expectation.
    """
    try:
        with path.open("rb") as file:
            cursor = _Cursor(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else "the file is empty"
        raise DataError(f"{path}: cannot read the weights of a CTranslate2 model: {reason}") from error
    _read_header(cursor)
    variables = dict(_read_variable(cursor) for _ in range(cursor.number("I", "the number of variables")))
    for _ in range(cursor.number("I", "the number of aliases")):
        alias, at = cursor.string("the name of an alias"), cursor.offset
        target = cursor.string("the name of an aliased variable")
        if target not in variables:
            raise cursor.fail("the name of a variable above", repr(target), at)
        variables[alias] = variables[target]
        if (scale := variables.get(f"{target}_scale")) is not None:  # an alias has the scale of its target too
            variables.setdefault(f"{alias}_scale", scale)
    if cursor.offset != len(cursor.data):
        raise cursor.fail("the end of the file", f"{len(cursor.data) - cursor.offset:,} more bytes", cursor.offset)
    return Ct2Model(path, variables)


def _read_header(cursor: _Cursor) -> None:
    if (version := cursor.number("I", "the format's version")) != BINARY_VERSION:
        raise cursor.fail(f"version {BINARY_VERSION} of CTranslate2's format", version, 0)
    at = cursor.offset
    if (name := cursor.string("the model's kind")) != SPEC_NAME:
        raise cursor.fail(f"the model's kind {SPEC_NAME!r}", repr(name), at)
    cursor.number("I", "the model's revision")


def _read_variable(cursor: _Cursor) -> tuple[str, Array]:
    name = cursor.string("the name of a variable")
    if (rank := cursor.number("B", f"the rank of {name!r}")) > MAX_RANK:
        raise cursor.fail(f"the rank of {name!r}, at most {MAX_RANK}", rank, cursor.offset - 1)
    shape = tuple(cursor.number("I", f"dimension {i} of {name!r}") for i in range(rank))
    if (type_id := cursor.number("B", f"the type of {name!r}")) >= len(DTYPES):
        raise cursor.fail(f"the type of {name!r}, at most {len(DTYPES) - 1}", type_id, cursor.offset - 1)
    dtype, at = DTYPES[type_id], cursor.offset
    wanted = dtype.itemsize * math.prod(shape)
    if (size := cursor.number("I", f"the size of {name!r}")) != wanted:
        raise cursor.fail(f"{wanted:,} bytes for {name!r} of shape {shape}", f"{size:,}", at)
    start = cursor.advance(size, f"the data of {name!r}")
    if not size:  # numpy makes no empty array of a buffer
        return name, np.empty(shape, dtype)
    value = np.frombuffer(cursor.data, dtype, count=size // dtype.itemsize, offset=start).reshape(shape)
    if type_id == BFLOAT16:  # the upper half of a float32
        value = (value.astype(np.uint32) << 16).view(np.float32)
    return name, value
