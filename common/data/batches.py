"""From utterances to batches: length buckets, a sampler that is a pure function of (seed, epoch), a loader.

Shape letters: B utterances, S samples, U text tokens.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.data.audio import Samples, read_audio
from common.data.clips import Clip
from common.data.corpus import Corpus, Utterance
from common.data.features import POSITIONS_PER_SECOND, SAMPLES_PER_POSITION, context_positions, valid_positions
from common.data.tokens import IGNORED, TextCodec, text_bucket
from common.errors import DataError, MoeAsrError, RetryableError
from common.signals import signals_held, stop_with
from common.whisper_limits import MAX_SECONDS, MAX_TOKENS, is_too_long

REQUESTS = 8  # of a process at once, to the store that holds the audio


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised utterance, ready for batching.

    Attributes:
        path: its audio; `offset` and `duration` in seconds choose a part.
        clip: location of the audio if it is not a plain file at `path`.
        positions: encoder length of its bucket.
        inputs, labels: decoder tokens (`TextCodec.pair`).
        row: its row in tables with one row per example (embeddings).
    """

    id: str
    path: Path
    offset: float
    duration: float
    positions: int
    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    row: int
    clip: Clip | None = None

    def read(self) -> Samples:
        """Its samples at 16 kHz, from its file or its shard.

        Raises:
            DataError: as `read_audio` raises.
        """
        source, name = (self.clip.read(), self.clip.label) if self.clip else (self.path, None)
        return read_audio(source, offset=self.offset, duration=self.duration, name=name)


TENSORS = ("audio_BS", "valid_B", "inputs_BU", "labels_BU", "row_B")


