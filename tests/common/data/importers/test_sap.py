"""Importing the Speech Accessibility Project: contributors, marked transcripts, ratings, official splits."""

import json
from collections import Counter

import numpy as np
import pytest

from common.data.audit import audit
from common.data.importers.sap import import_sap, read_transcript
from common.errors import DataError
from tests.factories import write_wav


def recording(speaker: str, number: int, transcript: str = "Make it cooler.", **more) -> dict:
    """An entry of a contributor's `Files`."""
    prompt = {
        "Prompt Text": "Make it cooler.",
        "Transcript": transcript,
        "Category Description": "Digital Assistant Commands",
        "Sub Category Description": "Control Your Smart Home",
    }
    name = f"{speaker}_{number}_7.wav"
    return {"Filename": name, "Created": "2023-07-13 18:15:53", "Comment": "", "Prompt": prompt, **more}


def rating(level: str, dimension: str = "Intelligibility") -> dict:
    return {"Level": level, "Dimension Description": dimension, "Dimension Category Description": "Parkinson Disease"}


def contributor(folder, speaker: str, files: list[dict], *, etiology="Parkinson's Disease", metadata=None, silent=()):
    """A contributor's JSON file (in `metadata`, or beside the audio) and recordings of half a second."""
    (metadata or folder).mkdir(parents=True, exist_ok=True)
    content = {"Contributor ID": speaker.upper(), "Etiology": etiology, "BlockNumber": 5, "Files": files}
    ((metadata or folder) / f"{speaker}.json").write_text(json.dumps(content), encoding="utf-8")
    for number, file in enumerate(files):
        if file["Filename"] not in silent:
            generator = np.random.default_rng([number, *speaker.encode()])
            write_wav(folder / file["Filename"], generator.uniform(-0.1, 0.1, 8000))


def release(root, *, train=4, dev=2):
    """Train/<id>/<id>.json and Dev/<id>/<id>.json, two etiologies."""
    for split, count in (("Train", train), ("Dev", dev)):
        for i in range(count):
            name = f"{split.lower()}{i}"
            files = [recording(name, k, f"text {k} of {name}") for k in range(2)]
            contributor(root / split / name, name, files, etiology=("ALS", "Stroke")[i % 2])
    return root


def test_contributors_become_speakers_with_etiology_and_rated_severity(tmp_path):
    files = [
        recording("ab", 1, Ratings=[rating("2"), rating("7", "Harsh voice")]),
        recording("ab", 2, Ratings=[rating("5"), rating("", "Intelligibility")]),
        recording("ab", 3),
    ]
    contributor(tmp_path / "sap" / "ab", "ab", files, etiology="Down Syndrome")
    contributor(tmp_path / "sap" / "cd", "cd", [recording("cd", 1)])
    made = import_sap(tmp_path / "sap", tmp_path / "out")
    first = made.corpus.utterances[0]
    assert (first.id, first.speaker, first.etiology) == ("ab_1_7", "ab", "Down Syndrome")
    assert {u.severity for u in made.corpus.utterances if u.speaker == "ab"} == {"intelligibility 4"}
    assert {u.severity for u in made.corpus.utterances if u.speaker == "cd"} == {""}
    assert first.duration == 0.5
    assert made.skipped == {}
    assert audit(made.corpus) == []


@pytest.mark.parametrize(
    ("transcript", "text", "text_alt"),
    [
        ("Make it cooler.\n", "Make it cooler.", ""),
        (
            "(It's in the) It takes place in the future",
            "It takes place in the future",
            "It's in the It takes place in the future",
        ),
        ("(f-*) Find m-my phone", "Find m-my phone", "f- Find m-my phone"),
        ("she was my {g: idol} today", "she was my idol today", ""),
        ("~J ~E ~S at the ~NPR station", "J E S at the NPR station", ""),
        ("together with [PII], our son", "together with , our son", ""),
        ("Call the shop (ss: Hope not)", "Call the shop Hope not", ""),
        ("(cs: Go ahead.) It’s (uh) dry", "Go ahead. It's dry", "Go ahead. It's uh dry"),
        ("(uh)", "uh", ""),
        ("#dis\nStop listening", "Stop listening", ""),
    ],
)
def test_marks_of_the_guidelines_are_read(transcript, text, text_alt):
    pieces, problem = read_transcript(transcript)
    assert problem == ""
    assert [(piece.text, piece.text_alt) for piece in pieces] == [(text, text_alt)]


@pytest.mark.parametrize(
    ("transcript", "problem"),
    [
        ("", "without a transcript"),
        ("nov", "without a transcript"),
        ("#bgn", "without a transcript"),
        ("[Talk about childhood]", "without a transcript"),
        ("was {w: 3} in the article", "with unintelligible words"),
        ("Replace {u: } very tightly", "with unintelligible words"),
        ("{f:}", "with unintelligible words"),
    ],
)
def test_recordings_without_a_known_text_are_counted(tmp_path, transcript, problem):
    contributor(tmp_path / "sap" / "ab", "ab", [recording("ab", 1, transcript), recording("ab", 2)])
    made = import_sap(tmp_path / "sap", tmp_path / "out")
    assert [u.id for u in made.corpus.utterances] == ["ab_2_7"]
    assert made.skipped == {problem: 1}


