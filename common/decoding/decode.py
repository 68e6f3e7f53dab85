"""From encoder output to text: greedy, beam search or sampling, in batches that shrink as utterances end.

Shape letters: B utterances, R rows of the shrinking batch, T encoder positions, D model width, U tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration

from common.data.tokens import TextCodec
from common.decoding.beam import Found, beam_search, decoder_step
from common.decoding.loops import COMPRESSION_RATIO_THRESHOLD, compression_ratio
from common.decoding.token_rules import Rules, make_rules
from common.model.routing import RoutingSlot

SHRINK_AT = 0.75  # share of unfinished rows above which a batch is kept
LOGPROB_THRESHOLD = -1.0  # mean log-probability of a text's tokens: below, it is a guess


@dataclass(frozen=True, slots=True)
class Decoding:
    """How text is decoded; names as in `common.sections.DecodeConfig`.

    Attributes:
        batch_size: number of utterances that are decoded at once.
        max_new_tokens: maximum number of tokens; longer transcripts are cut.
        num_beams: 1 is greedy.
        length_penalty: beams are compared by log-probability / length ** this.
        temperatures: the first is used; the following ones are used for texts that are loops or have a low probability
            (Radford et al. 2022, section 4.5). 0 is greedy or beam search; above 0, tokens are sampled. If all texts
            are doubtful, the most probable text that is not a loop is used.
        timestamps: decode with Whisper's timestamp tokens.
        seed: random seed of sampled tokens.
        normaliser: how texts are compared afterwards: `unified`, or `published`, Whisper's normaliser alone.
        no_speech_threshold: above this probability of no speech, a text with a low probability is treated as silence
            and is not decoded again; None does not compute the probability.
    """

    batch_size: int
    max_new_tokens: int
    num_beams: int = 1
    length_penalty: float = 1.0
    temperatures: tuple[float, ...] = (0.0,)
    timestamps: bool = False
    seed: int = 0
    normaliser: str = "unified"
    no_speech_threshold: float | None = None

    @property
    def published(self) -> bool:
        """Whether texts are compared by Whisper's normaliser alone."""
        return self.normaliser == "published"


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decoded text of one utterance.

    Attributes:
        tokens: without prompt and end token; timestamps included.
        mean_log_probability: mean over its tokens, including the end token.
        temperature: at which it was decoded.
        no_speech_probability: probability of no speech; None if it was not computed, or the model has no token for it.
    """

    text: str
    tokens: tuple[int, ...]
    mean_log_probability: float
    temperature: float
    no_speech_probability: float | None = None

    @property
    def repetitive(self) -> bool:
        """Whether the text is repetitive, by Whisper's limit of compression."""
        return compression_ratio(self.text) > COMPRESSION_RATIO_THRESHOLD

    @property
    def guessed(self) -> bool:
        """Whether the mean log-probability of its tokens is below Whisper's limit."""
        return self.mean_log_probability < LOGPROB_THRESHOLD

    @property
    def doubtful(self) -> bool:
        """Whether the text is repetitive or has a low probability."""
        return self.repetitive or self.guessed

    def of_silence(self, threshold: float | None) -> bool:
        """Whether the text has a low probability and the audio probably contains no speech; Whisper leaves out such
        texts.

        Args:
            threshold: limit of `no_speech_probability`; Whisper's is 0.6.
        """
        if threshold is None or self.no_speech_probability is None:
            return False
        return self.no_speech_probability > threshold and self.guessed


@torch.inference_mode()
def decode_hidden(
    model: WhisperForConditionalGeneration,
    hidden_BTD: Tensor,
    codec: TextCodec,
    decoding: Decoding,
    slot: RoutingSlot | None = None,
) -> list[Decoded]:
    """Text of each utterance; the result depends neither on the other utterances of the batch nor on their order.

    Args:
        hidden_BTD: encoder output.
        slot: contains the batch's routing before and after the call, and during it that of the rows being decoded.
    """
    rules = make_rules(codec, model.config.vocab_size, hidden_BTD.device, timestamps=decoding.timestamps)
    asked = decoding.no_speech_threshold is not None and codec.no_speech is not None
    silence_B = no_speech_probabilities(model, hidden_BTD, codec) if asked else [None] * len(hidden_BTD)
    results: dict[int, Decoded] = {}
    waiting = list(range(len(hidden_BTD)))
    for temperature in decoding.temperatures:
        index = torch.tensor(waiting, device=hidden_BTD.device)
        with routed_rows(slot, index):
            attempts = _decode_at(model, hidden_BTD[index], rules, decoding, slot, temperature)
        for number, (tokens, mean) in zip(waiting, attempts, strict=True):
            decoded = Decoded(codec.decode(tokens), tuple(tokens), mean, temperature, silence_B[number])
            results[number] = better(results.get(number, decoded), decoded)
        waiting = [n for n in waiting if _worth_another_try(results[n], decoding.no_speech_threshold)]
        if not waiting:
            break
    return [results[number] for number in range(len(hidden_BTD))]


def better(first: Decoded, second: Decoded) -> Decoded:
    """The better of two texts of one utterance: a text that is not a loop is preferred, then the more probable text."""
    return max(first, second, key=lambda text: (not text.doubtful, not text.repetitive, text.mean_log_probability))


