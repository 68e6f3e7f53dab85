"""Hours of a configuration against hand-made sums."""

import pytest

from common.config import validate
from common.cost import audio_passes, from_rates

CONFIG = validate({"subsets": {"embeddings_percent": 10, "experts_percent": 20}, "experts": {"epochs": 3}})


def test_hours_of_speech_count_epochs_and_subsets():
    passes = audio_passes(CONFIG, hours=100)
    assert passes["cluster"] == pytest.approx(10)
    assert passes["experts"] == pytest.approx(100 * 0.2 * 3)
    assert passes["asr"] == pytest.approx(100 * CONFIG.asr.epochs)
    regular = validate({"asr": {"pretrain": "none"}})
    assert not {"cluster", "experts"} & set(audio_passes(regular, hours=100))


def test_measured_rates_give_hours_and_unmeasured_stages_are_left_out():
    rows = from_rates(CONFIG, hours=100, rates={"asr": 50.0})
    assert [(row.stage, row.gpu_hours) for row in rows] == [("asr", 100 * CONFIG.asr.epochs / 50)]
