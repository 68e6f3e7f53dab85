"""Search for the largest batch: tries steps of joint training with the configured model on this machine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.clustering.embeddings import EmbeddingTable
from common.config import Config
from common.data.batches import Batch
from common.data.tokens import whisper_config
from common.errors import DataError
from common.training.batch_search import memory_limit, training_rows
from common.training.train import make_accelerator
from common.whisper_limits import MAX_SECONDS
from stages.inputs import base_model

MOST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Fit:
    """Result of the search: utterances of 30 s per batch, their total seconds, and the allowed bytes."""

    rows: int
    batch_seconds: float
    memory: int
    device: str


def fit_batch(config: Config, cache: Path, *, tokens: int, memory: int | None = None) -> Fit:
    """Searches the largest batch of joint training, in its worst case: all utterances of 30 s with long texts.

    Args:
        cache: folder for a downloaded model.
        tokens: text tokens of each utterance.
        memory: maximum bytes to use; by default nine tenths of the available memory.

    Raises:
        DataError: a single utterance does not fit.
    """
    from stages.asr.build import build, parameter_groups

    accelerator = make_accelerator(config.precision, config.runtime.device)
    device = accelerator.device
    folder = base_model(config, cache)
    width = whisper_config(folder)["d_model"]
    table = EmbeddingTable(("0",), np.random.default_rng(0).standard_normal((1, width)).astype(np.float32))
    recogniser = build(config, folder, table, [], []).to(device).train()
    if recogniser.gate is not None:
        recogniser.embeddings_ND = torch.from_numpy(table.vectors_ND).to(device)
    optimizer = torch.optim.AdamW([{**group, "lr": 1e-5} for group in parameter_groups(recogniser, config)])

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss, _ = recogniser(batch)
        loss.backward()
        optimizer.step()

    allowed = memory or memory_limit(device)
    rows = training_rows(step, device, tokens=tokens, memory=allowed, limit=MOST_ROWS)
    if not rows:
        raise DataError(
            f"not even one utterance of {MAX_SECONDS:.0f} s fits into {allowed / 2**30:.1f} GiB on {device}: use "
            "--gradient-checkpointing, a smaller base model or another GPU"
        )
    return Fit(rows, rows * MAX_SECONDS, allowed, str(device))
