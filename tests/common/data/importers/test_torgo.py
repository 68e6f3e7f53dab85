"""Importing TORGO: sessions, two microphones, prompts that are no text, severity by speaker."""

from collections import Counter

import numpy as np
import pytest

from common.data.audit import audit
from common.data.importers.torgo import import_torgo, read_prompt
from common.errors import DataError
from tests.factories import write_wav

SPEAKERS = ("F01", "F03", "M03", "FC01", "MC01", "MC04")


def session(folder, prompts: dict[str, str], *, head=True, array=True):
    """A session's prompts and recordings, the array's louder than the head's."""
    (folder / "prompts").mkdir(parents=True)
    for name, text in prompts.items():
        (folder / "prompts" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        for there, microphone, level in ((head, "head", 0.1), (array, "array", 0.2)):
            if there:
                generator = np.random.default_rng([*str(folder / name).encode()])
                write_wav(folder / f"wav_{microphone}Mic" / f"{name}.wav", level * generator.uniform(-1, 1, 8000))


@pytest.fixture
def torgo(tmp_path):
    """Six speakers in the groups' folders, each with two sessions."""
    root = tmp_path / "TORGO"
    for speaker in SPEAKERS:
        group = root / speaker.rstrip("0123456789") / speaker
        session(group / "Session1", {"0001": "stick", "0002": "Except in the winter when the ooze"})
        session(group / "Session2_3", {"0001": "tear [as in tear up that paper]"}, head=False)
    return root


def test_sessions_become_utterances_with_severity_and_controls(torgo, tmp_path):
    made = import_torgo(torgo, tmp_path / "out")
    by_id = {u.id: u for u in made.corpus.utterances}
    assert len(by_id) == 18
    assert by_id["M03-Session2_3-0001-array"].text == "tear"
    assert by_id["F01-Session1-0002-head"].text == "Except in the winter when the ooze"
    assert {u.speaker: (u.etiology, u.severity) for u in by_id.values()} == {
        "F01": ("dysarthria", "severe"),
        "F03": ("dysarthria", "moderate"),
        "M03": ("dysarthria", "mild"),
        "FC01": ("control", "control"),
        "MC01": ("control", "control"),
        "MC04": ("control", "control"),
    }
    assert len({(u.speaker, u.split) for u in by_id.values()}) == 6
    assert Counter(u.split for u in by_id.values()) == {"train": 6, "dev": 6, "test": 6}
    assert made.skipped == {}
    assert [finding for finding in audit(made.corpus) if finding.severity == "error"] == []


def test_microphones(torgo, tmp_path):
    ids = {
        name: {u.id for u in import_torgo(torgo, tmp_path / name, microphone=name).corpus.utterances}
        for name in ("head", "array", "both")
    }
    assert all(name.endswith("-array") for name in ids["array"])
    assert {name[-5:] for name in ids["head"]} == {"-head", "array"}
    assert ids["both"] == ids["head"] | ids["array"]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("stick", "stick"),
        ("  The quick\n brown fox ", "The quick brown fox"),
        ("tear [as in tear up]", "tear"),
        ("[relax your mouth in its normal position]", ""),
        ("[say Ah-P-Eee repeatedly", ""),
        ("input/images/gull.jpg", ""),
        ("GULL.JPEG", ""),
        ("xxx", ""),
        ("", ""),
    ],
)
def test_prompts_that_are_no_text_are_empty(prompt, text):
    assert read_prompt(prompt) == text


def test_what_is_left_out_is_counted(tmp_path):
    prompts = {"0001": "stick", "0002": "xxx", "0003": "input/images/a.jpg", "0004": "feet", "0005": "trait"}
    folder = tmp_path / "TORGO" / "F01" / "Session1"
    session(folder, prompts, array=False)
    (folder / "wav_headMic" / "0004.wav").unlink()
    (folder / "wav_headMic" / "0005.wav").write_bytes(b"")
    made = import_torgo(tmp_path / "TORGO", tmp_path / "out")
    assert [u.text for u in made.corpus.utterances] == ["stick"]
    assert made.skipped == {
        "with a prompt that is no text": 2,
        "without their audio file": 1,
        "with audio that cannot be read": 1,
    }


def test_other_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty" / "F01" / "prompts").mkdir(parents=True)
    session(tmp_path / "pictures" / "F01" / "Session1", {"0001": "a.jpg"})
    session(tmp_path / "broken" / "F01" / "Session1", {"0001": "stick"}, array=False)
    (tmp_path / "broken" / "F01" / "Session1" / "wav_headMic" / "0001.wav").write_bytes(b"")
    for name, message in (
        ("empty", "is not TORGO"),
        ("nowhere", "is not TORGO"),
        ("pictures", "1 with a prompt that is no text"),
        ("broken", "0001.wav is empty"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            import_torgo(tmp_path / name, tmp_path / "out" / name)
        assert "\n" not in str(caught.value)
    assert not any((tmp_path / "out").glob("*"))
