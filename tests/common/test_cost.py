"""Hours of a configuration against hand-made sums."""

import pytest

from common.config import validate
from common.cost import SCORING, Pace, StageCost, audio_passes, costs, measured_pace

SUBSETS = {"embeddings_percent": 10, "experts_percent": 20}
CONFIG = validate({"subsets": SUBSETS, "experts": {"epochs": 3}, "asr": {"pretrain": "alone"}})


def test_hours_of_speech_count_epochs_and_subsets():
    passes = audio_passes(CONFIG, 100, 0)
    assert passes["experts"] == pytest.approx(100 * 0.2 * 3)
    assert passes["asr"] == pytest.approx(100 * CONFIG.asr.epochs)
    assert passes["extract"] == pytest.approx(120) and passes[SCORING] == pytest.approx(20)


def test_limits_of_steps_and_of_utterances_are_kept():
    subsets = {**SUBSETS, "asr_samples": 7200, "dev_samples": 360, "test_samples": 36}
    steps = {"max_steps": 50, "batch_size": 8, "gradient_accumulation_steps": 2}
    limited = validate({"subsets": subsets, "num_experts": 3, "asr": {"pretrain": "alone"}, "experts": steps})
    passes = audio_passes(limited, 100, 5.0)
    assert passes["asr"] == pytest.approx(10 * limited.asr.epochs)  # 7200 utterances of 5 s are 10 hours
    assert passes[SCORING] == pytest.approx(2 * 36 * 5 / 3600)
    assert passes["extract"] == pytest.approx(20 + 0.5 + 0.05)
    assert passes["experts"] == pytest.approx(3 * 50 * 16 * 5 / 3600)
    few = validate({"asr": {"max_steps": 100, "batch_seconds": 240}})
    assert audio_passes(few, 100, 5.0)["asr"] == pytest.approx(100 * 240 / 3600)


def test_measured_rates_give_hours_and_unmeasured_stages_are_left_out():
    pace = Pace({"asr": 50.0}, 0, "cuda")
    assert costs(CONFIG, stages=("experts", "asr"), hours=100, pace=pace) == [
        StageCost("asr", 100 * CONFIG.asr.epochs, 100 * CONFIG.asr.epochs / 50)
    ]


def test_the_pace_is_per_device_and_scoring_has_its_own():
    throughput = {"processes": 2, "samples": 100, "audio_seconds": 500}
    asr = {"device": "cuda", "throughput": throughput, "scoring": {"audio_seconds": 60, "seconds": 20}}
    tasks = [("extract", 10, {"audio_seconds": 1000}), ("extract", 10, {"audio_seconds": 2000}), ("asr", 45, asr)]
    assert measured_pace(tasks) == Pace({"extract": 150, "asr": 10, SCORING: 1.5}, 5.0, "cuda")
    assert measured_pace([("cluster", 3, {"clusters": 2})]) == Pace({}, 0.0, "")
