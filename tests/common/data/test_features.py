"""Log-mel and encoder equal Hugging Face's; short context depends on the utterance alone."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from common.data.features import (
    BUCKETS,
    MAX_POSITIONS,
    SAMPLES_PER_POSITION,
    context_positions,
    log_mel,
    valid_positions,
)
from common.data.tokens import load_codec
from common.errors import DataError
from common.model.whisper import encode, load_whisper, pool


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(16_000 * seconds)).astype(np.float32)


@pytest.mark.parametrize("bands", [80, 128])
def test_log_mel_of_thirty_seconds_equals_hugging_faces(bands):
    clips = [noise(2.3), noise(30, 1)]
    padded = torch.zeros(2, 480_000)
    for row, clip in enumerate(clips):
        padded[row, : len(clip)] = torch.from_numpy(clip)
    reference = WhisperFeatureExtractor(feature_size=bands)(clips, sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(log_mel(padded, bands), reference.input_features, rtol=1e-4, atol=1e-4)


def test_log_mel_of_short_context_is_the_beginning_of_the_long_one():
    clip = torch.from_numpy(noise(1.5))[None]
    short = torch.nn.functional.pad(clip, (0, 256 * SAMPLES_PER_POSITION - clip.shape[1]))
    long = torch.nn.functional.pad(clip, (0, 480_000 - clip.shape[1]))
    torch.testing.assert_close(log_mel(short, 80), log_mel(long, 80)[..., :512], rtol=1e-4, atol=1e-4)


def test_encoder_at_thirty_seconds_equals_hugging_faces(micro_model):
    model = load_whisper(micro_model)
    mel = torch.randn(1, 80, 2 * MAX_POSITIONS)
    torch.testing.assert_close(encode(model, mel), model.model.encoder(mel).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradient(micro_model):
    model = load_whisper(micro_model)
    mel = torch.randn(1, 80, 128)
    gradients = []
    for gradient_checkpointing in (False, True):
        model.zero_grad()
        encode(model, mel, gradient_checkpointing=gradient_checkpointing).square().sum().backward()
        gradients.append(model.model.encoder.conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seconds", [0.01, 1.0, 7.96, 20.0, 28.0, 30.0])
def test_context_leaves_the_margin_or_is_all_of_thirty_seconds(seconds):
    positions = context_positions(seconds, context="dynamic", margin=64)
    assert positions in BUCKETS
    assert positions >= valid_positions(seconds) + 64 or positions == MAX_POSITIONS
    assert context_positions(seconds, context="30s", margin=64) == MAX_POSITIONS


def test_pooling_ignores_what_lies_behind_the_utterance():
    hidden = torch.randn(2, 10, 4)
    valid = torch.tensor([6, 10])
    other = hidden.clone()
    other[0, 6:] = 1e6
    for method, width in (("mean", 4), ("max", 4), ("meanstd", 8)):
        pooled = pool(hidden, valid, method)
        assert pooled.shape == (2, width)
        torch.testing.assert_close(pooled, pool(other, valid, method))
    torch.testing.assert_close(pool(hidden, valid)[0], hidden[0, :6].mean(0))


def test_layer_beyond_the_encoder_is_refused(micro_model):
    for layer in (3, -2):
        with pytest.raises(DataError, match="has 2 blocks"):
            encode(load_whisper(micro_model), torch.randn(1, 80, 128), layer=layer)


def test_labels_hold_one_start_token_and_no_prompt(micro_model):
    codec = load_codec(micro_model)
    inputs, labels = codec.pair("seven lamps")
    assert len(inputs) == len(labels) == codec.length("seven lamps") - 1
    assert inputs.count(codec.prompt[0]) == 1
    assert codec.prompt[0] not in labels
    assert labels[-1] == codec.end
    # Position t predicts token t+1, whatever the length of the prompt.
    assert [a for a, b in zip(inputs[1:], labels[:-1], strict=True) if b != -100] == [
        b for b in labels[:-1] if b != -100
    ]
    assert codec.decode([label for label in labels if label != -100]) == "seven lamps"
