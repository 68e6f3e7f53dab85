"""Greedy decoding in batches that shrink as utterances end.

Shape letters: B utterances, T encoder positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration

from common.data import Batch
from common.moe import RoutingSlot
from common.recogniser import Recogniser
from common.whisper import TextCodec

SHRINK_AT = 0.75  # rows that must be alive for a batch to stay as it is


@torch.inference_mode()
def greedy(
    model: WhisperForConditionalGeneration,
    hidden_BTD: Tensor,
    codec: TextCodec,
    *,
    max_new_tokens: int,
    slot: RoutingSlot | None = None,
) -> list[list[int]]:
    """The most probable token at each step, until the end token.

    Args:
        hidden_BTD: encoder output.
        max_new_tokens: where a transcript that does not end is cut.
        slot: holds the batch's routing; its rows are dropped together with the batch's.

    Returns:
        Tokens of each utterance, without prompt and end token.
    """
    device = hidden_BTD.device
    silenced_V = _penalty(codec.suppressed, model.config.vocab_size, device)
    silenced_first_V = silenced_V + _penalty(codec.suppressed_first, model.config.vocab_size, device)
    tokens: list[list[int]] = [[] for _ in range(len(hidden_BTD))]
    rows = list(range(len(hidden_BTD)))  # which utterance each row of the shrinking batch is
    step_BU = torch.tensor([codec.prompt], device=device).expand(len(rows), -1)
    cache: EncoderDecoderCache | None = None
    for number in range(max_new_tokens):
        out = model.model.decoder(
            input_ids=step_BU, encoder_hidden_states=hidden_BTD, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        logits_BV = model.proj_out(out.last_hidden_state[:, -1]).float()
        next_B = (logits_BV + (silenced_V if number else silenced_first_V)).argmax(1)
        step_BU = next_B[:, None]
        alive = []
        for row, token in enumerate(next_B.tolist()):
            if rows[row] >= 0 and token != codec.end:
                tokens[rows[row]].append(token)
                alive.append(row)
            else:
                rows[row] = -1
        if not alive:
            break
        if len(alive) < SHRINK_AT * len(rows):
            index = torch.tensor(alive, device=device)
            rows = [rows[row] for row in alive]
            step_BU, hidden_BTD = step_BU[index], hidden_BTD[index]
            cache.reorder_cache(index)
            if slot is not None and slot.routing is not None:
                slot.routing = slot.routing.rows(index)
    return tokens


def _penalty(suppressed: Iterable[int], vocabulary: int, device: torch.device) -> Tensor:
    penalty_V = torch.zeros(vocabulary, device=device)
    penalty_V[list(suppressed)] = -torch.inf
    return penalty_V


@torch.inference_mode()
def transcribe_batch(recogniser: Recogniser, batch: Batch, codec: TextCodec, *, max_new_tokens: int) -> list[str]:
    """Text of each utterance of a batch."""
    hidden_BTD = recogniser.encode_batch(batch)
    ids = greedy(recogniser.whisper, hidden_BTD, codec, max_new_tokens=max_new_tokens, slot=recogniser.slot)
    return [codec.decode(one) for one in ids]
