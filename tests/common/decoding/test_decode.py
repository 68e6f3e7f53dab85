"""Decoding: equal to transformers' own, independent of the batch, with Whisper's rules for timestamps."""

from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, GenerationMixin, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from common.data.tokens import IGNORED, load_codec
from common.decoding.decode import Decoded, Decoding, better, decode_hidden
from common.decoding.token_rules import make_rules, timestamp_scores
from common.errors import DataError
from common.model.mixture import add_mixture
from common.model.routing import Routing
from common.model.whisper import load_whisper
from tests.factories import greedy

DECODING = Decoding(batch_size=8, max_new_tokens=24)


def lively(folder):
    """The micro model with output weights of its own: tied ones repeat the same token for ever."""
    model = load_whisper(folder).eval()
    weight_VD = 0.4 * torch.randn(259, 32, generator=torch.Generator().manual_seed(5))
    weight_VD[256] *= 1.8  # the end token: reached now and then
    model.proj_out.weight = torch.nn.Parameter(weight_VD)
    return model


@pytest.fixture(scope="module")
def model(micro_model):
    return lively(micro_model)


@pytest.fixture(scope="module")
def codec(micro_model):
    return replace(load_codec(micro_model), suppressed=(5, 9, 40), suppressed_first=(256, 11))


@pytest.fixture(scope="module")
def hidden_BTD():
    noise_BTD = torch.randn(6, 40, 32, generator=torch.Generator().manual_seed(3))
    return noise_BTD * torch.linspace(0.5, 3, 6)[:, None, None]


def reference(model, hidden_BTD, codec, **options):
    """Tokens by transformers, without prompt, and nothing after the end token."""
    prompt_BU = torch.tensor([codec.prompt]).expand(len(hidden_BTD), -1)
    config = GenerationConfig(
        max_new_tokens=DECODING.max_new_tokens,
        eos_token_id=codec.end,
        pad_token_id=codec.end,
        decoder_start_token_id=codec.prompt[0],
        suppress_tokens=list(codec.suppressed),
        begin_suppress_tokens=list(codec.suppressed_first),
        **options,
    )
    output = GenerationMixin.generate(
        model,
        encoder_outputs=BaseModelOutput(hidden_BTD),
        decoder_input_ids=prompt_BU,
        generation_config=config,
    )
    return [[t for t in row[prompt_BU.shape[1] :] if t != codec.end] for row in output.tolist()]


def tokens_of(results):
    return [list(decoded.tokens) for decoded in results]


def test_greedy_tokens_are_those_of_transformers(model, codec, hidden_BTD):
    expected = reference(model, hidden_BTD, codec, num_beams=1, do_sample=False)
    assert greedy(model, hidden_BTD, codec, max_new_tokens=24) == expected
    assert len({len(tokens) for tokens in expected}) > 1, "utterances end at different steps"


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 1.7])
def test_beams_find_the_tokens_that_transformers_finds(model, codec, hidden_BTD, beams, penalty):
    expected = reference(model, hidden_BTD, codec, num_beams=beams, length_penalty=penalty)
    decoding = replace(DECODING, num_beams=beams, length_penalty=penalty)
    assert tokens_of(decode_hidden(model, hidden_BTD, codec, decoding)) == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperatures": (0.7,)}, {}], ids=["beams", "drawn", "greedy"])
def test_each_utterance_is_decoded_by_its_own_experts_whatever_its_batch(micro_model, codec, hidden_BTD, options):
    model = lively(micro_model)
    slot = add_mixture(model, targets=("q_proj", "fc1"), num_experts=3, rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1], [1, 0]]), torch.rand(6, 2).softmax(1))
    slot.routing = routing
    decoding = replace(DECODING, **options)
    together = decode_hidden(model, hidden_BTD, codec, decoding, slot)
    assert slot.routing is routing, "the batch's routing is back"
    for row, decoded in enumerate(together):
        slot.routing = routing.rows(torch.tensor([row]))
        alone = decode_hidden(model, hidden_BTD[row : row + 1], codec, decoding, slot)[0]
        assert alone.tokens == decoded.tokens
        assert alone.mean_log_probability == pytest.approx(decoded.mean_log_probability, abs=1e-3)
    slot.routing = None
    assert tokens_of(decode_hidden(model, hidden_BTD, codec, decoding, slot)) != tokens_of(together)


