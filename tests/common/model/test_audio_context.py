"""The stand-ins of the silence after an utterance, against the computation of all of the silence."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from common.data.features import MAX_POSITIONS
from common.model.audio_context import STAND_INS, attention_bias
from common.model.whisper import encode, load_whisper, token_losses


def silent_end(positions):
    """Mel frames of 64 positions of speech; then silence, which is 0 here as the padding of the convolutions is."""
    mel = torch.zeros(2, 80, 2 * positions)
    mel[..., :128] = torch.randn(2, 80, 128, generator=torch.Generator().manual_seed(0))
    return mel


def losses(model, mel):
    inputs = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    return token_losses(model, encode(model, mel), inputs, inputs)[0]


@pytest.mark.parametrize("positions", [96, 128, 700, MAX_POSITIONS - STAND_INS, MAX_POSITIONS - 3])
def test_stand_ins_equal_all_of_the_silence_if_its_positions_are_alike(micro_model, positions):
    model = load_whisper(micro_model)
    with torch.no_grad():
        model.model.encoder.embed_positions.weight[positions:] = model.model.encoder.embed_positions.weight[positions]
        short, full = encode(model, silent_end(positions)), encode(model, silent_end(MAX_POSITIONS))
        assert short.shape[1] == min(positions + STAND_INS, MAX_POSITIONS)
        torch.testing.assert_close(short[:, :positions], full[:, :positions], rtol=1e-4, atol=1e-5)
        ours, whole = losses(model, silent_end(positions)), losses(model, silent_end(MAX_POSITIONS))
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-4)


def test_stand_ins_of_the_last_positions_are_these_positions(micro_model):
    model = load_whisper(micro_model)
    positions = MAX_POSITIONS - STAND_INS
    short, full = encode(model, silent_end(positions)), encode(model, silent_end(MAX_POSITIONS))
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


def test_each_key_counts_as_often_as_it_has_positions():
    bias = attention_bias(100 + STAND_INS, MAX_POSITIONS, torch.zeros(1))
    assert bias[:100].eq(0).all() and bias.exp().sum().item() == pytest.approx(MAX_POSITIONS)
    assert bias[-1].item() == pytest.approx(math.log(1400 / STAND_INS))
    assert attention_bias(MAX_POSITIONS, MAX_POSITIONS, torch.zeros(1)) is None


def test_a_model_that_was_not_loaded_by_us_gets_the_same_attention(micro_model):
    ours = load_whisper(micro_model)
    other = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(micro_model))
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(losses(other.eval(), silent_end(128)), losses(ours.eval(), silent_end(128)))


def test_a_chosen_attention_is_left_as_it_is(micro_model):
    model = load_whisper(micro_model)
    model.set_attn_implementation("eager")
    encode(model, silent_end(128))
    assert model.config._attn_implementation == "eager"


COMPILED = """
import sys
from pathlib import Path
import torch
from common.model.whisper import load_whisper
from tests.common.model.test_audio_context import losses, silent_end
model = load_whisper(Path(sys.argv[1]))
for block in (*model.model.encoder.layers, *model.model.decoder.layers):
    block.compile(dynamic=True, backend="eager")
with torch.no_grad():
    for positions in (96, 128, 160, 256, 700):
        losses(model, silent_end(positions))
        print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_a_compiled_block_is_the_same_for_all_lengths(micro_model):
    """In a process of its own: what was compiled before has a part in what is compiled again."""
    done = subprocess.run([sys.executable, "-c", COMPILED, micro_model], check=True, capture_output=True, text=True)
    graphs = done.stdout.split()
    assert len(graphs) == 5 and len(set(graphs[1:])) == 1
