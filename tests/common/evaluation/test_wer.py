"""Error rates agree with hand counts and with jiwer, and keep the promises that a report makes of them."""

import random

import jiwer
import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.wer import (
    Score,
    bootstrap_interval,
    cer,
    duration_bucket,
    paired_bootstrap,
    score,
    summarise,
    wer,
)
from common.sections import ModelConfig
from common.text import is_hallucination_loop, normalise

WORDS = ["river", "house", "the", "stood", "quiet", "name", "old", "nobody", "near", "a", "remembered"]


def _texts(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(count)]


def _pairs(count=200):
    return list(zip(_texts(count, 1), _texts(count, 2), strict=True))


def _scores(count=200):
    return [score(f"u{i:03}", said, [meant]) for i, (said, meant) in enumerate(_pairs(count))]


def _speakers(scores, count=20):
    return {score.id: f"s{i % count}" for i, score in enumerate(scores)}


def test_hand_counted_errors():
    # the→a, and two mats too many
    counted = score("u", "A cat sat on the mat, mat, mat.", ["the cat sat on the mat"])
    assert (counted.words, counted.word_errors, counted.word_insertions) == (6, 3, 2)
    assert (counted.id, counted.reference, counted.loop) == ("u", 0, False)
    # "cat sat" and "cat at": one letter
    letters = score("u", "cat at", ["cat sat"])
    assert (letters.chars, letters.char_errors) == (7, 1)
    assert wer([counted, letters]) == 4 / 8
    assert cer([letters]) == 1 / 7


def test_clipped_rate_caps_each_utterance_at_its_words():
    endless = score("u0", "yes " * 50, ["no"])  # 1 word, 50 errors
    right = score("u1", "one two three", ["one two three"])
    assert endless.word_errors == 50
    assert wer([endless, right]) == 1 / (endless.words + right.words)
    assert wer([endless, right], clipped=False) == 50 / (endless.words + right.words)


def test_unclipped_counts_equal_jiwers():
    for said, meant in _pairs():
        counted, expected = score("u", said, [meant]), jiwer.process_words(meant, said)
        assert counted.word_errors == expected.substitutions + expected.deletions + expected.insertions
        assert counted.char_errors / counted.chars == pytest.approx(jiwer.cer(meant, said))
        assert counted.word_insertions - expected.insertions == 0


def test_rates_of_a_set_equal_jiwers():
    said, meant = map(list, zip(*_pairs(), strict=True))
    assert wer(_scores(), clipped=False) == pytest.approx(jiwer.wer(meant, said))
    assert cer(_scores(), clipped=False) == pytest.approx(jiwer.cer(meant, said))


def test_rate_is_zero_exactly_when_texts_are_equal_after_normalisation():
    for said, meant in [*_pairs(), ("Colour, 20!", "color twenty"), ("it's", "it is"), ("on", "no")]:
        assert (wer([score("u", said, [meant])]) == 0) == (normalise(said) == normalise(meant))


def test_clipped_is_at_most_unclipped_and_at_most_one():
    for some in (_scores(), *([s] for s in _scores())):
        assert wer(some) <= min(1, wer(some, clipped=False))
        assert cer(some) <= min(1, cer(some, clipped=False))


def test_order_of_utterances_changes_nothing():
    scores = _scores()
    shuffled = random.Random(3).sample(scores, len(scores))
    speakers = _speakers(scores)
    assert summarise(scores, speakers) == summarise(shuffled, speakers)


def test_best_reference_is_used_and_the_first_of_equals():
    second = score("u", "the river", ["a house here", "The river."])
    assert (second.reference, second.word_errors, second.words) == (1, 0, 2)
    assert score("u", "the river", ["the river", "The river."]).reference == 0


def test_best_of_two_is_never_worse_than_the_first():
    rng = random.Random(5)
    for said, meant in _pairs():
        other = " ".join(rng.choices(WORDS, k=4))
        assert wer([score("u", said, [meant, other])], clipped=False) <= wer([score("u", said, [meant])], clipped=False)


