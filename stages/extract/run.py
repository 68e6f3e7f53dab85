"""Encodes every utterance that the run needs, in parts of a hundred, and continues after a kill."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common import telemetry
from common.clustering.embeddings import write_table
from common.config import Config
from common.data.batches import BatchLoader, Example, epoch_batches, make_examples
from common.data.corpus import Corpus
from common.data.tokens import load_codec
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from common.pipeline.stage import Context
from common.progress import progress
from common.training.train import make_accelerator
from stages.inputs import embedded_utterances


def run(config: Config, context: Context, *, corpus: Corpus, model: Path, output: Path) -> None:
    """Writes embeddings.npy and ids.json for one shard."""
    accelerator = make_accelerator(config.precision, config.runtime.device)
    size, first = config.extract.shard_size, (context.shard or 0) * config.extract.shard_size
    utterances = embedded_utterances(config, corpus)[first : first + size]
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    examples = make_examples(corpus, utterances, codec, context=config.audio.context, margin=config.audio.margin)
    # Parts hold neighbours in length, so that the batches inside a part are full.
    examples.sort(key=lambda example: (example.positions, example.id))
    every = config.extract.checkpoint_every
    parts = [examples[i : i + every] for i in range(0, len(examples), every)]

    done = {name: tensors for name in context.parts.names() if (tensors := context.parts.load(name)) is not None}
    recogniser = Recogniser(load_whisper(model)).to(accelerator.device).eval()
    loader = BatchLoader(examples, num_workers=config.runtime.num_workers, device=accelerator.device)
    bar = progress(len(examples), "extract", unit="utterances", hidden=config.runtime.quiet)
    for number, part in enumerate(parts):
        name = part_name(every, number)
        if name not in done:
            context.check_stop()
            with torch.inference_mode(), accelerator.autocast():
                done[name] = _encode_part(config, recogniser, loader, part, number * every)
            context.parts.save(name, done[name])
            if config.extract.clear_cache and accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            context.metrics.live.add(telemetry.SAMPLES, len(part))
            context.metrics.live.add(telemetry.AUDIO, sum(example.duration for example in part))
        bar.update(len(part))
        context.metrics.progress(number * every + len(part), len(examples), name="encoding", unit="utterances")
    bar.close()
    _write(output, parts, [done[part_name(every, number)] for number in range(len(parts))])
    context.summary |= {
        "device": accelerator.device.type,
        "utterances": len(examples),
        "audio_seconds": sum(example.duration for example in examples),
    }


def part_name(every: int, number: int) -> str:
    """Name of a part of `every` utterances, so that an attempt with parts of another size does not use it."""
    return f"part-{every}-{number:06d}"


def _encode_part(
    config: Config,
    recogniser: Recogniser,
    loader: BatchLoader,
    part: Sequence[Example],
    first: int,
) -> dict[str, torch.Tensor]:
    batches = epoch_batches(part, batch_size=1, batch_seconds=config.runtime.extract_batch_seconds, shuffle=False)
    vectors: dict[int, torch.Tensor] = {}
    for numbers, batch in zip(batches, loader([[first + n for n in indices] for indices in batches]), strict=True):
        pooled_BD = recogniser.frozen_embedding(batch, layer=config.extract.layer, pooling=config.extract.pooling)
        for row, number in enumerate(numbers):
            vectors[number] = pooled_BD[row].float().cpu()
    return {"vectors": torch.stack([vectors[number] for number in range(len(part))])}


def _write(output: Path, parts: Sequence[Sequence[Example]], tensors: Sequence[dict[str, torch.Tensor]]) -> None:
    ids = [example.id for part in parts for example in part]
    vectors_ND = torch.cat([part_tensors["vectors"] for part_tensors in tensors]).numpy()
    order = np.argsort(ids)
    write_table(output, [ids[i] for i in order], vectors_ND[order])
