"""Rows of the frozen encoder: spectrograms and embeddings.

Shape letters: N utterances, D embedding width.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from bench.inputs import make_example, noise, short_lengths, write_clips
from bench.measure import Measurement, rounds, row
from bench.peers import embed_padded
from bench.setting import Setting, make_whisper
from common.data.batches import Batch, BatchLoader, Example, collate, epoch_batches
from common.data.features import log_mel
from common.model.recogniser import Recogniser


def mel_rows(setting: Setting) -> list[Measurement]:
    """From decoded audio to spectrograms on the device: 3–12 s, and 30 s where nobody pads."""
    return [
        _mel_row("3–12 s", short_lengths(setting.clips), setting),
        _mel_row("30 s", [30.0] * max(2, setting.clips // 4), setting),
    ]


def _mel_row(name: str, lengths: Sequence[float], setting: Setting) -> Measurement:
    items = [
        (make_example(setting.model, seconds, i, context="dynamic"), noise(seconds, i))
        for i, seconds in enumerate(lengths)
    ]
    examples, clips = [example for example, _ in items], [clip for _, clip in items]
    batches = epoch_batches(examples, batch_size=setting.encode_batch, shuffle=False)
    extractor = WhisperFeatureExtractor()

    def ours() -> None:
        for numbers in batches:
            batch = collate([items[n] for n in numbers])
            assert isinstance(batch, Batch)
            log_mel(batch.audio_BS.to(setting.device), 80)

    def theirs(where: str) -> None:
        for start in range(0, len(clips), setting.encode_batch):
            part = clips[start : start + setting.encode_batch]
            features = extractor(part, sampling_rate=16_000, return_tensors="pt", device=where)
            features.input_features.to(setting.device)

    steps = {"ours": ours, "theirs": lambda: theirs(setting.device.type)}
    taken = rounds(steps, setting)
    return row(
        f"log-mel, {name}: against WhisperFeatureExtractor",
        len(clips) / taken["ours"],
        len(clips) / taken["theirs"],
        unit="clips/s",
        better="more",
        target=setting.target(2, 20) if name != "30 s" else None,
        note=f"{len(clips)} clips in batches of {setting.encode_batch}, padding included; fp32; both on the "
        f"{setting.device.type}",
    )


def rows(setting: Setting) -> list[Measurement]:
    """Embeddings from audio files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        examples = write_clips(folder, setting.model, short_lengths(setting.clips))
        recogniser = Recogniser(make_whisper(setting.model, setting.device)).eval()
        loader = BatchLoader(examples, num_workers=setting.workers, device=setting.device)
        waits: list[float] = []

        def ours() -> None:
            waits.append(embed(recogniser, examples, loader, setting)[1])

        peer = copy.deepcopy(recogniser.whisper).to(setting.dtype)
        steps: dict[str, Any] = {"ours": ours, "theirs": lambda: embed_padded(peer, examples, setting)}
        taken = rounds(steps, setting)
        wait = 100 * sorted(waits)[len(waits) // 2]
        return [
            row(
                "embedding extraction, 3–12 s: against the padded transformers encoder",
                len(examples) / taken["ours"],
                len(examples) / taken["theirs"],
                unit="clips/s",
                better="more",
                target=setting.target(3, 3),
                note=setting.words(
                    f"{setting.model}, {len(examples)} files, batches of {30 * setting.encode_batch} s",
                    f"ours waits {wait:.1f}% of the time for data",
                ),
            ),
        ]


def embed(
    recogniser: Recogniser, examples: Sequence[Example], loader: BatchLoader, setting: Setting
) -> tuple[Tensor, float]:
    """Pooled embeddings as `stages/extract` makes them, and the share of the time spent waiting for data."""
    batches = epoch_batches(examples, batch_size=1, batch_seconds=30 * setting.encode_batch, shuffle=False)
    vectors: list[Tensor] = []
    started, waited = time.perf_counter(), 0.0
    loaded = loader(batches)
    with torch.inference_mode(), setting.autocast():
        while True:
            asked = time.perf_counter()
            batch = next(loaded, None)
            setting.synchronize()
            waited += time.perf_counter() - asked
            if batch is None:
                break
            vectors.append(recogniser.frozen_embedding(batch, layer=-1, pooling="mean"))
            setting.synchronize()
    order = torch.tensor([n for numbers in batches for n in numbers]).argsort()
    return torch.cat(vectors)[order.to(setting.device)], waited / (time.perf_counter() - started)