def test_only_loops_and_guesses_fall_back_to_the_next_temperature(model, codec, hidden_BTD):
    sure = replace(DECODING, temperatures=(0.0,))
    first = decode_hidden(model, hidden_BTD, codec, sure)
    with_fall_back = decode_hidden(model, hidden_BTD, codec, replace(DECODING, temperatures=(0.0, 0.5)))
    drawn = decode_hidden(model, hidden_BTD, codec, replace(DECODING, temperatures=(0.5,)))
    assert sum(decoded.doubtful for decoded in first) > 0, "the test needs some to fall back"
    for before, after, at_half in zip(first, with_fall_back, drawn, strict=True):
        expected = better(before, at_half) if before.doubtful else before
        assert (after.tokens, after.temperature) == (expected.tokens, expected.temperature)


def test_of_doubtful_texts_the_most_probable_that_is_no_loop_is_kept():
    """As faster-whisper chooses; Whisper keeps the last, drawn at temperature 1 (openai/whisper#2795)."""
    loop, guess, worse = (
        Decoded("no " * 90, (), -0.1, 0.0),
        Decoded("a guess", (), -1.2, 0.4),
        Decoded("abc", (), -3.0, 1.0),
    )
    sure = Decoded("quite sure", (), -0.9, 0.8)
    assert better(better(loop, guess), worse) is guess
    assert better(guess, sure) is sure and better(loop, loop) is loop


def test_another_seed_draws_another_text(model, codec, hidden_BTD):
    texts = [
        tokens_of(decode_hidden(model, hidden_BTD, codec, replace(DECODING, temperatures=(1.0,), seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_rules_for_timestamps_are_those_of_transformers():
    end, zero, vocabulary = 100, 104, 104 + 1501
    config = GenerationConfig(eos_token_id=end, bos_token_id=end)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = zero - 1, 50
    processor = WhisperTimeStampLogitsProcessor(config, begin_index=2)
    generator = torch.Generator().manual_seed(0)
    histories = [
        [[], [], []],
        [[zero], [zero + 7], [zero + 50]],
        [[zero, 5], [zero, zero + 1], [zero + 3, 8]],
        [[zero, 5, 6], [zero, 5, zero + 20], [zero, 5, zero + 1500]],
        [[zero, 5, zero + 20, zero + 20], [zero, 5, zero + 20, zero + 30], [zero, 5, 6, 7]],
        [[zero, 5, zero + 20, zero + 20, 9], [zero, 5, zero + 9, zero + 9, 3], [zero, 5, 6, 7, zero + 1499]],
    ]
    for rows in histories:
        for scale in (1.0, 8.0):  # flat: timestamps together win; peaked: single tokens do
            scores_RV = scale * torch.randn(3, vocabulary, generator=generator)
            ids = torch.tensor([[1, 2, *row] for row in rows])
            expected_RV = processor(ids, scores_RV.clone())
            assert torch.equal(timestamp_scores(scores_RV, rows, timestamp_begin=zero, end=end), expected_RV)


def test_timestamps_of_a_tokenizer_without_them_are_refused(model, codec, hidden_BTD):
    with pytest.raises(DataError, match=r"decode\.timestamps"):
        decode_hidden(model, hidden_BTD, codec, replace(DECODING, timestamps=True))


def test_labels_and_decoding_start_from_one_prompt(codec):
    inputs, labels = codec.pair("river lamp")
    carried = [label for label in labels if label != IGNORED]
    assert tuple(inputs[: len(codec.prompt)]) == codec.prompt
    assert inputs.count(codec.prompt[0]) == 1
    assert codec.prompt[0] not in carried
    assert carried == [*inputs[len(codec.prompt) :], codec.end]


def test_language_and_task_are_in_the_one_prompt_of_training_and_decoding(micro_model, tmp_path):
    tokenizer = Tokenizer.from_file(str(micro_model / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|de|>", "<|transcribe|>", "<|0.00|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"is_multilingual": true}')
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    german = load_codec(tmp_path, language="de")
    names = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    assert [tokenizer.id_to_token(token) for token in german.prompt] == names
    inputs, labels = german.pair("moon")
    assert tuple(inputs[:4]) == german.prompt
    assert labels[:3] == [IGNORED] * 3
    rules = make_rules(german, 262, torch.device("cpu"), timestamps=True)
    assert rules.prompt == german.prompt[:-1]
    assert make_rules(german, 262, torch.device("cpu"), timestamps=False).prompt == german.prompt
    with pytest.raises(DataError, match=r"<\|fr\|>"):
        load_codec(tmp_path, language="fr")
