"""Times of words: the warped path is the best there is; words are found where they were said."""

import itertools

import numpy as np
import pytest
import torch

from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.corpus import read_corpus
from common.data.features import MAX_POSITIONS
from common.data.tokens import load_codec
from common.decoding.alignment import align, alignment_heads, monotone_path, words_of
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser
from common.model.routing import Routing
from common.model.whisper import load_whisper


def best_by_trying_all(score_UT):
    """The highest sum of a monotone path, over all choices of first positions."""
    tokens, positions = score_UT.shape
    best = -np.inf
    for inner in itertools.combinations_with_replacement(range(positions), tokens - 1):
        starts = (0, *inner)
        for steps in itertools.product((0, 1), repeat=tokens - 1):  # leave the token before at the same position or not
            ends = [start - step for start, step in zip(starts[1:], steps, strict=True)] + [positions - 1]
            if all(end >= start for start, end in zip(starts, ends, strict=True)):
                total = sum(score_UT[u, a : b + 1].sum() for u, (a, b) in enumerate(zip(starts, ends, strict=True)))
                best = max(best, total)
    return best


def sum_of_path(score_UT, starts):
    """The highest sum with these first positions."""
    total = 0.0
    for u, start in enumerate(starts):
        last = u + 1 == len(starts)
        ends = [score_UT.shape[1] - 1] if last else [e for e in (starts[u + 1] - 1, starts[u + 1]) if e >= start]
        total += max(score_UT[u, start : end + 1].sum() for end in ends)
    return total


@pytest.mark.parametrize("seed", range(20))
def test_the_path_is_the_best_of_all(seed):
    score_UT = np.random.default_rng(seed).standard_normal((4, 6))
    starts = monotone_path(score_UT)
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    assert sum_of_path(score_UT, starts) == pytest.approx(best_by_trying_all(score_UT))


def test_attention_is_that_of_the_model_itself(micro_model, tones):
    """The weights behind the path equal those that transformers gives out, mixtures included."""
    from common.decoding.alignment import _watched, _weights

    model = load_whisper(micro_model).eval()
    slot = add_mixture(model, targets=("q_proj", "k_proj"), num_experts=2, rank=2, alpha=4)
    slot.routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1))
    hidden_BTD = torch.randn(2, MAX_POSITIONS, 32, generator=torch.Generator().manual_seed(0))
    inputs_BU = torch.tensor([[257, 258, 1, 2, 3], [257, 258, 9, 8, 7]])
    with torch.no_grad(), _watched(model) as seen:
        model.model.decoder(input_ids=inputs_BU, encoder_hidden_states=hidden_BTD, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model.decoder(input_ids=inputs_BU, encoder_hidden_states=hidden_BTD, output_attentions=True)
    assert alignment_heads(model) == {1: [0, 1]}
    for row in range(2):
        query, key = seen[0]
        torch.testing.assert_close(_weights(query[row], key[row], MAX_POSITIONS), out.cross_attentions[1][row])


def test_times_never_decrease_and_do_not_depend_on_the_batch(micro_model, tones):
    corpus, codec = read_corpus(tones), load_codec(micro_model)
    examples = make_examples(corpus, corpus.split("dev")[:4], codec, context="dynamic", margin=64)
    recogniser = Recogniser(load_whisper(micro_model)).eval()
    loader = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))
    batch = next(loader(epoch_batches(examples, batch_size=4, shuffle=False)))
    texts = [codec.encode(text) for text in ("river lamp", "a", "moon moon moon", "stone")][: len(batch)]
    with torch.no_grad():
        hidden_BTD = recogniser.encode_batch(batch)
    together = align(recogniser.whisper, hidden_BTD, batch.valid_B.tolist(), codec, texts)
    for row, (times, text) in enumerate(zip(together, texts, strict=True)):
        assert len(times) == len(text) + 1
        assert (np.diff(times) >= 0).all()
        assert times[-1] <= batch.valid_B[row] / 50
        alone = align(recogniser.whisper, hidden_BTD[row : row + 1], [int(batch.valid_B[row])], codec, [text])[0]
        assert np.array_equal(times, alone)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("He said: yes, do!", "en", ["He", "said:", "yes,", "do!"]),
        ("naïve café — 3 o'clock", "en", ["naïve", "café —", "3", "o'clock"]),
        ("你好。", "zh", ["你", "好。"]),
        ("用 iP", "zh", ["用", " i", "P"]),
    ],
)
def test_words_keep_their_punctuation_and_whole_characters(micro_model, text, language, expected):
    codec = load_codec(micro_model)  # one token a byte
    tokens = codec.encode(text)
    words = words_of(codec, tokens, np.arange(len(tokens) + 1) / 50, language)
    assert [word.text for word in words] == expected
    assert words[-1].end == len(tokens) / 50
    assert all(word.end == following.start for word, following in itertools.pairwise(words))


@pytest.mark.parametrize("text", ["", " ", "\n  "])
def test_a_text_without_a_word_has_none(micro_model, text):
    codec = load_codec(micro_model)
    tokens = codec.encode(text)
    assert words_of(codec, tokens, np.arange(len(tokens) + 1) / 50, "en") == []
