"""Small things for tests: a random Whisper of two layers with a byte tokenizer, a corpus of tones."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperForConditionalGeneration

from common.data.corpus import Utterance, write_index

SPECIALS = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
WORDS = ("river", "lamp", "seven", "green", "open", "stone", "under", "paper", "voice", "moon")
CT2_TYPES = {"<f4": 0, "<i1": 1, "<i2": 2, "<i4": 3, "<f2": 4, "<u2": 5}  # the last one holds bfloat16
PITCH = {"typical": 220.0, "low": 110.0, "high": 440.0}  # Hz: "etiologies" that an encoder tells apart


def micro_whisper(folder: Path, *, seed: int = 0) -> Path:
    """A random Whisper checkpoint: width 32, two layers each side, 259 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    end, start = 256, 257
    config = WhisperConfig(
        vocab_size=259,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_target_positions=448,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # the usual initialisation is so small that every utterance looks alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"is_multilingual": False}), encoding="utf-8")
    return folder


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    """Writes 16-bit WAV, of shape (T,) or (T, channels), under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        soundfile.write(file, np.asarray(samples, np.float32), rate, format="WAV", subtype="PCM_16")


def micro_corpus(
    folder: Path, *, speakers: int = 6, utterances: int = 6, seed: int = 0, seconds: float = 0.6, rate: int = 16_000
) -> Path:
    """Tones with noise and two-word texts; speakers are spread over train, dev and test and over three etiologies."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(speakers * len(PITCH)):
        etiology = list(PITCH)[number % len(PITCH)]
        place = number // len(PITCH)
        split = "test" if place == speakers - 1 else "dev" if place == speakers - 2 else "train"
        for take in range(utterances):
            words = generator.choice(WORDS, 2)
            length = seconds * float(generator.uniform(0.7, 1.5))
            time = np.arange(int(length * rate)) / rate
            tone = 0.3 * np.sin(2 * np.pi * PITCH[etiology] * (1 + 0.02 * number) * time)
            name = f"s{number:02d}-{take:02d}"
            write_wav(folder / "audio" / f"{name}.wav", tone + 0.02 * generator.standard_normal(len(time)), rate)
            rows.append(
                Utterance(
                    id=name,
                    audio_filepath=f"audio/{name}.wav",
                    duration=len(time) / rate,
                    text=" ".join(words),
                    split=split,
                    speaker=f"s{number:02d}",
                    etiology=etiology,
                )
            )
    write_index(folder, rows)
    return folder


def ct2_model(variables: Mapping[str, np.ndarray]) -> bytes:
    """The model.bin of a Whisper as CTranslate2 writes it, with the output projection as an alias of the embeddings."""
    parts = [struct.pack("<I", 6), ct2_text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        number = CT2_TYPES[value.dtype.str.replace("|", "<")]
        header = struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, number, value.nbytes)
        parts += [ct2_text(name), header, value.tobytes()]
    alias = ct2_text("decoder/projection/weight") + ct2_text("decoder/embeddings/weight")
    return b"".join([*parts, struct.pack("<I", 1), alias])


def ct2_text(text: str) -> bytes:
    """A string of a model.bin."""
    raw = text.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def heard_texts(opened, batch, decoding) -> list[str]:
    """Text of each utterance of a batch."""
    from common.inference.load_model import transcribe_batch

    return [decoded.text for decoded in transcribe_batch(opened, batch, decoding).decoded]


def greedy(model, hidden_BTD, codec, *, max_new_tokens, slot=None):
    """Tokens of each utterance, the most probable at each step, without prompt and end token."""
    from common.decoding.decode import Decoding, decode_hidden

    decoding = Decoding(len(hidden_BTD), max_new_tokens)
    return [list(decoded.tokens) for decoded in decode_hidden(model, hidden_BTD, codec, decoding, slot)]


def fitted_gate(center_3D, count, generator):
    """A gate of three groups around these centers, and the embeddings on which it was fitted, `count` of each group."""
    import torch

    from common.model.gate import Gate

    label = torch.arange(3).repeat_interleave(count)
    near = center_3D[label] + torch.randn(3 * count, center_3D.shape[1], generator=generator)
    gate = Gate(center_3D.shape[1], 4, 3).eval()
    gate.fit_scale(near)
    gate.fit_centers(near, label)
    gate.calibrate(near)
    return gate, near


def bundle_info(model, *, rank, targets, **changes):
    """What a trained mixture of three experts says of itself."""
    from common.model.bundle import BundleInfo

    values = {
        "base": str(model),
        "base_digest": "",
        "language": "en",
        "task": "transcribe",
        "context": "dynamic",
        "margin": 64,
        "layer": -1,
        "pooling": "mean",
        "adapt": "lora",
        "num_experts": 3,
        "gate": changes.get("num_experts", 3) > 1 and changes.get("adapt") != "full",
        "shared_rank": 0,
        "mixture": "blend",
        "top_k": 2,
        "rank": rank,
        "alpha": 2.0 * rank,
        "targets": targets,
        "within": "",
    }
    return BundleInfo(**(values | changes))


def run_record(**changes: Any) -> dict[str, Any]:
    """A run.json of a run that has made one clustering."""
    key, config = "0" * 32, {"seed": 1, "model": {"name": "m", "language": "en"}, "decode": {}, "corpus": {"path": "c"}}
    made = {"stage": "cluster", "shard": None, "started": 1.0, "seconds": 2.0, "host": "here", "status": "run"}
    return {
        "schema": 1,
        "name": "demo",
        "status": "running",
        "version": "0.1.0",
        "started": 1.0,
        "updated": 2.0,
        "config": config,
        "sources": {"corpus": "sha256:c", "model": "sha256:m"},
        "keys": {"cluster": {"stage": "cluster", "format": 1, "values": {"seed": 1}, "inputs": {"corpus": "c"}}},
        "tasks": {"cluster": {"key": key, "stage": "cluster"}, "experts[0]": {"key": key, "stage": "experts"}},
        "timeline": [made, made | {"stage": "experts", "shard": "0"}],
        **changes,
    }
