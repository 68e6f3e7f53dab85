"""Loops: what no speaker says is known and cut; what people do repeat stays."""

import pytest

from common.decoding.loops import is_loop, kept_items, key_of, shortened

SENTENCE = "I'm going to do it. "


@pytest.mark.parametrize(
    ("text", "seconds", "loop"),
    [
        (SENTENCE * 36, 2.0, True),
        (SENTENCE * 6, 30.0, True),
        ("no " * 20, 1.0, True),
        ("well " + "ha" * 60, 3.0, True),
        ("No, no, no, no!", 2.0, False),
        ("one two three four five six seven eight nine ten eleven twelve", 4.0, False),
        (SENTENCE * 3, 4.0, False),
        ("", 2.0, False),
    ],
)
def test_a_loop_is_repeated_and_more_than_can_be_said(text, seconds, loop):
    assert is_loop(text, seconds) == loop


def test_of_a_loop_the_first_repetition_stays():
    words = ["so", "the", "end", "the", "end", "the", "End.", "the", "end", "the", "end", "the", "well", "then"]
    kept = kept_items([key_of(word) for word in words])
    assert [words[number] for number in kept] == ["so", "the", "end", "well", "then"]
    assert kept_items(["a", "b", "c", "a", "b", "c", "a", "b", "c"]) == list(range(9)), "three times can be meant"
    assert kept_items([]) == []


def test_a_loop_without_spaces_and_one_within_a_word():
    text = "你好世界" * 12
    assert is_loop(text, 3.0, spaced=False)
    assert "".join(text[number] for number in kept_items(text, spaced=False)) == "你好世界"
    assert shortened("ha" * 30) == "ha" and shortened("banana") == "banana"
