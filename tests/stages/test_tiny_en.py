"""The real Whisper tiny.en on espeak-ng's speech: training lowers the word error rate of a speaker it never heard."""

import pytest

from demo.corpus import synthesize
from stages.local_runner import run_pipeline
from tests.stages.test_local_runner import micro_config


@pytest.mark.timeout(600)
def test_one_expert_lowers_the_error_rate_of_an_unseen_speaker(tmp_path, tiny_en):
    corpus = tmp_path / "corpus"
    synthesize(corpus, speakers_per_etiology=5, utterances_per_speaker=8, seed=1, etiologies=["rushed"])
    config = micro_config(
        tmp_path / "store",
        tiny_en,
        corpus,
        num_experts=1,
        asr__epochs=3,
        asr__batch_size=4,
        asr__learning_rate=1e-3,
        asr__select_by="loss",
        lora={"rank": 8, "alpha": 16},
        decode__max_new_tokens=60,
    )
    summary = run_pipeline(config)
    assert 0.2 < summary["wer_before"] <= 1
    assert summary["wer_after"] < 0.67 * summary["wer_before"]
