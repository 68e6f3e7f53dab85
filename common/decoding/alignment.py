"""Times of the words of a text, from the model's cross-attention to the audio.

The text is passed through the decoder (teacher forcing); the weights of its cross-attention are normalised, smoothed
and averaged over heads, and dynamic time warping finds the monotone path with the highest attention. The method is that
of word timestamps in openai/whisper (`timing.py`); the code is our own.

Shape letters: B utterances, U tokens, T encoder positions, H attention heads, D model width, W one head's width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from common.data.features import POSITIONS_PER_SECOND
from common.data.tokens import GENERATION, TextCodec
from common.errors import DataError
from common.text import unspaced

SMOOTHING = 7  # positions of the median filter over time
OPENING = frozenset("\"'([“‘«-")  # with a space before: they begin a word
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokens decode to that hold part of a character


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a text with its start and end, in seconds."""

    text: str
    start: float
    end: float


def alignment_heads(model: WhisperForConditionalGeneration) -> dict[int, list[int]]:
    """Layer → heads whose attention follows the audio: those named by the checkpoint, or all heads of the upper half.

    Raises:
        DataError: the checkpoint names heads that it does not have.
    """
    named = getattr(model.generation_config, "alignment_heads", None)
    config = model.config
    known = [[i, k] for i in range(config.decoder_layers) for k in range(config.decoder_attention_heads)]
    if named and not (isinstance(named, list) and all(pair in known for pair in named)):
        path = f"{model.name_or_path}/{GENERATION}"
        raise DataError(f"{path}: alignment_heads {named!r:.80} are not the model's: remove them")
    pairs = named or [
        (layer, head)
        for layer in range(config.decoder_layers // 2, config.decoder_layers)
        for head in range(config.decoder_attention_heads)
    ]
    return {
        layer: sorted({h for other, h in pairs if other == layer}) for layer in sorted({layer for layer, _ in pairs})
    }


@torch.inference_mode()
def align(
    model: WhisperForConditionalGeneration,
    hidden_BTD: Tensor,
    valid_B: Sequence[int],
    codec: TextCodec,
    texts: Sequence[Sequence[int]],
) -> list[NDArray[np.float64]]:
    """The time at which each token begins, and the end of the last token.

    Args:
        hidden_BTD: encoder output; the slot must hold its routing.
        valid_B: positions that hold audio.
        texts: tokens of each utterance, without prompt, timestamps and end token.

    Returns:
        For each utterance, times in seconds that never decrease, one more than it has tokens.
    """
    prompt = len(codec.prompt)
    rows = [[*codec.prompt, *tokens, codec.end] for tokens in texts]
    longest = max(len(row) for row in rows)
    inputs_BU = torch.tensor([row + [codec.end] * (longest - len(row)) for row in rows], device=hidden_BTD.device)
    with _watched(model) as seen:
        model.model.decoder(input_ids=inputs_BU, encoder_hidden_states=hidden_BTD, use_cache=False)
    times = []
    for number, (tokens, valid) in enumerate(zip(texts, valid_B, strict=True)):
        # The query at a token predicts the next token: that of the prompt's last token belongs to the text's first.
        weights_HUT = torch.cat([_weights(q[number], k[number], valid) for q, k in seen])
        score_UT = attention_score(weights_HUT[:, : prompt + len(tokens) + 1])[prompt - 1 : prompt + len(tokens)]
        times.append(monotone_path(score_UT.double().cpu().numpy()) / POSITIONS_PER_SECOND)
    return times


@contextmanager
def _watched(model: WhisperForConditionalGeneration) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (query_BHUW, key_BHTW) of each layer's alignment heads while the decoder runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    outputs: dict[tuple[int, str], Tensor] = {}
    handles = []

    def keep(layer: int, heads: list[int], name: str) -> None:
        attention = model.model.decoder.layers[layer].encoder_attn
        width = attention.head_dim

        def hook(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
            split_BHNW = output.view(*output.shape[:2], -1, width).transpose(1, 2)[:, heads]
            outputs[layer, name] = split_BHNW.float() * (attention.scaling if name == "q_proj" else 1)

        handles.append(getattr(attention, name).register_forward_hook(hook))

    chosen = alignment_heads(model)
    for layer, heads in chosen.items():
        keep(layer, heads, "q_proj")
        keep(layer, heads, "k_proj")
    try:
        yield seen
        seen += [(outputs[layer, "q_proj"], outputs[layer, "k_proj"]) for layer in chosen]
    finally:
        for handle in handles:
            handle.remove()


def _weights(query_HUW: Tensor, key_HTW: Tensor, valid: int) -> Tensor:
    """Attention weights over the audio only, without the padding after it."""
    return (query_HUW @ key_HTW[:, :valid].transpose(1, 2)).softmax(2)


def attention_score(weights_HUT: Tensor) -> Tensor:
    """Attention of each token to each position, normalised over all tokens and smoothed: score_UT."""
    deviation_H1T, mean_H1T = torch.std_mean(weights_HUT, dim=1, keepdim=True, unbiased=False)
    scaled_HUT = (weights_HUT - mean_H1T) / deviation_H1T.clamp_min(1e-9)
    if (positions := scaled_HUT.shape[2]) > SMOOTHING // 2:
        padded_HUT = F.pad(scaled_HUT, (SMOOTHING // 2, SMOOTHING // 2), mode="reflect")
        scaled_HUT = padded_HUT.unfold(2, SMOOTHING, 1).median(3).values
    assert scaled_HUT.shape[2] == positions
    return scaled_HUT.mean(0)


def monotone_path(score_UT: NDArray[np.float64]) -> NDArray[np.int64]:
    """Dynamic time warping: the monotone path with the highest sum from the first corner to the last.

    A step goes to the next position, the next token, or both. The best score at token u and position t is the maximum
    over the positions at which the path can enter token u, plus the scores since then: each token needs one pass of
    running maxima.

    Returns:
        The first position of each token.
    """
    tokens, positions = score_UT.shape
    entered_UT = np.zeros((tokens, positions), np.int64)  # where token u was entered, if the path is at t
    from_before_UT = np.zeros((tokens, positions), bool)  # whether it was entered from the position before
    best_T = np.cumsum(score_UT[0])
    for u in range(1, tokens):
        diagonal_T = np.concatenate([[-np.inf], best_T[:-1]])
        from_before_UT[u] = diagonal_T >= best_T
        total_T = np.cumsum(score_UT[u])
        gain_T = np.maximum(diagonal_T, best_T) - (total_T - score_UT[u])
        highest_T = np.maximum.accumulate(gain_T)
        entered_UT[u] = np.maximum.accumulate(np.where(gain_T == highest_T, np.arange(positions), 0))
        best_T = highest_T + total_T
    starts_U = np.zeros(tokens, np.int64)
    t = positions - 1
    for u in range(tokens - 1, 0, -1):
        t = int(entered_UT[u, t])
        starts_U[u] = t
        t -= int(from_before_UT[u, t])
    return starts_U


def words_of(codec: TextCodec, tokens: Sequence[int], times_U: NDArray[np.float64], language: str) -> list[Word]:
    """Groups tokens into words; punctuation belongs to the preceding word, an opening quote to the following word.

    Args:
        times_U: from `align`.
        language: some are written without spaces; there every character is a word, and keeps a space before it.
    """
    spaced = not unspaced(language)
    starts = _word_starts(codec, tokens, spaced=spaced)
    words: list[Word] = []
    for first, last in pairwise([*starts, len(tokens)]):
        piece: str = codec.tokenizer.decode(list(tokens[first:last]), skip_special_tokens=True)
        if text := piece.strip():
            text = " " + text if words and not spaced and piece.startswith(" ") else text
            words.append(Word(text, float(times_U[first]), float(times_U[last])))
    return words


def _word_starts(codec: TextCodec, tokens: Sequence[int], *, spaced: bool) -> list[int]:
    """Numbers of the tokens that begin a word."""
    starts: list[int] = []
    space: int | None = None  # a token of nothing but space belongs to the word after it
    for first, piece in _whole_characters(codec, tokens):
        if not piece.strip():
            space = first if space is None else space
            continue
        speaks = any(c.isalnum() for c in piece) or piece.strip() in OPENING
        if not starts or (speaks and (piece.startswith(" ") or space is not None or not spaced)):
            starts.append(first if space is None else space)
        space = None
    return starts


def _whole_characters(codec: TextCodec, tokens: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(number of the first token, text) of the shortest runs of tokens that contain only whole characters."""
    first = 0
    for last in range(1, len(tokens) + 1):
        piece: str = codec.tokenizer.decode(list(tokens[first:last]), skip_special_tokens=False)
        if REPLACEMENT not in piece or last == len(tokens):
            yield first, piece
            first = last
