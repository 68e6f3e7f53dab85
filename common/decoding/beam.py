"""Beam search over a batch from which finished utterances are removed.

The candidates, the scores and the end of the search are those of `generate(num_beams=…)` in transformers, so that texts
are equal. Shape letters: B utterances, K beams, R = B·K rows, T encoder positions, D model width, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, WhisperForConditionalGeneration

from common.decoding.token_rules import Rules
from common.model.routing import RoutingSlot

Found = tuple[list[int], float]  # tokens without the end token, mean log-probability with it


@dataclass(slots=True)
class _Search:
    """The search for the text of one utterance.

    Attributes:
        number: position of the utterance in the batch.
        running: tokens and summed log-probability of each open beam, the best first.
        ended: (score, tokens, mean log-probability) of complete texts, the best first, at most K.
    """

    number: int
    running: list[tuple[list[int], float]] = field(default_factory=lambda: [([], 0.0)])
    ended: list[tuple[float, list[int], float]] = field(default_factory=list)

    def extend(
        self, candidates: list[tuple[float, int, int]], step: int, *, end: int, beams: int, penalty: float, last: bool
    ) -> list[tuple[int, int]]:
        """Extends the search by the 2K best (log-probability, beam, token), the best first; returns (beam, token) of
        the new K.
        """
        following: list[tuple[list[int], float]] = []
        origins: list[tuple[int, int]] = []
        for rank, (total, beam, token) in enumerate(candidates):
            tokens = self.running[beam][0]
            if token == end or last:
                if rank < beams:  # the K after them only replace beams that ended
                    whole = tokens if token == end else [*tokens, token]
                    self.ended.append((total / step**penalty, whole, total / step))
            elif len(following) < beams:
                following.append(([*tokens, token], total))
                origins.append((beam, token))
        self.ended = sorted(self.ended, key=lambda hypothesis: -hypothesis[0])[:beams]
        self.running = following
        return origins

    def over(self, step: int, *, beams: int, penalty: float) -> bool:
        """Whether no open beam can beat the complete texts."""
        if not self.running:
            return True
        return len(self.ended) == beams and self.running[0][1] / step**penalty <= self.ended[-1][0]


def beam_search(
    model: WhisperForConditionalGeneration,
    hidden_BTD: Tensor,
    rules: Rules,
    *,
    num_beams: int,
    length_penalty: float,
    max_new_tokens: int,
    slot: RoutingSlot | None = None,
) -> list[Found]:
    """The best text of each utterance by beam search with `num_beams` hypotheses.

    Args:
        hidden_BTD: encoder output.
        length_penalty: texts are compared by log-probability / length ** this, the end token counted.
        slot: contains the batch's routing; each beam uses that of its utterance.

    Returns:
        (tokens without the end token, mean log-probability of tokens and end token) of each utterance.
    """
    device, routing = hidden_BTD.device, slot.routing if slot is not None else None
    searches = [_Search(number) for number in range(len(hidden_BTD))]
    open_ones = searches
    step_RU = torch.tensor([rules.prompt], device=device).expand(len(searches), -1)
    hidden_RTD, cache = hidden_BTD, None
    for step in range(1, max_new_tokens + 1):
        logits_RV, cache = decoder_step(model, step_RU, hidden_RTD, cache)
        histories = [tokens for search in open_ones for tokens, _ in search.running]
        candidates = _best(rules.apply(logits_RV.log_softmax(1), histories), open_ones, num_beams)
        rows: list[int] = []
        step_tokens: list[int] = []
        survivors: list[_Search] = []
        first = 0  # row of the first beam of an utterance
        for search, best in zip(open_ones, candidates, strict=True):
            width, last = len(search.running), step == max_new_tokens
            origins = search.extend(best, step, end=rules.end, beams=num_beams, penalty=length_penalty, last=last)
            if not search.over(step, beams=num_beams, penalty=length_penalty):
                survivors.append(search)
                rows += [first + beam for beam, _ in origins]
                step_tokens += [token for _, token in origins]
            first += width
        if not survivors:
            break
        index_R = torch.tensor(rows, device=device)
        same_rows = len(survivors) == len(open_ones) and len(rows) == len(histories)
        _reorder(cache, index_R, own_audio=same_rows)
        if not same_rows:
            hidden_RTD = hidden_RTD[index_R]
            if slot is not None and slot.routing is not None:
                slot.routing = slot.routing.rows(index_R)
        open_ones, step_RU = survivors, torch.tensor(step_tokens, device=device)[:, None]
    if slot is not None:
        slot.routing = routing
    return [(tokens, mean) for _, tokens, mean in (search.ended[0] for search in searches)]


def decoder_step(
    model: WhisperForConditionalGeneration, step_RU: Tensor, hidden_RTD: Tensor, cache: EncoderDecoderCache | None
) -> tuple[Tensor, EncoderDecoderCache]:
    """(logits_RV, cache): logits of the token after `step_RU`, in fp32, and the cache of all tokens so far."""
    out = model.model.decoder(
        input_ids=step_RU, encoder_hidden_states=hidden_RTD, past_key_values=cache, use_cache=True
    )
    return model.proj_out(out.last_hidden_state[:, -1]).float(), out.past_key_values


def _best(log_probabilities_RV: Tensor, searches: list[_Search], beams: int) -> list[list[tuple[float, int, int]]]:
    """The 2K best continuations of each utterance: (summed log-probability, beam, token), the best first."""
    vocabulary = log_probabilities_RV.shape[1]
    width = len(searches[0].running)  # of all: 1 at first, then K
    totals = torch.tensor([total for search in searches for _, total in search.running])
    scores_RV = log_probabilities_RV + totals.to(log_probabilities_RV.device)[:, None]
    scores_BC, places_BC = scores_RV.view(len(searches), width * vocabulary).topk(2 * beams)
    return [
        [(score, place // vocabulary, place % vocabulary) for score, place in zip(scores, places, strict=True)]
        for scores, places in zip(scores_BC.tolist(), places_BC.tolist(), strict=True)
    ]


def _reorder(cache: EncoderDecoderCache, index_R: Tensor, *, own_audio: bool) -> None:
    """Reorders the cache so that each row has the cache of the row that it continues.

    `own_audio`: each row continues a row of the same utterance, so the large cache of the audio need not be reordered.
    """
    if own_audio:
        cache.self_attention_cache.reorder_cache(index_R)
    else:
        cache.reorder_cache(index_R)
