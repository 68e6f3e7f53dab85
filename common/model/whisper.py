"""Functions on the transformers modules of Whisper: loading, encoding at short context, losses, pooled embeddings.

Shape letters: B utterances, M mel bands, F mel frames, T encoder positions, U text tokens, D model width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import WhisperForConditionalGeneration
from transformers.utils import logging as transformers_logging

from common.data.tokens import IGNORED, generation_settings, whisper_config
from common.errors import DataError
from common.model.audio_context import ATTENTION, add_stand_ins, use_short_context
from common.tensors import check_names, check_weights, file_shapes


def load_whisper(folder: Path, *, dtype: torch.dtype = torch.float32) -> WhisperForConditionalGeneration:
    """Loads a Whisper checkpoint in Hugging Face's format.

    Raises:
        DataError: the folder is not such a checkpoint, or its weights are damaged, have missing or additional tensors,
            or are not all finite.
    """
    transformers_logging.disable_progress_bar()
    config, source = whisper_config(folder), f"model {folder}"
    if "quantization_config" in config:
        raise DataError(f"{source} is quantised: give the checkpoint that it was made from")
    generation_settings(folder)  # read by transformers below; its own errors do not name the file
    try:
        _check_sizes(folder, config)
        model, info = WhisperForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except DataError:
        raise
    except Exception as error:  # transformers raises errors of many types for a config.json that makes no sense
        raise DataError(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    for name, shape, expected in info["mismatched_keys"]:
        raise DataError(f"{source}: tensor {name} has shape {tuple(shape)}, and by config.json {tuple(expected)}")
    check_names(info["unexpected_keys"], info["missing_keys"], source)
    check_weights(model.state_dict(), source)
    return model


# Sizes in config.json → where they are seen in the weights: end of a tensor's name, and which of its dimensions.
_SIZES = {
    "d_model": ("decoder.embed_tokens.weight", 1),
    "vocab_size": ("decoder.embed_tokens.weight", 0),
    "num_mel_bins": ("encoder.conv1.weight", 1),
    "max_source_positions": ("encoder.embed_positions.weight", 0),
    "max_target_positions": ("decoder.embed_positions.weight", 0),
    "encoder_ffn_dim": ("encoder.layers.0.fc1.weight", 0),
    "decoder_ffn_dim": ("decoder.layers.0.fc1.weight", 0),
}


def _check_sizes(folder: Path, config: Mapping[str, Any]) -> None:
    """Compares config.json with the headers of the weights, before memory is allocated for the model.

    Raises:
        DataError: they differ, or a tensor is missing.
    """
    whole = Path(folder) / "model.safetensors"
    paths = [whole] if whole.is_file() else sorted(Path(folder).glob("*.safetensors"))
    shapes = {name.removeprefix("model."): shape for path in paths for name, shape in file_shapes(path).items()}
    for name, (tensor, axis) in _SIZES.items():
        shape = shapes.get(tensor, ())
        if axis >= len(shape):
            raise DataError(f"model {folder} lacks tensor model.{tensor}, or its shape {shape} is too short")
        if config.get(name, shape[axis]) != shape[axis]:
            raise DataError(f"model {folder}: config.json says {name} {config[name]!r}, its weights {shape[axis]}")
    for part in ("encoder", "decoder"):
        layers = len({name.split(".")[2] for name in shapes if name.startswith(f"{part}.layers.")})
        if config.get(f"{part}_layers", layers) != layers:
            raise DataError(
                f"model {folder}: config.json says {part}_layers {config[f'{part}_layers']!r}, not {layers}"
            )
        heads, width = config.get(f"{part}_attention_heads", 1), shapes["decoder.embed_tokens.weight"][1]
        if heads not in range(1, width + 1):
            raise DataError(f"model {folder}: config.json says {part}_attention_heads {heads!r}")


def encode(
    model: WhisperForConditionalGeneration,
    mel_BMF: Tensor,
    *,
    layer: int = -1,
    gradient_checkpointing: bool = False,
    copies: int = 1,
) -> Tensor:
    """Runs the encoder at the length of its input instead of 30 s (`model.audio_context`).

    Args:
        model: with or without mixtures in its layers.
        mel_BMF: F a multiple of 2, at most 3000; below that, the last ones are silence.
        layer: -1 all layers and the final norm; 0 the convolutions alone; n the output of the n-th block, unnormed.
        gradient_checkpointing: recompute blocks in the backward pass (gradient checkpointing).
        copies: number of copies of each utterance, for separate experts; the convolutions, which have no experts, run
            once.

    Returns:
        hidden_BTD of B · copies rows: F / 2 positions, and stand-ins for the silence after them.

    Raises:
        DataError: the encoder has no such layer.
    """
    encoder = model.model.encoder
    _check_layers(model, [layer])
    use_short_context(model)
    x_BDT = F.gelu(encoder.conv1(mel_BMF.to(encoder.conv1.weight.dtype)))
    x_BTD: Tensor = F.gelu(encoder.conv2(x_BDT)).transpose(1, 2)
    x_BTD = add_stand_ins(x_BTD, encoder.embed_positions.weight)
    x_BTD = x_BTD.repeat_interleave(copies, 0) if copies > 1 else x_BTD
    for block in encoder.layers if layer == -1 else encoder.layers[:layer]:
        x_BTD = (
            checkpoint(_run_block, block, x_BTD, use_reentrant=False)
            if gradient_checkpointing
            else _run_block(block, x_BTD)
        )
    normed_BTD: Tensor = encoder.layer_norm(x_BTD) if layer == -1 else x_BTD
    return normed_BTD


def encode_layers(model: WhisperForConditionalGeneration, mel_BMF: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The result of `encode` for each of several layers, in one pass.

    Raises:
        DataError: the encoder does not have all of these layers.
    """
    encoder = model.model.encoder
    _check_layers(model, layers)
    outputs = {0: encode(model, mel_BMF, layer=0)}
    x_BTD, last = outputs[0], len(encoder.layers) if -1 in layers else max(layers)
    for number, block in enumerate(encoder.layers[:last], start=1):
        x_BTD = _run_block(block, x_BTD)
        if number in layers:
            outputs[number] = x_BTD
    if -1 in layers:
        outputs[-1] = encoder.layer_norm(x_BTD)
    return {layer: outputs[layer] for layer in layers}


