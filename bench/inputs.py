"""Noise of given lengths with random tokens, as batches and as files, for time measurements.

Shape letters: B utterances, S samples, U text tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from bench.setting import SHAPES
from common.data.audio import SAMPLE_RATE, Samples
from common.data.batches import Batch, Example, collate
from common.data.features import context_positions

TOKENS_PER_SECOND = 3.0  # of read English in Whisper's vocabulary
MARGIN = 64


def short_lengths(count: int) -> list[float]:
    """Seconds, evenly spread over 3–12 in a fixed random order."""
    lengths = np.linspace(3.0, 12.0, count)
    return [round(float(s), 3) for s in np.random.default_rng(0).permutation(lengths)]


def noise(seconds: float, seed: int) -> Samples:
    """Samples of pink-free, plain white noise."""
    generator = np.random.default_rng(seed)
    return 0.1 * generator.standard_normal(round(seconds * SAMPLE_RATE), dtype=np.float32)


def make_example(shape: str, seconds: float, row: int, *, context: str, path: Path = Path()) -> Example:
    """An utterance of random tokens, about as many as that many seconds of speech have."""
    vocabulary = SHAPES[shape][3]
    end, start, plain = vocabulary - 3, vocabulary - 2, min(vocabulary - 3, 50_000)
    count = max(1, round(seconds * TOKENS_PER_SECOND))
    tokens = np.random.default_rng(row).integers(0, plain, count).tolist()
    return Example(
        id=f"{row:05d}",
        path=path,
        offset=0.0,
        duration=seconds,
        positions=context_positions(seconds, context=context, margin=MARGIN),
        inputs=(start, vocabulary - 1, *tokens),
        labels=(-100, *tokens, end),
        row=row,
    )


def make_batch(shape: str, lengths: Sequence[float], device: torch.device, *, context: str = "30s") -> Batch:
    """One batch; all utterances are padded to the longest one's bucket."""
    examples = [make_example(shape, seconds, i, context=context) for i, seconds in enumerate(lengths)]
    longest = max(examples, key=lambda example: example.positions)
    items = [(example, noise(example.duration, example.row)) for example in examples]
    items.sort(key=lambda item: item[0] is not longest)  # the first decides the batch's length
    batch = collate(items)
    assert isinstance(batch, Batch)
    return batch.to(device)


def write_clips(folder: Path, shape: str, lengths: Sequence[float], *, context: str = "dynamic") -> list[Example]:
    """The same as files of 16-bit samples, ready for `common.data.batches.BatchLoader`."""
    examples = []
    for i, seconds in enumerate(lengths):
        path = folder / f"{i:05d}.wav"
        soundfile.write(path, noise(seconds, i), SAMPLE_RATE, subtype="PCM_16")
        examples.append(make_example(shape, seconds, i, context=context, path=path))
    return examples
