"""Adapters as people train them: also on layers whose weight another layer uses."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from common.inference.load_model import open_model
from common.model.adapters import merge_experts
from common.model.mixture import add_mixture
from common.model.routing import Routing
from common.model.whisper import load_whisper

FRAMES = torch.linspace(-1, 1, 80 * 3000).reshape(1, 80, 3000)
TOKENS = torch.tensor([[257, 258, 40, 41, 42]])


def logits(model):
    with torch.no_grad():
        return model(input_features=FRAMES, decoder_input_ids=TOKENS).logits.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["proj_out"]},
        {"target_modules": ["proj_out", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["proj_out"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`", "ignore:Model with"
)
def test_an_adapter_on_a_tied_layer_keeps_its_logits(micro_model, tmp_path, options):
    """huggingface/peft#2972: merged into the tied weight, it would change the embedding, too."""
    torch.manual_seed(1)
    adapted = get_peft_model(load_whisper(micro_model), LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), store=None, cache=tmp_path, base=str(micro_model), device="cpu")
    assert np.abs(logits(opened.recogniser.whisper) - logits(adapted)).max() < 1e-4


def test_experts_on_the_output_projection_are_merged_into_it_alone(micro_model, tmp_path):
    """The same kind, in adapters of our own, and in the checkpoint that is written of them."""
    whisper = load_whisper(micro_model).eval()
    slot = add_mixture(whisper, targets=("proj_out",), num_experts=1, rank=4, alpha=8)
    for name, parameter in whisper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    slot.routing = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    before = logits(whisper)
    merge_experts(whisper, {0: 1.0})
    assert np.abs(logits(whisper) - before).max() < 1e-4
    whisper.save_pretrained(tmp_path)
    assert np.abs(logits(load_whisper(tmp_path).eval()) - before).max() < 1e-4


def test_nothing_else_of_whisper_is_tied(micro_model):
    whisper = load_whisper(micro_model)
    names = {}
    for name, parameter in whisper.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    assert [tied for tied in names.values() if len(tied) > 1] == [
        ["model.decoder.embed_tokens.weight", "proj_out.weight"]
    ]
