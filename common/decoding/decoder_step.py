"""One step of Whisper's decoder, for every way of choosing tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration

Found = tuple[list[int], float]  # tokens without the end token, mean log-probability with it


def decoder_step(
    model: WhisperForConditionalGeneration, step_RU: Tensor, hidden_RTD: Tensor, cache: EncoderDecoderCache | None
) -> tuple[Tensor, EncoderDecoderCache]:
    """Logits of the token after `step_RU`, in fp32, and the cache that holds all tokens so far. (logits_RV, cache)."""
    out = model.model.decoder(
        input_ids=step_RU, encoder_hidden_states=hidden_RTD, past_key_values=cache, use_cache=True
    )
    return model.proj_out(out.last_hidden_state[:, -1]).float(), out.past_key_values
