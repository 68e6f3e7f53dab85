"""Rules for the next token in decoding: tokens that the checkpoint suppresses, and Whisper's rules for timestamps.

The rules for timestamps are those of Radford et al. 2022 (arXiv:2212.04356), section 4.5, as openai/whisper's decoding
has them. Shape letters: R rows (utterances or beams), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.tokens import TextCodec
from common.errors import DataError

INITIAL_STEPS = 50  # a text begins within the first second: 50 timestamps of 20 ms


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of a checkpoint for decoding.

    Attributes:
        prompt: tokens before each text.
        end: end-of-text token.
        silenced_V, silenced_first_V: 0, or minus infinity for tokens never emitted, and not emitted first.
        timestamp_begin: the token <|0.00|>; None if texts have no timestamps.
    """

    prompt: tuple[int, ...]
    end: int
    silenced_V: Tensor
    silenced_first_V: Tensor
    timestamp_begin: int | None

    def apply(self, scores_RV: Tensor, histories: Sequence[Sequence[int]]) -> Tensor:
        """Scores of the next token with the forbidden ones at minus infinity.

        Args:
            histories: what each row has emitted, without the prompt.
        """
        scores_RV = scores_RV + (self.silenced_V if any(histories) else self.silenced_first_V)
        if self.timestamp_begin is None:
            return scores_RV
        return timestamp_scores(scores_RV, histories, timestamp_begin=self.timestamp_begin, end=self.end)


def make_rules(codec: TextCodec, vocabulary: int, device: torch.device, *, timestamps: bool) -> Rules:
    """The rules of a checkpoint.

    Raises:
        DataError: timestamps are requested from a tokenizer that has none.
    """
    if timestamps and codec.timestamp_begin is None:
        raise DataError("decode.timestamps: the model's tokenizer has no timestamp tokens; decode without them")
    silenced_V = _minus_infinity(codec.suppressed, vocabulary, device)
    return Rules(
        prompt=codec.prompt[:-1] if timestamps else codec.prompt,
        end=codec.end,
        silenced_V=silenced_V,
        silenced_first_V=silenced_V + _minus_infinity(codec.suppressed_first, vocabulary, device),
        timestamp_begin=codec.timestamp_begin if timestamps else None,
    )


def _minus_infinity(tokens: Sequence[int], vocabulary: int, device: torch.device) -> Tensor:
    penalty_V = torch.zeros(vocabulary, device=device)
    penalty_V[list(tokens)] = -torch.inf
    return penalty_V


def timestamp_scores(
    scores_RV: Tensor, histories: Sequence[Sequence[int]], *, timestamp_begin: int, end: int
) -> Tensor:
    """Scores after Whisper's rules: timestamps come in pairs, never decrease, and the first is early.

    If all timestamps together are more probable than any single token of text, the next token is a timestamp.

    Args:
        scores_RV: logits or log-probabilities.
        histories: what each row has emitted, without the prompt.
        timestamp_begin: the token <|0.00|>; the token before it is <|notimestamps|>, the tokens after it are later
            times.
        end: end-of-text token; tokens of text come before it.

    Returns:
        The scores, with forbidden tokens at minus infinity.
    """
    vocabulary = scores_RV.shape[1]
    bounds = [_allowed(history, timestamp_begin, end, vocabulary) for history in histories]
    lowest_R1, earliest_R1, latest_R1 = torch.tensor(bounds, device=scores_RV.device).T[:, :, None]
    token_V = torch.arange(vocabulary, device=scores_RV.device)
    text_V, time_V = token_V < timestamp_begin, token_V >= timestamp_begin
    forbidden_RV = (text_V & (token_V < lowest_R1)) | (token_V == timestamp_begin - 1)
    forbidden_RV |= time_V & ((token_V < earliest_R1) | (token_V > latest_R1))
    scores_RV = scores_RV.masked_fill(forbidden_RV, -torch.inf)
    logs_RV = scores_RV.float().log_softmax(1)
    time_wins_R = logs_RV[:, timestamp_begin:].logsumexp(1) > logs_RV[:, :timestamp_begin].amax(1)
    return scores_RV.masked_fill(time_wins_R[:, None] & text_V, -torch.inf)


def _allowed(history: Sequence[int], timestamp_begin: int, end: int, vocabulary: int) -> tuple[int, int, int]:
    """(lowest token of text, first timestamp, last timestamp) that may follow."""
    if not history:
        return timestamp_begin, timestamp_begin, timestamp_begin + INITIAL_STEPS
    times = [token for token in history if token >= timestamp_begin]
    after_time = history[-1] >= timestamp_begin
    closed = len(history) < 2 or history[-2] >= timestamp_begin  # two in a row, or the first of all: text follows
    if after_time and closed:
        return 0, vocabulary, vocabulary
    if after_time:  # it ended a stretch: either the next begins at once or later, or the text ends
        return end, times[-1], vocabulary
    return 0, (times[-1] + 1 if times else timestamp_begin), vocabulary
