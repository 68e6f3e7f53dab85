"""Merged adapters add exactly the weighted sum of what each added."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from common.errors import DataError, UsageError
from common.export.formats import probe
from common.export.merge import merge_models
from common.model.adapters import read_adapter
from common.model.bundle import read_info
from common.model.recogniser import Recogniser
from common.model.whisper import load_whisper
from tests.common.export.test_formats import BY_TABLE, make_bundle, opened


@pytest.fixture(scope="module")
def two(tmp_path_factory, micro_model):
    """Two runs of different ranks on one base."""
    folder = tmp_path_factory.mktemp("two")
    return [
        make_bundle(folder / "a", micro_model, experts=1, rank=4, seed=1),
        make_bundle(folder / "b", micro_model, experts=1, rank=6, seed=2),
    ]


def delta(folder, part="experts/0"):
    """Layer → what an adapter adds to its weight."""
    config = json.loads((folder / part / "adapter_config.json").read_text())
    tensors = read_adapter(folder / part)
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removesuffix(".lora_A.weight"): scale * tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if "lora_A" in name
    }


def test_the_sum_of_ranks_is_exact(two, tmp_path):
    assert merge_models(two, [0.7, 0.3], tmp_path) == 10
    parts, whole = [delta(folder) for folder in two], delta(tmp_path)
    for name, added in whole.items():
        torch.testing.assert_close(added, 0.7 * parts[0][name] + 0.3 * parts[1][name], rtol=1e-5, atol=1e-6)


def test_it_equals_pefts_weighted_adapter(two, tmp_path, micro_model):
    merge_models(two, [0.7, 0.3], tmp_path / "out")
    peft = PeftModel.from_pretrained(load_whisper(micro_model), two[0] / "experts/0", adapter_name="a")
    peft.load_adapter(two[1] / "experts/0", adapter_name="b")
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", combination_type="cat")
    peft.set_adapter("both")
    ours = opened(tmp_path / "out", tmp_path)
    expected = probe(Recogniser(peft.get_base_model()), ours.codec, {})
    torch.testing.assert_close(probe(ours.recogniser, ours.codec, {0: 1.0}), expected, rtol=1e-3, atol=1e-2)


def test_the_mean_of_the_matrices_is_not_the_mean_of_the_models(two, tmp_path, micro_model):
    same_rank = make_bundle(tmp_path / "c", micro_model, experts=1, rank=4, seed=3)
    merge_models([two[0], same_rank], [0.5, 0.5], tmp_path / "out")
    tensors = [read_adapter(folder / "experts/0") for folder in (two[0], same_rank)]
    for name, added in delta(tmp_path / "out").items():
        a, b = ((tensors[0][f"{name}.lora_{m}.weight"] + tensors[1][f"{name}.lora_{m}.weight"]) / 2 for m in "AB")
        assert (2 * b @ a - added).norm() > 0.3 * added.norm()


def test_mixtures_with_one_gate_are_merged_expert_by_expert(tmp_path, micro_model):
    runs = [make_bundle(tmp_path / name, micro_model, shared=6, seed=1) for name in "ab"]
    for part in ("experts/1", "shared"):
        (runs[1] / part / "adapter_model.safetensors").write_bytes(
            (runs[0] / "experts/2" / "adapter_model.safetensors").read_bytes()
        )
    merge_models(runs, [0.25, 0.75], tmp_path / "out")
    for part in ("experts/0", "experts/1", "experts/2", "shared"):
        parts = [delta(folder, part) for folder in runs]
        for name, added in delta(tmp_path / "out", part).items():
            torch.testing.assert_close(added, 0.25 * parts[0][name] + 0.75 * parts[1][name], rtol=1e-5, atol=1e-6)
    assert opened(tmp_path / "out", tmp_path).recogniser.gate is not None


def test_mixtures_routed_by_one_table_are_merged_and_those_by_different_tables_are_refused(tmp_path, micro_model):
    runs = [make_bundle(tmp_path / str(seed), micro_model, shared=6, seed=seed, **BY_TABLE) for seed in (1, 2)]
    merge_models(runs, [0.5, 0.5], tmp_path / "out")
    merged = opened(tmp_path / "out", tmp_path)
    assert merged.recogniser.gate is None and merged.info.groups == ("a", "b", "c")
    other = make_bundle(tmp_path / "other", micro_model, shared=6, **BY_TABLE | {"groups": ("a", "b", "d")})
    with pytest.raises(UsageError, match=r"has groups \('a', 'b', 'd'\)"):
        merge_models([runs[0], other], [0.5, 0.5], tmp_path / "refused")
    both = make_bundle(tmp_path / "both", micro_model, shared=6, gate=True, **BY_TABLE)
    with pytest.raises(UsageError, match="has gate True"):
        merge_models([runs[0], both], [0.5, 0.5], tmp_path / "refused")


def test_mixtures_with_different_gates_are_refused(tmp_path, micro_model):
    runs = [make_bundle(tmp_path / str(seed), micro_model, seed=seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match="mixtures with different gates"):
        merge_models(runs, [0.5, 0.5], tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"), [("base_digest", "sha256:other"), ("context", "30s"), ("targets", ("q_proj",))]
)
def test_strangers_are_refused(two, tmp_path, field, value, micro_model):
    other = make_bundle(tmp_path / "other", micro_model, experts=1)
    (other / "recogniser.json").write_text(json.dumps(asdict(replace(read_info(other), **{field: value}))))
    with pytest.raises(UsageError, match=f"has {field}"):
        merge_models([two[0], other], [0.5, 0.5], tmp_path / "out")


def test_a_full_fine_tune_is_refused(two, tmp_path, micro_model):
    full = make_bundle(tmp_path / "full", micro_model, adapt="full")
    with pytest.raises(UsageError, match="only adapters can be merged"):
        merge_models([full, two[0]], [0.5, 0.5], tmp_path / "out")


def test_an_adapter_that_lacks_a_layer_is_refused(two, tmp_path, micro_model):
    other = make_bundle(tmp_path / "other", micro_model, experts=1)
    tensors = read_adapter(other / "experts/0")
    few = {name: value for name, value in tensors.items() if ".encoder.layers.0.fc1." not in name}
    save_file(few, other / "experts/0" / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"differ in model\.encoder\.layers\.0\.fc1"):
        merge_models([two[0], other], [0.5, 0.5], tmp_path / "out")


def test_a_folder_that_is_no_model_is_named(two, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        merge_models([two[0], tmp_path / "nowhere"], [0.5, 0.5], tmp_path / "out")
