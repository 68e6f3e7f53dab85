"""Speakers, groups and ids: one form for each, wherever they are read."""

import json

import pytest

from common.data.audit import audit
from common.data.corpus import read_corpus
from common.data.identities import identity_key
from common.errors import DataError
from tests.field.tables import cells, imported, recordings


def test_two_spellings_of_a_group_or_speaker_are_joined_and_said_aloud(tmp_path):
    """`ALS` and `als` were two etiologies, José in two Unicode forms two speakers (rfjakob/gocryptfs#992: macOS
    decomposes what others compose)."""
    rows = "0.wav,a,José,ALS\n1.wav,b,Jose\u0301,als\n2.wav,c,José,ALS\n"
    made = imported(tmp_path, f"path,text,speaker,etiology\n{rows}")
    assert {(u.speaker, u.etiology, u.split) for u in made.corpus.utterances} == {("José", "ALS", "train")}
    assert "speaker 'Jose\\u0301' is taken for 'Jos\\xe9'" in made.notes
    assert "etiology 'als' is taken for 'ALS'" in made.notes


def test_an_index_that_was_written_by_hand_is_read_in_the_same_way(tmp_path, caplog):
    """One person in train and in test (danijel3/ClarinStudioKaldi#1), hidden by the case of a letter."""
    recordings(tmp_path)
    records = [("0.wav", "M01", "Train"), ("1.wav", "m01", "test"), ("2.wav", float("nan"), "dev")]
    lines = [
        {"id": path, "audio_filepath": path, "duration": 0.3, "text": "t", "speaker": speaker, "split": split}
        for path, speaker, split in records
    ]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    corpus = read_corpus(tmp_path)
    assert [(u.speaker, u.split) for u in corpus.utterances] == [("M01", "train"), ("M01", "test"), ("", "dev")]
    assert "speaker 'm01' is taken for 'M01'" in caplog.text
    assert "shared-speaker" in {finding.kind for finding in audit(corpus)}


@pytest.mark.parametrize(
    "pair", [("ALS", "als"), ("Parkinson’s", "Parkinson's"), ("ＡＢ", "ab"), ("7", "7.0"), ("Straße", "STRASSE")]
)
def test_spellings_of_one_name(pair):
    assert identity_key(pair[0]) == identity_key(pair[1])


def test_names_that_differ_stay_apart(tmp_path):
    made = imported(tmp_path, "path,text,speaker\n0.wav,a,01\n1.wav,b,1\n2.wav,c,M1\n")
    assert len({u.speaker for u in made.corpus.utterances}) == 3


def test_null_and_nan_are_no_speaker_and_no_text(tmp_path):
    """pandas writes NaN (mozilla/DeepSpeech#1106, mead-ml/mead-baseline#386): a speaker "nan", a text "nan"."""
    rows = [{"audio": "0.wav", "text": "a", "speaker": None}, {"audio": "1.wav", "text": "b", "speaker": float("nan")}]
    made = imported(tmp_path, "\n".join(map(json.dumps, rows)), name="t.jsonl")
    assert cells(made, "speaker") == [("",), ("",)]
    with pytest.raises(DataError, match=r"t\.jsonl:1: column 'text' is empty"):
        imported(tmp_path / "text", json.dumps({"audio": "0.wav", "text": float("nan")}), name="t.jsonl")


def test_a_word_that_looks_like_a_missing_value_stays_a_text_and_is_named_by_the_audit(tmp_path):
    """Children say "nan" (UIUCLearningLanguageLab/AOCHILDES#1), Luxembourgish numbers have a "null"
    (huggingface/datasets#4467)."""
    made = imported(tmp_path, "path,text,speaker\n0.wav,nan,nan\n1.wav,null,x\n")
    assert cells(made, "text", "speaker") == [("nan", ""), ("null", "x")]
    assert "speaker 'nan' is taken for a missing value" in made.notes
    assert [f.kind for f in audit(made.corpus)] == ["placeholder-text", "placeholder-text"]


def test_numbers_are_names_without_a_decimal_point(tmp_path):
    """pandas turns whole numbers into floats where one is missing (h2020charisma/ramanchada2#170)."""
    rows = [{"audio": "0.wav", "text": 7, "speaker": 3.0}, {"audio": "1.wav", "text": "b", "speaker": 3}]
    assert cells(imported(tmp_path, "\n".join(map(json.dumps, rows)), name="t.jsonl"), "text", "speaker") == [
        ("7", "3"),
        ("b", "3"),
    ]


@pytest.mark.parametrize(
    ("value", "kind"), [(["a", "b"], "a list"), ({"en": "a"}, "an object"), (True, "true or false")]
)
@pytest.mark.parametrize("field", ["text", "speaker"])
def test_lists_and_objects_are_refused(tmp_path, value, kind, field):
    """Texts "['a', 'b']": values were turned to strings whatever they were."""
    row = {"audio": "0.wav", "text": "a", "speaker": "s"} | {field: value}
    with pytest.raises(DataError, match=rf"t\.jsonl:1: column '{field}' holds {kind}"):
        imported(tmp_path, json.dumps(row), name="t.jsonl")


def test_the_audio_object_of_hugging_face_is_read(tmp_path):
    """`to_json` of a dataset with audio (NVIDIA-NeMo/Speech#3513 converts such); bytes alone are refused."""
    row = {"audio": {"path": "0.wav", "bytes": None}, "text": "a"}
    assert cells(imported(tmp_path, json.dumps(row), name="t.jsonl"), "id") == [("0",)]
    with pytest.raises(DataError, match="contains an object with bytes and no path"):
        imported(tmp_path / "b", json.dumps(row | {"audio": {"bytes": "UklGRg=="}}), name="t.jsonl")