@dataclass(frozen=True)
class Batch:
    """Padded tensors of B utterances of one bucket.

    Attributes:
        audio_BS: float32 samples, zero-padded to the bucket's length.
        valid_B: encoder positions that hold speech.
        inputs_BU, labels_BU: decoder tokens; labels are IGNORED where they carry no loss.
        row_B: `Example.row`.
        seconds: of speech, without padding.
    """

    ids: tuple[str, ...]
    audio_BS: Tensor
    valid_B: Tensor
    inputs_BU: Tensor
    labels_BU: Tensor
    row_B: Tensor
    seconds: float

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's loader calls this method, since it can pin only tensors and
        containers.
        """
        return replace(self, **{name: getattr(self, name).pin_memory() for name in TENSORS})

    def part(self, start: int, stop: int) -> Batch:
        """The batch of utterances start…stop-1; seconds are divided in proportion."""
        share = (stop - start) / len(self.ids)
        parts = {name: getattr(self, name)[start:stop] for name in TENSORS}
        return replace(self, ids=self.ids[start:stop], seconds=self.seconds * share, **parts)

    @property
    def weight(self) -> Tensor:
        """Number of tokens with loss, by which the loss of this batch is divided."""
        return (self.labels_BU != IGNORED).sum()

    @property
    def padding(self) -> float:
        """Share of encoder positions that contain no speech."""
        positions = self.audio_BS.shape[1] // SAMPLES_PER_POSITION
        return 1 - self.seconds * POSITIONS_PER_SECOND / (positions * len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)


def make_examples(
    corpus: Corpus,
    utterances: Sequence[Utterance],
    codec: TextCodec,
    *,
    context: str,
    margin: int,
    stretch: float = 1.0,
) -> list[Example]:
    """Tokenises and buckets utterances.

    Args:
        stretch: factor by which augmentation can lengthen utterances; buckets leave room for it.

    Raises:
        DataError: an utterance is over 30 s, or its text is over 448 tokens, is empty, or contains one of Whisper's
            special tokens, such as `<|startoftranscript|>`.
    """
    examples: list[Example] = []
    for utterance in utterances:
        if is_too_long(utterance.duration):
            raise DataError(
                f"utterance {utterance.id} lasts {utterance.duration:.2f} s, over Whisper's {MAX_SECONDS:.0f} s: "
                "`moe-asr corpus segment` cuts such utterances at pauses (nothing is ever truncated)"
            )
        inputs, labels = codec.pair(utterance.text)
        if not utterance.text.strip() or len(inputs) > MAX_TOKENS:
            problem = "has no text" if not utterance.text.strip() else f"has {len(inputs)} tokens, over {MAX_TOKENS}"
            raise DataError(
                f"utterance {utterance.id} {problem}: correct or remove it (`moe-asr corpus audit` finds all)"
            )
        if any(label >= codec.end for label in labels[:-1]):
            raise DataError(
                f"utterance {utterance.id}: its text contains a special token, such as <|startoftranscript|> or "
                "<|0.00|>: remove it"
            )
        examples.append(
            Example(
                id=utterance.id,
                path=corpus.path(utterance),
                offset=utterance.offset,
                duration=utterance.duration,
                positions=context_positions(utterance.duration * stretch, context=context, margin=margin),
                inputs=tuple(inputs),
                labels=tuple(labels),
                row=len(examples),
                clip=corpus.clip(utterance),
            )
        )
    return examples


def epoch_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    batch_seconds: float | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
) -> list[list[int]]:
    """Batches of example numbers for one epoch, each of one bucket: the same for the same seed and epoch.

    Args:
        batch_size: utterances per batch, unless `batch_seconds` is given.
        batch_seconds: padded seconds of audio per batch; at least one utterance. Buckets then have two dimensions:
            utterances in a batch also have texts of similar length.
        batch_tokens: with `batch_seconds`, maximum number of padded text tokens per batch, since long texts need memory
            too.
        shuffle: random order; otherwise the longest bucket comes first, so that a batch too large for the memory fails
            at once.
    """
    order = list(range(len(examples)))
    generator = random.Random(f"{seed}/{epoch}")
    if shuffle:
        generator.shuffle(order)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)  # (encoder positions, text tokens) → numbers
    for number in order:
        # Batches of a given size are few in a small corpus: two dimensions would leave many of them half empty.
        text = 0 if batch_seconds is None else text_bucket(len(examples[number].inputs))
        buckets[examples[number].positions, text].append(number)
    batches: list[list[int]] = []
    for (positions, text), numbers in sorted(buckets.items(), reverse=True):
        size = batch_size
        if batch_seconds is not None:
            size = max(1, int(batch_seconds * POSITIONS_PER_SECOND / positions))
            if batch_tokens is not None:
                size = max(1, min(size, batch_tokens // text))
        numbers = _sort_in_windows(numbers, examples, 8 * size) if shuffle else numbers
        batches += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    if shuffle:
        generator.shuffle(batches)
    return batches


def _sort_in_windows(numbers: list[int], examples: Sequence[Example], window: int) -> list[int]:
    """Sorts by text length within windows of the shuffled order, which keeps the order random and padding low."""
    windows = (numbers[i : i + window] for i in range(0, len(numbers), window))
    return [n for part in windows for n in sorted(part, key=lambda n: len(examples[n].inputs))]


class AudioDataset(Dataset["Loaded"]):
    """Reads the examples' audio, from a store several at a time; picklable, so that loader processes can hold it."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.remote = any(example.clip is not None and example.clip.remote is not None for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Loaded:
        example = self.examples[number]
        try:
            return example, example.read()
        except MoeAsrError as error:  # a loader process would bury the message in its traceback
            return example, error

    def __getitems__(self, numbers: Sequence[int]) -> list[Loaded]:
        if not self.remote:
            return [self[number] for number in numbers]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(self.__getitem__, numbers))

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Puts audio into the cache; errors are ignored, since they occur again when the audio is read."""

        def read(number: int) -> None:
            clip = self.examples[number].clip
            if clip is not None and clip.remote is not None and clip.remote.cache.limit:
                with suppress(MoeAsrError):
                    clip.read()

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(read, numbers))


Loaded = tuple[Example, np.ndarray | MoeAsrError]


def collate(items: Sequence[Loaded]) -> Batch | MoeAsrError:
    """Pads examples of one bucket to the bucket's length and the longest text; or the first error."""
    for _, audio in items:
        if isinstance(audio, MoeAsrError):
            return audio
    examples = [example for example, _ in items]
    samples = examples[0].positions * SAMPLES_PER_POSITION
    longest = max(len(example.inputs) for example in examples)
    audio_BS = torch.zeros(len(items), samples)
    inputs_BU = torch.full((len(items), longest), examples[0].labels[-1])
    labels_BU = torch.full((len(items), longest), IGNORED)
    for i, (example, audio) in enumerate(items):
        assert not isinstance(audio, MoeAsrError)
        audio = audio[:samples]  # durations are rounded in the index: a few samples may overhang the 30 s
        audio_BS[i, : len(audio)] = torch.from_numpy(audio)
        inputs_BU[i, : len(example.inputs)] = torch.tensor(example.inputs)
        labels_BU[i, : len(example.labels)] = torch.tensor(example.labels)
    return Batch(
        ids=tuple(example.id for example in examples),
        audio_BS=audio_BS,
        valid_B=torch.tensor([valid_positions(example.duration) for example in examples]),
        inputs_BU=inputs_BU,
        labels_BU=labels_BU,
        row_B=torch.tensor([example.row for example in examples]),
        seconds=sum(example.duration for example in examples),
    )