def test_timed_lines_become_stretches_of_one_recording(tmp_path):
    timed = "#ts\n0.05 0.2 first (uh) part\n0.25 0.45 [laughs]\n0.3 0.5 last part"
    contributor(tmp_path / "sap" / "ab", "ab", [recording("ab", 1, timed)])
    utterances = import_sap(tmp_path / "sap", tmp_path / "out").corpus.utterances
    assert [(u.id, u.offset, u.duration, u.text, u.text_alt) for u in utterances] == [
        ("ab_1_7@0.05", 0.05, 0.15, "first part", "first uh part"),
        ("ab_1_7@0.3", 0.3, 0.2, "last part", None),
    ]


def test_missing_and_broken_audio_is_counted(tmp_path):
    files = [recording("ab", number) for number in range(4)]
    contributor(tmp_path / "sap" / "ab", "ab", files, silent={"ab_1_7.wav"})
    (tmp_path / "sap" / "ab" / "ab_2_7.wav").write_bytes(b"no sound")
    made = import_sap(tmp_path / "sap", tmp_path / "out")
    assert [u.id for u in made.corpus.utterances] == ["ab_0_7", "ab_3_7"]
    assert made.skipped == {"without their audio file": 1, "with audio that cannot be read": 1}


def test_dev_becomes_the_test_split_and_speakers_of_train_become_dev(tmp_path):
    made = import_sap(release(tmp_path / "sap", train=12), tmp_path / "out")
    splits = {u.speaker: u.split for u in made.corpus.utterances}
    assert {speaker for speaker, split in splits.items() if split == "test"} == {"dev0", "dev1"}
    assert Counter(split for speaker, split in splits.items() if speaker.startswith("train")) == {"train": 10, "dev": 2}
    held_out = {u.etiology for u in made.corpus.utterances if u.split == "dev"}
    assert held_out == {"ALS", "Stroke"}


def test_contributors_in_no_split_are_counted_as_such_and_do_not_keep_dev_from_becoming_test(tmp_path):
    contributor(release(tmp_path / "sap", train=12) / "ab", "ab", [recording("ab", 1)])
    made = import_sap(tmp_path / "sap", tmp_path / "out")
    assert made.skipped == {"of contributors in no split": 1}
    assert {u.split for u in made.corpus.utterances} == {"train", "dev", "test"}


def test_official_splits_can_be_kept(tmp_path):
    made = import_sap(release(tmp_path / "sap"), tmp_path / "out", official_splits=True)
    assert all(u.speaker.startswith(u.split) for u in made.corpus.utterances)
    assert {u.split for u in made.corpus.utterances} == {"train", "dev"}


def test_a_file_of_splits_wins_and_second_copies_of_metadata_count_once(tmp_path):
    root = tmp_path / "sap"
    for name in ("a", "b", "c"):
        contributor(root / "raw" / name, name, [recording(name, 1)])
        contributor(root / "raw" / name, name, [recording(name, 1)], metadata=root / "doc")
    splits = {"train": ["A"], "dev": ["b"], "test": ["c"]}
    (root / "doc" / "SpeechAccessibility_2024-04-30_Split_by_Contributors.json").write_text(json.dumps(splits))
    made = import_sap(root, tmp_path / "out")
    assert {u.speaker: u.split for u in made.corpus.utterances} == {"a": "train", "b": "dev", "c": "test"}
    assert len(made.corpus.utterances) == 3


def test_metadata_and_audio_may_lie_apart(tmp_path):
    root = tmp_path / "sap"
    for split, name in (("train", "a"), ("dev", "b")):
        contributor(root / split / "audio", name, [recording(name, 1)], metadata=root / split / "metadata")
    made = import_sap(root, tmp_path / "out", official_splits=True)
    assert {u.speaker: u.split for u in made.corpus.utterances} == {"a": "train", "b": "dev"}


def test_without_splits_speakers_are_dealt(tmp_path):
    for i in range(10):
        contributor(tmp_path / "sap" / f"s{i}", f"s{i}", [recording(f"s{i}", 1), recording(f"s{i}", 2)])
    made = import_sap(tmp_path / "sap", tmp_path / "out")
    assert Counter(u.split for u in made.corpus.utterances) == {"train": 16, "dev": 2, "test": 2}
    assert len({(u.speaker, u.split) for u in made.corpus.utterances}) == 10


def test_other_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    contributor(tmp_path / "mute", "ab", [recording("ab", 1)], silent={"ab_1_7.wav"})
    contributor(tmp_path / "void", "ab", [recording("ab", 1, "")])
    for name, content in (("bad", "{"), ("deep", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(content)
    contributor(tmp_path / "odd", "ab", [recording("ab", 1)])
    (tmp_path / "odd" / "X_Split_by_Contributors.json").write_text('{"shared": ["ab"]}')
    for name, message in (
        ("empty", "no contributor of the Speech Accessibility Project"),
        ("mute", "contains no .wav"),
        ("void", "1 without a transcript"),
        ("bad", "x.json cannot be read as JSON"),
        ("deep", "x.json cannot be read as JSON"),
        ("odd", "split 'shared' is not one of train"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            import_sap(tmp_path / name, tmp_path / "out" / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
