"""Synthetic corpora: equal bytes for a seed, an open vocabulary, splits that share neither speaker nor phrase."""

import random
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")
pytest.importorskip("wordfreq")

from common.data.audio import audio_info, read_audio
from common.data.audit import audit
from common.data.corpus import read_corpus
from common.errors import DataError, UsageError
from common.text import normalise
from demo import effects as synth_effects
from demo.corpus import STAND_INS, speak, synthesize
from demo.sentences import FUNCTION_WORDS, PATTERNS, build_lexicon, make_sentence

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "corpus"
    return synthesize(out, speakers_per_etiology=3, utterances_per_speaker=2, seed=5)


def sentences(split: str, count: int, seed: int = 0) -> list[str]:
    rng = random.Random(f"{split}{seed}")
    return [make_sentence(rng, split, build_lexicon()) for _ in range(count)]


def test_there_are_six_stand_ins_and_typical_speech(small):
    assert {u.etiology for u in small.utterances} == set(STAND_INS)
    assert "typical" in STAND_INS and len(STAND_INS) >= 7
    assert len(small.utterances) == len(STAND_INS) * 3 * 2


def test_every_speaker_is_in_one_split_and_every_split_has_every_etiology(small):
    assert len({(u.speaker, u.split) for u in small.utterances}) == len({u.speaker for u in small.utterances})
    for split in SPLITS:
        assert {u.etiology for u in small.split(split)} == set(STAND_INS)


