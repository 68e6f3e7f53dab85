"""Weights that lack a tensor, hold another one or numbers that are none are refused by name, wherever they are read."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import DataError
from common.export.merge import merge_models
from common.inference.load_model import open_model
from common.model.adapters import read_adapter
from common.model.bundle import load_gate, load_recogniser, save_gate, save_recogniser
from common.model.gate import Gate
from common.model.mixture import add_mixture
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from tests.factories import bundle_info

CPU = torch.device("cpu")
TARGETS = ("q_proj", "fc1")
FC1 = "model.decoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def bundle(micro_model, tmp_path_factory):
    """A mixture of three experts of rank 2, as the asr stage leaves it."""
    folder = tmp_path_factory.mktemp("bundle")
    whisper = load_whisper(micro_model)
    slot = add_mixture(whisper, targets=TARGETS, num_experts=3, rank=2, alpha=4)
    recogniser = Recogniser(whisper, slot=slot, gate=Gate(32, 8, 3))
    save_recogniser(recogniser, bundle_info(micro_model, rank=2, targets=TARGETS), folder)
    return folder


def changed_tensors(tensors, name):
    """(what is wrong, tensors): one set for each way to break tensor `name`."""
    value = tensors[name]
    one_bad = value.clone()
    one_bad.view(-1)[-1] = math.nan
    yield "missing", {other: t for other, t in tensors.items() if other != name}
    yield "unexpected", tensors | {f"{name}.more": value.clone()}
    yield "NaN", tensors | {name: one_bad}
    yield "infinite", tensors | {name: torch.full_like(value, math.inf)}
    yield "minus infinite", tensors | {name: torch.full_like(value, -math.inf)}
    yield "other shape", tensors | {name: torch.zeros(5, *value.shape[1:])}
    yield "no dimensions", tensors | {name: torch.zeros(())}
    yield "empty", tensors | {name: torch.zeros(0, *value.shape[1:])}
    yield "int8", tensors | {name: value.to(torch.int8)}
    yield "float8", tensors | {name: value.to(torch.float8_e4m3fn)}
    yield "bool", tensors | {name: value > 0}
    yield "complex", tensors | {name: value.to(torch.complex64)}
    yield "nothing", {}


def lost_tensors(path, name, load):
    """How many ways to break a tensor of a safetensors file `load` passes over, and how many were tried."""
    tensors = load_file(path)
    lost, tried = [], 0
    for problem, broken in changed_tensors(tensors, name):
        save_file(broken, path, metadata={"format": "pt"})
        tried += 1
        lost += [problem] if not refused(load) else []
    save_file(tensors, path, metadata={"format": "pt"})
    load()  # and what is whole is taken
    return lost, tried


def refused(load):
    """Whether one line says what is wrong."""
    try:
        load()
    except DataError as error:
        return "\n" not in str(error) and len(str(error)) < 1000
    return False


@pytest.mark.parametrize("name", [FC1, "model.decoder.embed_tokens.weight", "model.encoder.conv1.bias"])
def test_a_base_models_tensors(micro_model, tmp_path, name, tally):
    folder = shutil.copytree(micro_model, tmp_path / "model")
    lost, tried = lost_tensors(folder / "model.safetensors", name, lambda: load_whisper(folder))
    assert not lost
    tally(tried, len(lost))


def test_a_base_models_config(micro_model, tmp_path, tally):
    folder = shutil.copytree(micro_model, tmp_path / "model")
    plain = json.loads((folder / "config.json").read_text())
    sizes = ("d_model", "vocab_size", "num_mel_bins", "encoder_layers", "decoder_layers", "encoder_ffn_dim")
    sizes += ("max_source_positions", "max_target_positions", "decoder_ffn_dim")
    changes = [{name: value} for name in sizes for value in (10**5, 10**12, 0, -1, 1, "32", None, [], 0.5, math.nan)]
    changes += [{"encoder_attention_heads": value} for value in (0, -1, 3, "2", 10**9)]
    changes += [{"quantization_config": {"quant_method": "bitsandbytes"}}, {"activation_function": "none"}]
    changes += [{"model_type": "bert"}, {"dropout": math.inf}]
    lost = []
    for change in changes:
        (folder / "config.json").write_text(json.dumps(plain | change))
        lost += [] if refused(lambda: load_whisper(folder)) else [change]
    for text in ("", "[]", "{", '"x"', "null", "[" * 100_000, "\0"):
        (folder / "config.json").write_text(text)
        lost += [] if refused(lambda: load_whisper(folder)) else [text[:9]]
    assert not lost
    tally(len(changes) + 7, len(lost))


@pytest.mark.parametrize("part", ["experts/1/adapter_model", "gate"])
def test_a_bundles_tensors(bundle, micro_model, tmp_path, part, tally):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    path = folder / f"{part}.safetensors"
    lost, tried = [], 0
    for name in [name for name in load_file(path) if name != "limit"][:5]:
        more = lost_tensors(path, name, lambda: load_recogniser(folder, micro_model, CPU))
        lost, tried = lost + [(name, problem) for problem in more[0]], tried + more[1]
    assert not lost
    tally(tried, len(lost))


def test_a_bundles_description(bundle, micro_model, tmp_path, tally):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    plain = json.loads((folder / "recogniser.json").read_text())
    changes = [{name: value} for name in ("alpha", "seconds") for value in (math.nan, math.inf, 0, -1, "4", [], True)]
    changes += [
        {name: value}
        for name in ("rank", "num_experts", "top_k")
        for value in (10**9, 0, -1, 1.5, "2", None, math.nan, True, 10**40)
        if name != "top_k" or value not in (10**9, 10**40)  # then as many as there are
    ]
    changes += [{"targets": value} for value in ((), ["nothing"], "q_proj", None, [1])]
    changes += [{"within": "nowhere"}, {"mixture": "stew"}, {"adapt": "cook"}, {"pooling": "sum"}, {"context": "1s"}]
    changes += [{"margin": -1}, {"layer": -2}, {"task": "sing"}, {"base": None}, {"more": 1}]
    changes += [{"route_by": "mood"}, {"route_by": "table"}, {"adapt": "full"}, {"pooling": "meanstd"}]
    changes += [{"shared_rank": value} for value in (1, 10**9, -1, "2", 1.5)] + [{"groups": ["a", "b", "c"]}]
    changes += [{"gate": value} for value in (False, None, 1, "yes")]
    lost = []
    for change in changes:
        (folder / "recogniser.json").write_text(json.dumps(plain | change))
        lost += [] if refused(lambda: load_recogniser(folder, micro_model, CPU)) else [change]
    for name in plain.keys() - {"route_by", "column", "groups", "seconds"}:  # these have defaults
        (folder / "recogniser.json").write_text(json.dumps({k: v for k, v in plain.items() if k != name}))
        lost += [] if refused(lambda: load_recogniser(folder, micro_model, CPU)) else [f"no {name}"]
    assert not lost
    tally(len(changes) + len(plain) - 4, len(lost))


def test_a_gates_sizes(tmp_path, tally):
    save_gate(Gate(4, 8, 2), tmp_path)
    plain = json.loads((tmp_path / "gate.json").read_text())
    changes = [{name: value} for name in plain for value in (10**9, 0, -1, "4", None, 4.5, math.nan)]
    lost = []
    for change in changes:
        (tmp_path / "gate.json").write_text(json.dumps(plain | change))
        lost += [] if refused(lambda: load_gate(tmp_path)) else [change]
    (tmp_path / "gate.json").write_text(json.dumps(plain))
    tensors = load_file(tmp_path / "gate.safetensors")
    wrong = [{"std_D": torch.zeros(4)}, {"whiten_DD": torch.zeros(3, 4)}]
    wrong += [{"limit": torch.tensor(value)} for value in (math.nan, -math.inf, math.inf)]
    for change in wrong:
        save_file(tensors | change, tmp_path / "gate.safetensors")
        lost += [] if refused(lambda: load_gate(tmp_path)) else [change]
    assert not lost
    tally(len(changes) + len(wrong), len(lost))


def test_an_adapter_of_pefts(bundle, micro_model, tmp_path, tally):
    folder = shutil.copytree(bundle / "experts/0", tmp_path / "adapter")

    def load():
        open_model(str(folder), store=None, cache=tmp_path, base=str(micro_model), device="cpu")

    path = folder / "adapter_model.safetensors"
    lost, tried = lost_tensors(path, next(iter(load_file(path))), load)
    plain = json.loads((folder / "adapter_config.json").read_text())
    changes = [
        {name: value} for name in ("r", "lora_alpha") for value in (math.nan, math.inf, 10**9, -1, "x", [], 1e30)
    ]
    changes += [{"r": 0}, {"r": 3}, {"peft_type": "PROMPT_TUNING"}, {"peft_type": None}, {"target_modules": 5}]
    changes += [{"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, {"rank_pattern": {"fc1": 10**9}}]
    changes += [{"alpha_pattern": {"fc1": math.nan}}, {"target_modules": ["nothing"]}]
    for change in changes:
        (folder / "adapter_config.json").write_text(json.dumps(plain | change))
        lost += [] if refused(load) or change == {"lora_alpha": -1} else [change]
    for text in ("", "[]", "{", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        lost += [] if refused(load) else [text]
    assert not lost
    tally(tried + len(changes) + 4, len(lost))


def test_models_that_are_merged(bundle, tmp_path, tally):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    path = folder / "experts/2/adapter_model.safetensors"

    def load():
        merge_models([bundle, folder], [0.5, 0.5], tmp_path / "out")

    lost, tried = lost_tensors(path, next(iter(load_file(path))), load)
    assert not lost
    tally(tried, len(lost))


def test_what_is_whole_is_taken_in_every_type_of_weight(bundle, micro_model, tmp_path):
    folder = shutil.copytree(micro_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tied = {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"].clone()}  # as older checkpoints have it
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        typed = {name: value.to(kind) for name, value in (tensors | tied).items()}
        save_file(typed, folder / "model.safetensors", metadata={"format": "pt"})
        assert load_whisper(folder).proj_out.weight.dtype == torch.float32
    halves = {name: value.half() for name, value in read_adapter(bundle / "experts/0").items()}
    shutil.copytree(bundle, tmp_path / "bundle")
    save_file(halves, tmp_path / "bundle/experts/0/adapter_model.safetensors")
    assert asdict(load_recogniser(tmp_path / "bundle", micro_model, CPU)[1])["rank"] == 2
