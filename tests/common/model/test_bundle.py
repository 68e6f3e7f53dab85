"""Trained models on disk: what is damaged is told in one line, never by a traceback."""

import json
import shutil

import pytest
import torch

from common.errors import DataError
from common.model.bundle import load_gate, save_gate
from common.model.gate import Gate
from common.model.whisper import load_whisper


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def test_a_truncated_checkpoint_is_refused(micro_model, tmp_path):
    shutil.copytree(micro_model, tmp_path / "model")
    cut(tmp_path / "model" / "model.safetensors")
    with pytest.raises(DataError, match=r"model .* cannot be loaded: .*incomplete|invalid"):
        load_whisper(tmp_path / "model")


@pytest.mark.parametrize("damage", ["cut", "text", "missing key", "other sizes"])
def test_a_damaged_gate_is_refused(tmp_path, damage):
    save_gate(Gate(4, 8, 2), tmp_path)
    sizes = tmp_path / "gate.json"
    if damage == "cut":
        cut(tmp_path / "gate.safetensors")
    elif damage == "text":
        sizes.write_text("[]")
    elif damage == "missing key":
        sizes.write_text(json.dumps({"dim": 4, "hidden": 8}))
    else:
        sizes.write_text(json.dumps({"dim": 4, "hidden": 8, "num_experts": 3}))
    with pytest.raises(DataError, match=f"gate in {tmp_path} cannot be read"):
        load_gate(tmp_path)


def test_a_gate_without_a_limit_survives_disk(tmp_path):
    gate = Gate(4, 8, 3)
    save_gate(gate, tmp_path)
    loaded = load_gate(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in gate.state_dict().items())
    assert loaded.decide(loaded.evidence(torch.full((2, 4), 1e6)))[1].all()