def test_the_audio_is_as_the_index_says_and_the_audit_finds_nothing(small):
    assert audit(small) == []
    for u in small.utterances:
        info = audio_info(small.path(u))
        assert (info.rate, info.channels) == (16000, 1)
        assert abs(info.duration - u.duration) < 1e-3
        assert 0.8 < u.duration < 15


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path):
    def bytes_of(name: str, **changes: object) -> dict[str, bytes]:
        options = {
            "speakers_per_etiology": 3,
            "utterances_per_speaker": 2,
            "seed": 1,
            "etiologies": ["rushed", "halting"],
        }
        synthesize(tmp_path / name, **options | changes)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    first, again, other = bytes_of("first"), bytes_of("again", processes=1), bytes_of("other", seed=2)
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_nothing_is_left_when_speaking_fails(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("demo.corpus._speak_all", fail)
    with pytest.raises(Exception, match="No space left on device"):
        synthesize(tmp_path / "out", speakers_per_etiology=3, utterances_per_speaker=1, seed=1, etiologies=["typical"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"etiologies": ["typical", "hoarse"]}, "'hoarse'.*typical, breathy"),
        ({"etiologies": []}, "no stand-in etiology"),
        ({"speakers_per_etiology": 2}, "at least 3 speakers"),
        ({"utterances_per_speaker": 0}, "with 1 utterance"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, changes, message):
    options = {"speakers_per_etiology": 3, "utterances_per_speaker": 1, "seed": 1}
    with pytest.raises(UsageError, match=message):
        synthesize(tmp_path / "out", **options | changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep", encoding="utf-8")
    with pytest.raises(UsageError, match="already exists"):
        synthesize(tmp_path, speakers_per_etiology=3, utterances_per_speaker=1, seed=1, etiologies=["typical"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("package", ["espeakng_loader"])
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r"pip install moe-asr\[demo\]"):
        synthesize(tmp_path / "out", speakers_per_etiology=3, utterances_per_speaker=1, seed=1)


def test_an_unknown_voice_is_named():
    with pytest.raises(DataError, match="no-such-voice"):
        speak("hello", variant="no-such-voice", rate=150, pitch=50, word_gap=0, seed=1)


def test_the_index_can_be_read_again(small):
    assert read_corpus(small.root) == small


def content_pairs(sentence):
    """Neighbouring content words of a sentence, function words skipped."""
    words = [word for word in sentence.lower().rstrip(".").split() if word not in FUNCTION_WORDS]
    return list(pairwise(words))


def test_no_phrase_of_two_content_words_is_in_two_splits():
    pairs = {split: {pair for text in sentences(split, 3000) for pair in content_pairs(text)} for split in SPLITS}
    assert all(len(phrases) > 5000 for phrases in pairs.values())
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["dev"]
    assert not pairs["dev"] & pairs["test"]
    assert all(len(content_pairs(text)) >= 2 for text in sentences("train", 500))


def test_the_vocabulary_is_open():
    texts = sentences("train", 2000)
    assert len(set(texts)) == 2000
    words = {word for text in texts for word in text.lower().rstrip(".").split()} - FUNCTION_WORDS
    assert len(words) > 2000
    assert len({pair for text in texts for pair in content_pairs(text)}) > 4000
    assert len(PATTERNS) == len(set(PATTERNS)) >= 30


def test_whispers_normaliser_changes_nothing_but_capitals_and_the_full_stop():
    for text in sentences("dev", 500):
        assert normalise(text) == text.lower().rstrip(".")
        assert text[0].isupper() and text.endswith(".") and text[:-1].replace(" ", "").isalpha()


def test_content_words_are_plain_and_each_has_its_place():
    lexicon = build_lexicon()
    words = {*lexicon.nouns, *lexicon.plurals, *lexicon.verbs, *lexicon.adjectives, *lexicon.adverbs}
    assert len(words) > 2500
    assert not words & FUNCTION_WORDS
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) >= 5 for word in words)
    assert all(word.endswith("ed") for word in lexicon.verbs)


def test_articles_go_by_sound():
    texts = " ".join(sentences("train", 4000)).lower()
    assert " an hour" not in texts or " a hour" not in texts
    assert " an uni" not in texts and " a ac" not in texts and " an ac" in texts


VOICE = (
    np.sin(np.arange(32000) * 0.1).astype(np.float32) * (1 + np.sin(np.arange(32000) * 0.002)).astype(np.float32) / 2
)


@pytest.mark.parametrize(
    ("effect", "strength"),
    [(s.effect, end) for s in STAND_INS.values() if s.effect is not None for end in s.strength],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_effects_are_finite_float32_deterministic_and_change_the_signal(effect, strength):
    once, twice = (effect(VOICE, np.random.default_rng(3), strength) for _ in range(2))
    assert once.dtype == np.float32 and once.ndim == 1 and np.isfinite(once).all()
    assert np.array_equal(once, twice)
    assert len(once) >= len(VOICE)
    assert not np.allclose(once[: len(VOICE)], VOICE, atol=0.01)


def test_muffling_removes_what_is_above_the_cutoff():
    high = np.sin(2 * np.pi * 4000 * np.arange(16000) / 16000).astype(np.float32)
    low = np.sin(2 * np.pi * 200 * np.arange(16000) / 16000).astype(np.float32)
    out = synth_effects.muffle(high + low, np.random.default_rng(0), 1000)
    assert np.allclose(out, low, atol=0.01)


def test_smearing_over_one_frame_changes_nothing():
    out = synth_effects.smear(VOICE, np.random.default_rng(0), 0.0)
    inner = slice(1000, -1000)
    scale = float(out[inner] @ VOICE[inner] / (VOICE[inner] @ VOICE[inner]))
    assert np.allclose(out[inner], scale * VOICE[inner], atol=1e-3)


def test_halting_speech_keeps_all_that_was_said(small):
    out = synth_effects.repeat_syllables(VOICE, np.random.default_rng(0), 0.6)
    assert len(out) > len(VOICE) + 1600
    assert np.array_equal(out[-1600:], VOICE[-1600:])


def test_severity_grows_with_the_strength(small):
    severities = {u.severity for u in small.utterances if u.etiology != "typical"}
    assert severities == {"mild", "moderate", "severe"}
    assert {u.severity for u in small.utterances if u.etiology == "typical"} == {""}


def test_utterances_of_one_speaker_differ(small):
    by_text = {replace(u, id="", audio_filepath="") for u in small.utterances}
    assert len(by_text) == len(small.utterances)
    first, second = small.utterances[:2]
    assert not np.array_equal(read_audio(small.path(first))[:8000], read_audio(small.path(second))[:8000])
