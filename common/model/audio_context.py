"""A short audio context in which a few positions stand for all the silence up to 30 s.

Whisper was trained on windows of 30 s, so the attention of its encoder, and of its decoder to the encoder, expects the
silence after an utterance. Without it, hallucination loops are frequent. All of its positions are the same vector but
for the position embedding, so a few of them, evenly spread, stand for the others: log n is added to the attention
logits of a position that stands for n (proportional attention: Bolya et al. 2022, arXiv:2210.09461).

Shape letters: B utterances, T positions of the utterance and its margin, S stand-ins, P positions of the window, D
width, H heads, Q queries, K = T + S keys, W one head's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, WhisperForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

STAND_INS = 8  # S; 16 to 128 are no better, 4 leave hallucination loops (docs/audio-context.md)
EDGE = 4  # positions before the end of the audio at which a convolution sees nothing but silence
ATTENTION = "short_context"


def add_stand_ins(features_BTD: Tensor, positions_PD: Tensor) -> Tensor:
    """Adds position embeddings to the convolutions' output, and the positions that stand for the silence after it.

    Args:
        features_BTD: output of the convolutions; its last positions are silence if T < P.
        positions_PD: position embeddings of the whole window.

    Returns:
        (B, min(T + S, P), D).
    """
    length, window = features_BTD.shape[1], len(positions_PD)
    embedded_BTD = features_BTD + positions_PD[:length]
    count = min(STAND_INS, window - length)
    if not count:
        return embedded_BTD
    middles = [length + (2 * i + 1) * (window - length) // (2 * count) for i in range(count)]
    silence_B1D = features_BTD[:, -EDGE : 1 - EDGE]
    return torch.cat([embedded_BTD, silence_B1D + positions_PD[middles]], 1)


def attention_bias(keys: int, window: int, like: Tensor) -> Tensor | None:
    """bias_K of the attention logits: log of the number of positions that each key stands for; None if all are one."""
    if keys >= window:
        return None
    # As a tensor's logarithm: of a number, a compiled block would be compiled again for each length.
    each_S = torch.full((STAND_INS,), (window - keys) / STAND_INS + 1, device=like.device)
    return F.pad(each_S.log().to(like.dtype), (keys - STAND_INS, 0))


def use_short_context(model: WhisperForConditionalGeneration) -> None:
    """Makes a model that was loaded elsewhere expect stand-ins in encoder output that is shorter than the window.

    Another choice than transformers' default is left as it is: the benchmark compares with eager attention.
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def _attend(
    module: Any,
    query_BHQW: Tensor,
    key_BHKW: Tensor,
    value_BHKW: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a Whisper layer, in the form in which transformers calls it."""
    if not module.is_causal:  # of the encoder, or of the decoder to it
        bias_K = attention_bias(key_BHKW.shape[2], module.config.max_source_positions, query_BHQW)
        attention_mask = None if bias_K is None else bias_K[None, None, None]
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query_BHQW, key_BHKW, value_BHKW, attention_mask, **options
    )
    return out


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
