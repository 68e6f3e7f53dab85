"""What the regimes' options mean in the configuration."""

import pytest

from common.config import resolve, validate
from common.errors import ConfigError, UsageError
from common.options import config_from
from stages.asr.run import rank_plan


def test_without_pre_training_data_percent_scales_the_asr_data_alone():
    whole, scaled = resolve("full").subsets, resolve("full", data_percent=50).subsets
    alone = resolve("full", data_percent=50, options={"asr.pretrain": "none"}).subsets
    for name in ("embeddings_percent", "experts_percent", "asr_percent"):
        assert getattr(scaled, name) == getattr(whole, name) / 2
    assert alone.asr_percent == whole.asr_percent / 2
    assert (alone.embeddings_percent, alone.experts_percent) == (whole.embeddings_percent, whole.experts_percent)


def test_data_percent_scales_numbers_of_utterances_too():
    quick = resolve("quick", data_percent=20).subsets  # of 10, 5 and 5
    assert (quick.embeddings_samples, quick.experts_samples, quick.asr_samples) == (2, 1, 1)
    assert resolve("full", data_percent=20).subsets.asr_samples is None


def test_skipping_pre_training_needs_the_number_of_experts():
    with pytest.raises(UsageError, match="num_experts must be specified"):
        config_from({"skip_pretraining": True})
    config = config_from({"skip_pretraining": True, "num_experts": 4})
    assert (config.asr.pretrain, config.num_experts) == ("none", 4)


def test_adalora_ends_with_the_ranks_of_lora_unless_told_otherwise():
    plan = rank_plan(validate({"lora": {"rank": 8}}))
    assert (plan.init_rank, plan.target_rank) == (12, 8)
    plan = rank_plan(validate({"adalora": {"init_rank": 20, "target_rank": 4, "final": 0.5}}))
    assert (plan.init_rank, plan.target_rank, plan.last(100)) == (20, 4, 50)


@pytest.mark.parametrize(
    ("adalora", "message"),
    [
        ({"warmup": 0.6, "final": 0.4}, "leave no step in between"),
        ({"init_rank": 4, "target_rank": 8}, "init_rank: 4 is below the mean rank of 8"),
        ({"init_rank": 4}, "init_rank: 4 is below the mean rank of 16"),
    ],
)
def test_adalora_settings_that_cannot_be_are_refused(adalora, message):
    with pytest.raises(ConfigError, match=message):
        validate({"asr": {"adapt": "adalora"}, "adalora": adalora})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("gating.select_by", "wer"),  # neither is decoded
        ("experts.select_by", "wer"),
        ("runtime.device", "gpu"),
        ("runtime.device", "cuda:"),
        ("extract.layer", -2),
        ("lora.targets", ["q_proj", "vproj"]),
        ("lora.targets", []),
        ("decode.max_new_tokens", 444),  # prompt 4 and end 1: 449 of the decoder's 448 positions
    ],
)
def test_what_no_stage_could_do_is_refused_at_once(path, value):
    with pytest.raises(ConfigError, match=path):
        resolve("full", options={path: value})


def test_the_output_projection_is_in_neither_part_of_the_model():
    targets = ["q_proj", "proj_out"]
    assert resolve("full", options={"lora.targets": targets}).lora.targets == tuple(targets)
    with pytest.raises(ConfigError, match="proj_out is outside the blocks"):
        resolve("full", options={"lora.targets": targets, "lora.modules": "encoder"})


def test_devices_that_there_may_be_are_let_through():
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:11"):
        assert resolve("full", options={"runtime.device": device}).runtime.device == device
