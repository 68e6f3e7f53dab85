"""The spoken benchmark: splits that keep speakers, words and one group apart, and sounds that conflict."""

import random
from itertools import combinations

import pytest
from click.testing import CliRunner

pytest.importorskip("espeakng_loader")
pytest.importorskip("wordfreq")

from cli.main import cli
from common.data.audit import audit
from common.errors import UsageError
from demo.corpus import synthesize_bench
from demo.espeak import speak
from demo.sentences import (
    FUNCTION_WORDS,
    SHORT_PATTERNS,
    build_lexicon,
    held_out,
    make_sentence,
    training_lexicon,
)
from demo.voices import BENCH, BENCH_ALIKE, UNSEEN, cycle, replace_sounds, undone
from tests.demo.test_synth import content_pairs

SPLITS = ("train", "dev", "test")
PHONEMES = "k|'a|t s|,I|t w|'O:|k|s"
VOICE = {"variant": "m3", "rate": 150, "pitch": 50, "word_gap": 1, "seed": 1}


def made(out, **changes):
    return synthesize_bench(out, **{"minutes": 0.5, "speakers_per_etiology": 6, "seed": 5} | changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bench") / "corpus")


def words(texts):
    return {word for text in texts for word in text.lower().rstrip(".").split()} - FUNCTION_WORDS


def sentences(split, count):
    rng, lexicon = random.Random(split), training_lexicon() if split == "train" else build_lexicon()
    return [make_sentence(rng, split, lexicon, SHORT_PATTERNS) for _ in range(count)]


def test_the_same_arguments_give_the_same_bytes(small, tmp_path):
    again = made(tmp_path / "again", processes=1)
    assert again.digest == small.digest
    for u in small.utterances:
        assert small.path(u).read_bytes() == (tmp_path / "again" / u.audio_filepath).read_bytes()


def test_no_speaker_is_in_two_splits_and_test_has_the_most_held_out_ones(small):
    speakers = {split: {u.speaker for u in small.split(split)} for split in SPLITS}
    assert sum(map(len, speakers.values())) == len({u.speaker for u in small.utterances})
    assert {split: len(names) for split, names in speakers.items()} == {"train": 18, "dev": 6, "test": 14}


def test_one_group_speaks_in_test_alone(small):
    groups = {split: {u.etiology for u in small.split(split)} for split in SPLITS}
    assert groups["test"] == set(BENCH)
    assert groups["train"] == groups["dev"] == set(BENCH) - {UNSEEN}


def test_every_group_of_train_speaks_for_its_share_of_the_time(small):
    for name in set(BENCH) - {UNSEEN}:
        seconds = sum(u.duration for u in small.split("train") if u.etiology == name)
        assert 5 <= seconds < 5 + 3 * 5  # what was asked for, and the end of each of three speakers' last sentence


def test_the_audit_finds_nothing(small):
    assert audit(small) == []


def test_a_fifth_of_the_words_is_never_in_train():
    train, test = (words(sentences(split, 3000)) for split in ("train", "test"))
    assert not any(map(held_out, train))
    assert 0.15 < sum(map(held_out, test)) / len(test) < 0.25
    assert sum(map(held_out, test)) > 400


def test_at_the_committed_size_a_third_of_the_words_of_test_is_new():
    train, test = words(sentences("train", 950)), words(sentences("test", 120))
    assert len(test - train) / len(test) > 1 / 3


def test_no_pair_of_content_words_is_in_two_splits():
    pairs = {split: {pair for text in sentences(split, 2000) for pair in content_pairs(text)} for split in SPLITS}
    assert all(len(phrases) > 2000 for phrases in pairs.values())
    assert not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["dev"] and not pairs["dev"] & pairs["test"]


def test_patterns_bring_no_function_word_that_the_lexicon_does_not_know_of():
    """A new one would take words out of the lexicon, and so change every corpus that was ever made."""
    rest = {word for pattern in SHORT_PATTERNS for word in pattern.split() if not word.startswith("{")}
    assert rest <= FUNCTION_WORDS


def test_a_rule_merges_no_sounds_and_is_undone_by_its_reverse():
    rules = cycle("k", "t", "p") | cycle("I", "O:", "a")
    assert len(set(rules.values())) == len(rules)
    changed = replace_sounds(PHONEMES, rules, random.Random(0), 1.0)
    assert changed == "t|'I|p s|,O:|p w|'a|t|s"
    assert replace_sounds(changed, undone(rules), random.Random(0), 1.0) == PHONEMES


def test_any_two_groups_contradict_each_other():
    """What undoes the sounds of one spoils at least a third of the other's."""
    rules = {name: voice.sounds for name, voice in BENCH.items() if name != "typical"}
    assert all(len(set(sounds.values())) == len(sounds) > 20 for sounds in rules.values())
    for first, second in combinations(rules.values(), 2):
        assert sum(first[sound] != second[sound] for sound in first) >= len(first) / 3
    assert rules["north"] == undone(rules["south"]) and rules["east"] == undone(rules["west"])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_words_is_said_otherwise(share):
    spoken = " ".join(["k|a|t"] * 400)
    sounds = replace_sounds(spoken, cycle("k", "t", "p"), random.Random(0), share).split(" ")
    assert sounds.count("t|a|p") / 400 == pytest.approx(share, abs=0.08)
    assert set(sounds) <= {"t|a|p", "k|a|t"}


def test_phonemes_said_as_they_are_sound_like_the_text_and_replaced_ones_do_not():
    text = "The cat took the coat."
    plain, same = speak(text, **VOICE), speak(text, **VOICE, replace=lambda spoken: spoken)
    other = speak(text, **VOICE, replace=lambda spoken: replace_sounds(spoken, cycle("k", "s"), random.Random(0), 1.0))
    assert len(same) == pytest.approx(len(plain), rel=0.15)
    assert len(other) != len(same)


@pytest.mark.parametrize("changes", [{"speakers_per_etiology": 5}, {"minutes": 0}, {"minutes": float("nan")}])
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, changes):
    with pytest.raises(UsageError, match="at least 6 speakers"):
        made(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--minutes", "3"], ["--kind", "bench", "--utterances", "3"]])
def test_options_of_the_other_kind_are_refused(tmp_path, options):
    result = CliRunner().invoke(cli, ["corpus", "synth", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UsageError)
    assert list(tmp_path.iterdir()) == []


def test_alike_groups_differ_in_their_sounds_alone():
    for name, group in BENCH_ALIKE.items():
        assert (group.variants, group.rate, group.effect) == (BENCH_ALIKE["typical"].variants, (200, 250), None)
        assert (group.sounds, group.share) == (BENCH[name].sounds, BENCH[name].share)


def test_a_group_alone_speaks_as_it_does_among_all(tmp_path):
    alone = made(tmp_path / "alone", etiologies=[UNSEEN])
    everyone = made(tmp_path / "all")
    assert list(alone.utterances) == [u for u in everyone.utterances if u.etiology == UNSEEN]
    for u in alone.utterances[:2]:
        assert alone.path(u).read_bytes() == everyone.path(u).read_bytes()
    with pytest.raises(UsageError, match="unknown stand-in etiology 'atoll'"):
        made(tmp_path / "none", etiologies=["atoll"])


def test_held_out_speech_has_a_time_of_its_own(tmp_path):
    corpus = made(tmp_path / "corpus", alike=True, held_out_minutes=0.2)
    spoken = sum(u.duration for u in corpus.split("test") if u.etiology != UNSEEN)
    assert spoken >= 0.2 * 60
    assert spoken > 2 * sum(u.duration for u in corpus.split("train")) / 10