def _check_layers(model: WhisperForConditionalGeneration, layers: Sequence[int]) -> None:
    """Raises DataError if the encoder does not have all of these layers."""
    count = len(model.model.encoder.layers)
    for layer in layers:
        if not -1 <= layer <= count:
            raise DataError(
                f"layer {layer} (extract.layer): the encoder has {count} blocks; give 0 to {count}, or -1 for the last "
                "after its norm"
            )


def _run_block(block: nn.Module, x_BTD: Tensor) -> Tensor:
    out: Tensor | tuple[Tensor, ...] = block(x_BTD, None)
    return out[0] if isinstance(out, tuple) else out


def token_losses(
    model: WhisperForConditionalGeneration, hidden_BTD: Tensor, inputs_BU: Tensor, labels_BU: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each utterance, with logits computed for labelled positions only.

    Args:
        hidden_BTD: encoder output.
        inputs_BU, labels_BU: from `TextCodec.pair`, padded with the end token and IGNORED.

    Returns:
        (loss_B summed over the utterance's tokens, count_B of its tokens).
    """
    decoded_BUD = model.model.decoder(
        input_ids=inputs_BU, encoder_hidden_states=hidden_BTD, use_cache=False
    ).last_hidden_state
    wanted_BU = labels_BU != IGNORED
    # The projection to V is the largest product of a small model: padding must not pay for it.
    logits_NV = model.proj_out(decoded_BUD[wanted_BU])
    loss_N = F.cross_entropy(logits_NV.float(), labels_BU[wanted_BU], reduction="none")
    row_N = wanted_BU.nonzero()[:, 0]
    loss_B = torch.zeros(len(labels_BU), device=loss_N.device).index_add(0, row_N, loss_N)
    return loss_B, wanted_BU.sum(1)


def pool(hidden_BTD: Tensor, valid_B: Tensor, method: str = "mean") -> Tensor:
    """One embedding per utterance, over its own frames only.

    Args:
        valid_B: positions that the utterance covers; later ones are padding.
        method: `mean`, `max`, or `meanstd` (both, of width 2D).
    """
    position_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
    mask_BT1 = (position_T < valid_B[:, None]).unsqueeze(2)
    hidden_BTD = hidden_BTD.float()
    if method == "max":
        return hidden_BTD.masked_fill(~mask_BT1, -torch.inf).amax(1)
    count_B1 = valid_B[:, None].float()
    mean_BD = (hidden_BTD * mask_BT1).sum(1) / count_B1
    if method == "mean":
        return mean_BD
    square_BD = ((hidden_BTD - mean_BD[:, None]).square() * mask_BT1).sum(1) / count_B1
    return torch.cat([mean_BD, square_BD.sqrt()], 1)
