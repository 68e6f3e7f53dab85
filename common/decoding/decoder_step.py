"""One step of Whisper's decoder, shared by greedy decoding, sampling and beam search."""

from __future__ import annotations

from torch import Tensor
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration

Found = tuple[list[int], float]  # tokens without the end token, mean log-probability with it


def decoder_step(
    model: WhisperForConditionalGeneration, step_RU: Tensor, hidden_RTD: Tensor, cache: EncoderDecoderCache | None
) -> tuple[Tensor, EncoderDecoderCache]:
    """(logits_RV, cache): logits of the token after `step_RU`, in fp32, and the cache of all tokens so far."""
    out = model.model.decoder(
        input_ids=step_RU, encoder_hidden_states=hidden_RTD, past_key_values=cache, use_cache=True
    )
    return model.proj_out(out.last_hidden_state[:, -1]).float(), out.past_key_values
