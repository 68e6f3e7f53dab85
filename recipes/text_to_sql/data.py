"""Pairs of question and query, and their batches.

Shape letters: B pairs, I input tokens, O output tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.errors import DataError
from recipes.text_to_sql.settings import Settings

IGNORED = -100  # label of a place that carries no loss


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of a question and of its query, each with its end token."""

    inputs: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Padded tensors of B pairs; the mask is true at tokens, labels are IGNORED at padding."""

    inputs_BI: Tensor
    mask_BI: Tensor
    labels_BO: Tensor
    seconds: float = 0.0

    @property
    def weight(self) -> Tensor:
        """Tokens that carry loss."""
        return (self.labels_BO != IGNORED).sum()

    @property
    def padding(self) -> float:
        """Of audio, of which there is none."""
        return 0.0

    def part(self, start: int, stop: int) -> Batch:
        """Pairs start…stop-1."""
        return Batch(self.inputs_BI[start:stop], self.mask_BI[start:stop], self.labels_BO[start:stop])

    def __len__(self) -> int:
        return len(self.inputs_BI)


def file_lines(path: Path, hint: str) -> list[str]:
    """The lines of a text file; the hint ends the message where there is none.

    Raises:
        DataError: there is no such file, or it is no UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: convert it") from None
    return [line.strip() for line in lines]


def read_lines(folder: Path, split: str, kind: str) -> list[str]:
    """The lines of `<split>.nl` or `<split>.sql`.

    Raises:
        DataError: the two files of a split differ in length, or one cannot be read.
    """
    path, other = (folder / f"{split}.{suffix}" for suffix in (kind, "sql" if kind == "nl" else "nl"))
    hint = "--data names a folder with train, dev and test .nl and .sql"
    lines = file_lines(path, hint)
    count = len(file_lines(other, hint)) if other.is_file() else len(lines)
    if len(lines) != count:
        raise DataError(f"{path} has {len(lines)} lines and {other.name} {count}: line n of both belongs together")
    return lines


def find_database(settings: Settings) -> Path:
    """The database that is named, or else the one SQLite file beside the pairs.

    Raises:
        DataError: there is none, or several.
    """
    kinds = ("*.db", "*.sqlite", "*.sqlite3")
    databases = (
        [settings.database] if settings.database else [path for kind in kinds for path in settings.data.glob(kind)]
    )
    if len(databases) != 1 or not databases[0].is_file():
        names = ", ".join(sorted(map(str, databases))) or f"none in {settings.data}"
        raise DataError(f"one SQLite database is needed, found {names}: name it with --database")
    return databases[0]


def make_examples(tokenizer: Any, questions: Sequence[str], queries: Sequence[str] | None = None) -> list[Example]:
    """Tokenised pairs; without queries the labels are empty."""
    inputs = tokenizer(list(questions))["input_ids"]
    labels = tokenizer(list(queries))["input_ids"] if queries is not None else [[]] * len(inputs)
    return [Example(tuple(source), tuple(target)) for source, target in zip(inputs, labels, strict=True)]


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of example numbers, of similar lengths: the same for the same seed and epoch."""
    chance = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    chance.shuffle(order)
    window = 16 * batch_size  # sorted inside: random enough, and little padding
    order = [n for i in range(0, len(order), window) for n in by_length(examples, order[i : i + window])]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    chance.shuffle(batches)
    return batches


def by_length(examples: Sequence[Example], numbers: Sequence[int]) -> list[int]:
    """The numbers, longest query first (longest question where queries are unknown)."""
    return sorted(numbers, key=lambda n: (-len(examples[n].labels), -len(examples[n].inputs)))


def make_loader(examples: Sequence[Example], device: torch.device) -> Callable[[Sequence[list[int]]], Iterator[Batch]]:
    """A function that yields the batches of such lists, on the device."""

    def load(batches: Sequence[list[int]]) -> Iterator[Batch]:
        for numbers in batches:
            inputs = [torch.tensor(examples[n].inputs) for n in numbers]
            labels = [torch.tensor(examples[n].labels) for n in numbers]
            inputs_BI = pad_sequence(inputs, batch_first=True, padding_value=IGNORED)
            labels_BO = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
            mask_BI = inputs_BI != IGNORED
            yield Batch(inputs_BI.clamp_min(0).to(device), mask_BI.to(device), labels_BO.to(device))

    return load