def test_shorter_reference_wins_by_rate_not_by_number_of_errors():
    # 1 error in 10 words beats 1 error in 2.
    assert score("u", "a b c d e f g h i x", ["i z", "a b c d e f g h i j"]).reference == 1


def test_empty_texts():
    silence = score("u", "", [""])
    assert (silence.words, silence.word_errors, silence.chars, silence.char_errors) == (0, 0, 0, 0)
    assert wer([silence]) == wer([silence], clipped=False) == 0
    invented = score("u", "thank you", ["um, [laughs]"])
    assert (invented.words, invented.word_errors, invented.word_insertions) == (0, 2, 2)
    assert (wer([invented]), wer([invented], clipped=False)) == (0, 1)
    right = score("v", "old house", ["old house"])
    assert wer([invented, right], clipped=False) == 2 / 2
    assert wer([score("u", "", ["two words"])]) == 1
    assert score("u", "word", ["", "other"]).reference == 1
    assert wer([]) == cer([]) == 0


def test_no_reference_is_refused_by_name():
    with pytest.raises(DataError, match="utterance 'u7' has no reference"):
        score("u7", "text", [])


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Mr. Smith's COLOUR, um, won't cost $20!", "en", "mister smith is color will not cost $20"),
        ("  twenty one  ", "en-GB", "21"),
        ("Café, Straße!", "de", "café straße"),
        ("colour twenty", "fr_FR", "colour twenty"),
        ("今日は", "ja", "今 日 は"),
        ("", "en", ""),
    ],
)
def test_normaliser_of_each_language(text, language, expected):
    assert normalise(text, language) == expected


def test_interval_contains_the_rate_and_narrows_with_speakers():
    scores = _scores(400)
    widths = []
    for count in (5, 50, 400):
        low, high = bootstrap_interval(scores, _speakers(scores, count), metric="wer_unclipped")
        assert low <= wer(scores, clipped=False) <= high
        widths.append(high - low)
    assert all(width > 0 for width in widths)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        rates = rng.beta(2, 8, size=40)  # of speakers; the mean is 0.2
        scores = [Score(f"u{i}", 200, rng.binomial(200, rate), 0, 1, 0, 0) for i, rate in enumerate(rates)]
        low, high = bootstrap_interval(scores, {}, resamples=300, seed=trial)
        hits += low <= 0.2 <= high
    assert 88 <= hits <= 99


def test_interval_is_wider_when_speakers_differ_more_than_their_utterances():
    scores = [Score(f"u{i}", 10, 10 * (i < 50), 0, 1, 0, 0) for i in range(100)]
    alike = {f"u{i}": f"s{i // 10}" for i in range(100)}  # every speaker all right or all wrong
    low, high = bootstrap_interval(scores, alike)
    low_u, high_u = bootstrap_interval(scores, {})
    assert high - low > 2 * (high_u - low_u)


def test_interval_of_one_speaker_is_its_rate():
    scores = _scores()
    assert bootstrap_interval(scores, dict.fromkeys([score.id for score in scores], "s")) == (wer(scores), wer(scores))


def test_interval_depends_on_the_seed_alone(monkeypatch):
    scores = _scores()
    speakers = _speakers(scores)
    first = bootstrap_interval(scores, speakers, seed=1)
    assert first == bootstrap_interval(scores, speakers, seed=1) != bootstrap_interval(scores, speakers, seed=2)
    monkeypatch.setattr("common.evaluation.wer.RESAMPLE_BLOCK", 700)  # several blocks, the last one shorter
    assert bootstrap_interval(scores, speakers, seed=1) == pytest.approx(first, abs=0.02)
    assert bootstrap_interval([], {}) == (0, 0)


