"""Sizes of models and batches for measurements on a CPU, on a GPU, and for a quick test of all rows."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from common.model.whisper import load_whisper

WEIGHTS = Path("models/whisper-tiny.en")
DEMO = Path("data/demo")
THREADS = 2  # on a CPU
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

# name → (width, layers on each side, heads, vocabulary); the feed-forward width is four times the width.
SHAPES = {
    "micro": (32, 2, 2, 300),
    "tiny.en": (384, 4, 6, 51864),
    "small": (768, 12, 12, 51865),
    "large-v2": (1280, 32, 20, 51865),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of one run of the benchmark.

    Attributes:
        name: `cpu`, `gpu` or `quick`.
        precision: of all training and encoding, ours and the peers'.
        model, dense_model: shapes (`SHAPES`) of the mixture's base model and of the dense fine-tune's.
        experts, top_k, rank: of the mixture.
        batch: utterances in a step of joint training.
        dense_batch, dense_clips: utterances in a batch, and in an epoch, of the dense fine-tune.
        clips: utterances that are encoded, transformed or decoded.
        encode_batch: utterances of one encoding batch of the peers; ours fill as many seconds.
        repetitions: rounds; medians are reported.
        workers: loader processes of both sides.
    """

    name: str
    device: torch.device
    precision: str
    model: str
    dense_model: str
    experts: int
    top_k: int
    rank: int
    batch: int
    dense_batch: int
    dense_clips: int
    clips: int
    encode_batch: int
    repetitions: int
    workers: int

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the peers' weights where nothing is trained: their documentation loads them in the precision of use."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def target(self, cpu: float | None, gpu: float | None) -> float | None:
        """The ratio to reach on this device."""
        return gpu if self.on_gpu else cpu

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision, by autocast: what accelerate does for both sides."""
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with mixed:
            yield

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def words(self, *parts: str) -> str:
        """A row's note: the parts, precision and loader processes."""
        return "; ".join([*parts, self.precision])


def cpu_setting() -> Setting:
    """Whisper tiny.en on two threads."""
    return Setting(
        name="cpu",
        device=torch.device("cpu"),
        precision="fp32",
        model="tiny.en",
        dense_model="tiny.en",
        experts=8,
        top_k=2,
        rank=16,
        batch=4,
        dense_batch=4,
        dense_clips=24,
        clips=48,
        encode_batch=8,
        repetitions=3,
        workers=0,
    )


def gpu_setting() -> Setting:
    """Random weights of large-v2's shape, and of small's for the dense fine-tune."""
    return Setting(
        name="gpu",
        device=torch.device("cuda"),
        precision="bf16",
        model="large-v2",
        dense_model="small",
        experts=8,
        top_k=2,
        rank=16,
        batch=6,  # B·k rows without gradient checkpointing, with two peers' models, in 80 GB
        dense_batch=32,
        dense_clips=1536,
        clips=256,
        encode_batch=32,
        repetitions=5,
        workers=8 if _shared_memory() > 2e9 else 0,
    )


def _shared_memory() -> int:
    """Bytes of shared memory for loader processes; containers often have 64 MB."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def quick_setting() -> Setting:
    """A model of 32 dimensions: every row in seconds."""
    return replace(
        cpu_setting(),
        name="quick",
        model="micro",
        dense_model="micro",
        experts=3,
        rank=4,
        batch=2,
        dense_batch=2,
        dense_clips=6,
        clips=4,
        encode_batch=2,
        repetitions=1,
    )


def make_whisper(shape: str, device: torch.device) -> WhisperForConditionalGeneration:
    """A model of that shape: tiny.en's own weights where `models/` holds them, random ones otherwise."""
    if shape == "tiny.en" and (WEIGHTS / "config.json").is_file():
        return load_whisper(WEIGHTS).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        return WhisperForConditionalGeneration(whisper_config(shape))


def whisper_config(shape: str) -> WhisperConfig:
    """Hugging Face's configuration of a shape; its last three tokens end, start, and forbid timestamps."""
    width, layers, heads, vocabulary = SHAPES[shape]
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    end, start = vocabulary - 3, vocabulary - 2
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=80,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sides,
    )
