"""Counted operations against the model's own products; hours against hand-made sums."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

from common.config import validate
from common.cost import (
    Shape,
    audio_passes,
    cluster_seconds,
    decoder_operations,
    encoder_operations,
    estimate,
    from_rates,
)
from common.model.whisper import encode

SHAPE = Shape(width=64, encoder_layers=2, decoder_layers=3, vocabulary=300)
CONFIG = validate({"subsets": {"embeddings_percent": 10, "experts_percent": 20}, "experts": {"epochs": 3}})


@pytest.fixture
def whisper():
    config = WhisperConfig(
        vocab_size=SHAPE.vocabulary,
        d_model=SHAPE.width,
        encoder_layers=SHAPE.encoder_layers,
        decoder_layers=SHAPE.decoder_layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=4 * SHAPE.width,
        decoder_ffn_dim=4 * SHAPE.width,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


def counted(work):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_encoder_and_decoder_operations_are_those_that_torch_counts(whisper):
    T, U = 400, 30
    mel_BMF = torch.randn(1, 80, 2 * T)
    hidden_BTD = encode(whisper, mel_BMF)
    convolutions = counted(lambda: encode(whisper, mel_BMF, layer=0))
    assert encoder_operations(SHAPE, T) == pytest.approx(
        counted(lambda: encode(whisper, mel_BMF)) - convolutions, rel=0.02
    )
    tokens = torch.ones(1, U, dtype=torch.int64)

    def decode():
        whisper.proj_out(
            whisper.model.decoder(input_ids=tokens, encoder_hidden_states=hidden_BTD, use_cache=False).last_hidden_state
        )

    assert decoder_operations(SHAPE, T, U) == pytest.approx(counted(decode), rel=0.02)


def test_hours_of_speech_count_epochs_and_subsets():
    passes = audio_passes(CONFIG, hours=100)
    assert passes["cluster"] == pytest.approx(10)
    assert passes["experts"] == pytest.approx(100 * 0.2 * 3)
    assert passes["asr"] == pytest.approx(100 * CONFIG.asr.epochs)
    regular = validate({"asr": {"pretrain": "none"}})
    assert not {"cluster", "experts"} & set(audio_passes(regular, hours=100))


def test_twice_the_speech_costs_twice_and_a_full_fine_tune_costs_more():
    options = {"mean_seconds": 8.0, "shape": SHAPE, "operations_per_second": 1e12}
    one, two = estimate(CONFIG, hours=10, **options), estimate(CONFIG, hours=20, **options)
    assert [row.stage for row in one] == ["extract", "cluster", "experts", "asr", "evaluate"]
    for a, b in zip(one, two, strict=True):
        assert b.gpu_hours == pytest.approx(2 * a.gpu_hours) or a.stage == "cluster"  # see the last test
    full = validate({"asr": {"adapt": "full"}})
    cost = {row.stage: row.gpu_hours for row in estimate(full, hours=10, **options)}
    assert cost["asr"] == pytest.approx(1.5 * next(row.gpu_hours for row in one if row.stage == "asr"))


def test_measured_rates_give_hours_and_unmeasured_stages_are_left_out():
    rows = from_rates(CONFIG, hours=100, rates={"asr": 50.0})
    assert [(row.stage, row.gpu_hours) for row in rows] == [("asr", 100 * CONFIG.asr.epochs / 50)]


def test_clustering_grows_with_the_square_of_many_utterances():
    assert cluster_seconds(100_000) == pytest.approx(34.6)
    assert 90 < cluster_seconds(10_000_000) / cluster_seconds(1_000_000) < 100
    assert cluster_seconds(1_000) < 0.1