def test_paired_bootstrap_sees_a_small_steady_gain_that_single_intervals_hide():
    rng = np.random.default_rng(0)
    before = [Score(f"u{i}", 100, int(errors), 0, 1, 0, 0) for i, errors in enumerate(rng.integers(10, 90, 60))]
    after = [Score(score.id, 100, score.word_errors - 3, 0, 1, 0, 0) for score in before]
    difference = paired_bootstrap(before, after[::-1], {})
    assert difference["delta"] == pytest.approx(-0.03)
    assert difference["low"] == pytest.approx(-0.03) == difference["high"]
    assert difference["p"] == pytest.approx(2 / 1001)
    single = bootstrap_interval(before, {})
    assert single[0] < wer(after) < single[1]
    swapped = paired_bootstrap(after, before, {})
    assert (swapped["delta"], swapped["p"]) == (pytest.approx(0.03), difference["p"])


def test_paired_bootstrap_of_a_system_with_itself_finds_nothing():
    scores = _scores()
    assert paired_bootstrap(scores, scores, _speakers(scores)) == {"delta": 0, "low": 0, "high": 0, "p": 1}


def test_paired_bootstrap_interval_contains_the_difference():
    a, b = _scores(), [score(f"u{i:03}", said, [meant]) for i, (meant, said) in enumerate(_pairs())]
    for metric, rate in (("wer", wer), ("cer", cer)):
        difference = paired_bootstrap(a, b, _speakers(a), metric=metric)
        assert difference["delta"] == pytest.approx(rate(b) - rate(a))
        assert difference["low"] <= difference["delta"] <= difference["high"]
        assert 0 < difference["p"] <= 1


def test_paired_bootstrap_refuses_different_utterances():
    scores = _scores(3)
    with pytest.raises(DataError, match="'u002' is not in both"):
        paired_bootstrap(scores, scores[:2], {})
    with pytest.raises(DataError, match="scored twice"):
        paired_bootstrap(scores, [*scores, scores[0]], {})


@pytest.mark.parametrize(
    ("said", "meant", "loop"),
    [
        ("i went to the the the the the", "i went to the shop", True),
        ("thank you for watching " * 6, "thank you", True),
        ("no no no no", "no no no no", False),
        ("no no no no no", "no no no no", False),
        ("one two three four five six seven eight", "one", False),
        ("the the the the", "a long sentence that was said by someone", False),
        ("lalalalalalalalalalala", "la", True),
        ("111111111111111111111111111111", "one", True),
        ("", "", False),
        ("", "words", False),
    ],
)
def test_loops_are_told_from_long_or_repetitive_speech(said, meant, loop):
    assert is_hallucination_loop(said, meant) == loop
    assert score("u", said, [meant]).loop == loop


def test_loops_are_counted():
    scores = [score("u0", "you " * 30, ["hello"]), score("u1", "hello", ["hello"])]
    assert summarise(scores, {})["loops"] == 1


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, "00-02 s"), (1.99, "00-02 s"), (2, "02-05 s"), (9.5, "05-10 s"), (29.9, "20-30 s"), (30, "30 s and more")],
)
def test_duration_buckets(seconds, bucket):
    assert duration_bucket(seconds) == bucket


def test_duration_buckets_sort_by_duration():
    names = [duration_bucket(seconds / 2) for seconds in range(100)]
    assert names == sorted(names)


@pytest.mark.parametrize(("said", "errors"), [("你不吗", 1), ("你吗", 1), ("你好吗呢", 1), ("你好吗", 0)])
def test_letters_of_languages_without_spaces_are_counted_without_the_normalisers(said, errors):
    counted = score("u", said, ["你好吗"], "zh-CN")
    assert (counted.chars, counted.char_errors, counted.words, counted.word_errors) == (3, errors, 3, errors)


def test_a_translation_is_scored_as_english():
    config = ModelConfig(language="ja", task="translate")
    assert (config.text_language, ModelConfig(language="ja").text_language) == ("en", "ja")
    assert score("u", "Hello, world", ["hello world"], config.text_language).words == 2