def _worth_another_try(decoded: Decoded, no_speech_threshold: float | None) -> bool:
    return decoded.repetitive or (decoded.guessed and not decoded.of_silence(no_speech_threshold))


def no_speech_probabilities(
    model: WhisperForConditionalGeneration, hidden_BTD: Tensor, codec: TextCodec
) -> list[float]:
    """Probability of no speech: that of the model's no-speech token after the start of a transcript."""
    start_B1 = torch.full((len(hidden_BTD), 1), codec.prompt[0], device=hidden_BTD.device)
    logits_BV, _ = decoder_step(model, start_B1, hidden_BTD, None)
    probabilities: list[float] = logits_BV.softmax(1)[:, codec.no_speech].tolist()
    return probabilities


def _decode_at(
    model: WhisperForConditionalGeneration,
    hidden_BTD: Tensor,
    rules: Rules,
    decoding: Decoding,
    slot: RoutingSlot | None,
    temperature: float,
) -> list[Found]:
    limit = decoding.max_new_tokens
    if temperature > 0:
        # Every row draws the same numbers: so no result depends on which rows share a batch.
        drawn = torch.rand(limit, generator=torch.Generator().manual_seed(decoding.seed)).tolist()
        return _token_by_token(model, hidden_BTD, rules, limit, slot, temperature, drawn)
    if decoding.num_beams > 1:
        return beam_search(
            model,
            hidden_BTD,
            rules,
            num_beams=decoding.num_beams,
            length_penalty=decoding.length_penalty,
            max_new_tokens=limit,
            slot=slot,
        )
    return _token_by_token(model, hidden_BTD, rules, limit, slot)


@contextmanager
def routed_rows(slot: RoutingSlot | None, index_N: Tensor) -> Iterator[None]:
    """Sets the routing of the utterances `index_N` of a batch, and restores that of the whole batch afterwards."""
    whole = slot.routing if slot is not None else None
    if slot is not None and whole is not None:
        slot.routing = whole.rows(index_N)
    try:
        yield
    finally:
        if slot is not None:
            slot.routing = whole


def _token_by_token(
    model: WhisperForConditionalGeneration,
    hidden_RTD: Tensor,
    rules: Rules,
    max_new_tokens: int,
    slot: RoutingSlot | None,
    temperature: float = 0.0,
    drawn: Sequence[float] = (),
) -> list[Found]:
    """Decodes token by token, the most probable or a sampled token at each step, until the end token."""
    device = hidden_RTD.device
    tokens: list[list[int]] = [[] for _ in range(len(hidden_RTD))]
    rows = list(range(len(hidden_RTD)))  # which utterance each row of the shrinking batch is; -1 once it has ended
    chosen: list[tuple[list[int], Tensor]] = []  # of each step: rows, and log-probabilities of their tokens
    step_RU = torch.tensor([rules.prompt], device=device).expand(len(rows), -1)
    cache: EncoderDecoderCache | None = None
    for number in range(max_new_tokens):
        logits_RV, cache = decoder_step(model, step_RU, hidden_RTD, cache)
        logits_RV = rules.apply(logits_RV, [tokens[row] if row >= 0 else [rules.end] for row in rows])
        next_R = _draw(logits_RV / temperature, drawn[number]) if temperature > 0 else logits_RV.argmax(1)
        chosen.append((rows.copy(), logits_RV.gather(1, next_R[:, None])[:, 0] - logits_RV.logsumexp(1)))
        step_RU = next_R[:, None]
        alive = []
        for place, token in enumerate(next_R.tolist()):
            if rows[place] >= 0 and token != rules.end:
                tokens[rows[place]].append(token)
                alive.append(place)
            else:
                rows[place] = -1
        if not alive:
            break
        if len(alive) < SHRINK_AT * len(rows):
            index = torch.tensor(alive, device=device)
            rows = [rows[place] for place in alive]
            step_RU, hidden_RTD = step_RU[index], hidden_RTD[index]
            cache.reorder_cache(index)
            if slot is not None and slot.routing is not None:
                slot.routing = slot.routing.rows(index)
    return list(zip(tokens, _means(chosen, len(tokens)), strict=True))


def _means(chosen: Sequence[tuple[list[int], Tensor]], count: int) -> list[float]:
    """The mean log-probability of each of `count` utterances, from the log-probabilities of all steps."""
    sums, steps = [0.0] * count, [0] * count
    values = torch.cat([logs_R for _, logs_R in chosen]).tolist()  # once, at the end: each transfer waits for the GPU
    for row, value in zip((row for rows, _ in chosen for row in rows), values, strict=True):
        if row >= 0:
            sums[row] += value
            steps[row] += 1
    return [total / number for total, number in zip(sums, steps, strict=True)]


def _draw(logits_RV: Tensor, number: float) -> Tensor:
    """The token at which the cumulative probability passes `number`, for each row."""
    cumulative_RV = logits_RV.softmax(1).cumsum(1)
    wanted_R1 = number * cumulative_RV[:, -1:]  # rounding: the sum is not quite 1
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0].clamp(max=logits_RV.shape[1] - 1)
