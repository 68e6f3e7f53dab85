"""The model card says what the run measured, in a form that Hugging Face reads, and where its limits are."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from common.config import validate
from common.data.corpus import Utterance
from common.report.model_card import model_card
from common.storage.manifest import Manifest

RATES = {"wer_before": 0.5, "wer_after": 0.25, "cer_before": 0.4, "cer_after": 0.2, "wer_interval_after": [0.2, 0.3]}
SUMMARY = RATES | {
    "wer_before_unclipped": 0.6,
    "wer_after_unclipped": 0.26,
    "loops_before": 3,
    "loops_after": 1,
    "utterances": 40,
    "speakers": 4,
    "seconds": {"extract": 3.0, "asr": 200.0},
    "by_etiology": {
        "a|b": RATES | {"utterances": 30, "speakers": 3},
        "slurred": RATES | {"utterances": 10, "speakers": 1, "wer_after": 0.7},
    },
}
REPORT = {"experts": 4, "trained_parameters": 1234567, "steps": 100, "best_step": 80, "collapsed": False}
MANIFEST = Manifest(1, "asr", "0" * 32, None, "a", {}, "sha256:1", [], {}, {}, "0", "secret-host", 0.0, 1.0, {})
SPEECH = [
    Utterance("1", "1.wav", 3600.0, "x", "train", "ann"),
    Utterance("2", "2.wav", 1800.0, "x", "test", "bob"),
]


def card(tree=None, *, digest="sha256:9", summary=SUMMARY, report=REPORT, speech=SPEECH):
    config = validate({"run": "mine", "corpus": {"path": "/home/somebody/mine"}} | (tree or {}))
    text = model_card(
        config,
        summary=summary,
        report=report,
        manifest=MANIFEST,
        model_digest=digest,
        corpus_digest="sha256:7",
        utterances=speech,
    )
    return ModelCard(text), text


def test_hugging_face_reads_the_head_with_the_runs_own_rates():
    data = card()[0].data
    assert (data.library_name, data.pipeline_tag) == ("moe-asr", "automatic-speech-recognition")
    assert (data.language, data.metrics) == ("en", ["wer", "cer"])
    assert {"whisper", "lora", "mixture-of-experts"} <= set(data.tags)
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {"wer": 25.0, "cer": 20.0}
    assert {r.dataset_name for r in data.eval_results} == {"mine"}


def test_the_normaliser_is_the_one_of_the_run():
    assert "Texts are brought to one written form and then normalised\nas in Whisper" in card()[1]
    assert "Texts are normalised\nas in Whisper" in card({"decode": {"normaliser": "published"}})[1]


def test_a_translating_model_is_scored_in_english():
    made, text = card({"model": {"language": "de", "task": "translate"}})
    assert made.data.language == ["de", "en"]
    assert "Trained and scored in language `en`, on speech in `de`, on this one corpus" in text


def test_the_base_model_is_named_where_the_hub_knows_it_and_only_there():
    hub = card({"model": {"name": "openai/whisper-small", "revision": "abc"}}, digest="hub:openai/whisper-small@abc")
    assert hub[0].data.base_model == "openai/whisper-small"
    assert hub[0].data.to_dict()["base_model_relation"] == "adapter"
    assert "`openai/whisper-small`, revision `abc`" in hub[1]
    local = card({"model": {"name": "models/tiny"}})
    assert local[0].data.base_model is None
    assert "local checkpoint `tiny` (sha256:9)" in local[1]


def test_nothing_of_the_machine_gets_into_the_card():
    text = card()[1]
    assert "secret-host" not in text
    assert "/home/somebody" not in text


def test_limits_follow_from_the_figures():
    text = card()[1]
    assert "One speaker alone stands for: slurred." in text
    assert "WER rose for: slurred." in text
    assert "4 speakers are few" in text
    assert "collapsed" not in text
    assert "experts collapsed" in card(report=REPORT | {"collapsed": True})[1]
    many = {"name": RATES | {"utterances": 40, "speakers": 40}}
    assert "are few" not in card(summary=SUMMARY | {"speakers": 40, "by_etiology": many})[1]


def test_speakers_in_two_splits_are_told():
    assert "No speaker is in two splits." in card()[1]
    assert (
        "Speakers in more than one split: 1."
        in card(speech=[*SPEECH, Utterance("3", "3.wav", 1.0, "x", "test", "ann")])[1]
    )


def test_a_name_with_a_bar_does_not_break_the_table():
    rows = [line for line in card()[1].splitlines() if line.startswith("| a")]
    assert rows == [r"| a\|b | 30 | 50.0% | 25.0% | 20.0% to 30.0% | 40.0% | 20.0% |"]


@pytest.mark.parametrize(
    ("tree", "report", "words", "tag"),
    [
        ({"asr": {"adapt": "full"}}, {"experts": 0}, "all weights fine-tuned", "full-fine-tune"),
        ({}, {"experts": 1}, "one LoRA adapter", "lora"),
        ({"asr": {"mixture": "hard"}}, {"experts": 4}, "4 LoRA experts, one per utterance", "mixture-of-experts"),
    ],
)
def test_the_card_says_what_kind_of_model_it_is(tree, report, words, tag):
    made, text = card(tree, report=REPORT | report)
    assert words in text
    assert tag in made.data.tags
    assert ("mixture-of-experts" in made.data.tags) == (report["experts"] > 1)