class BatchLoader:
    """Reads batches ahead of time by processes that live as long as the loader.

    Args:
        examples: the examples to which the numbers in batches refer.
        num_workers: number of loader processes, at most the number of cores; 0 reads in this process.
        device: device of the batches; pinned memory is used for CUDA.
    """

    def __init__(self, examples: Sequence[Example], *, num_workers: int, device: torch.device) -> None:
        num_workers = min(num_workers, len(os.sched_getaffinity(0)))
        self.device = device
        self._batches: list[list[int]] = []
        self._dataset = AudioDataset(examples)
        self._loader: DataLoader[Loaded] = DataLoader(
            self._dataset,
            batch_sampler=_Replaceable(self._batches),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if num_workers else None,
            persistent_workers=num_workers > 0,
            worker_init_fn=partial(_start_worker, dict(os.environ), os.getpid()),
            generator=torch.Generator(),  # otherwise every epoch and resume would use the model's random state
            multiprocessing_context="forkserver" if num_workers else None,
        )

    def __call__(self, batches: Sequence[list[int]]) -> Iterator[Batch]:
        """Yields these batches in order, on the device.

        Raises:
            DataError: an audio file cannot be read; the message is that of the reader.
            StoreError, RetryableError: the store cannot provide it.
            RetryableError: a loader process was killed.
        """
        self._batches[:] = batches
        alone = bool(batches) and self._dataset.remote and self._loader.num_workers == 0
        with signals_held() if self._loader.num_workers else nullcontext():  # what is started inherits the mask
            loaded = self._with_next_brought(batches) if alone else iter(self._loader)
        while True:
            try:
                batch = next(loaded, None)
            except (RuntimeError, EOFError, ConnectionError) as error:  # the latter where it is killed while it sends
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                message = "a loader process was killed, possibly out of memory: use fewer --num-workers"
                raise RetryableError(f"{message} ({str(error) or type(error).__name__})") from None
            if batch is None:
                return
            if isinstance(batch, MoeAsrError):
                raise batch
            yield batch.to(self.device)

    def _with_next_brought(self, batches: Sequence[list[int]]) -> Iterator[Batch | MoeAsrError]:
        """Without loader processes: fetches a batch's audio from the store while the previous batch is in use."""
        loaded = iter(self._loader)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._dataset.read_ahead, batches[0])
            for following in [*batches[1:], []]:
                coming.result()
                batch = next(loaded)
                coming = pool.submit(self._dataset.read_ahead, following)
                yield batch


class _Replaceable(Sampler[list[int]]):
    """A batch sampler over a list that its owner refills between epochs, so that loader processes can persist."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def _start_worker(environment: Mapping[str, str], owner: int, _: int) -> None:
    """Sets one thread and this process's environment: the server that forks workers has the environment of the first
    loader.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    stop_with(owner)
