"""Columns under other names: taken, or named where they are not."""

import pytest

from common.data.importers.columns import KNOWN_COLUMNS, name_key
from common.errors import DataError
from tests.field.tables import cells, imported


def test_capitals_do_not_hide_speakers_and_splits(tmp_path):
    """Speakers in train and in test unnoticed (danijel3/ClarinStudioKaldi#1): headings in capitals were not read."""
    made = imported(
        tmp_path,
        "Path,Transcript,Speaker,Split,Etiology\n0.wav,a,S1,Train,ALS\n1.wav,b,S2,TEST,ALS\n2.wav,c,S3,Dev,ALS\n",
    )
    assert cells(made, "speaker", "split", "etiology") == [
        ("S1", "train", "ALS"),
        ("S2", "test", "ALS"),
        ("S3", "dev", "ALS"),
    ]


@pytest.mark.parametrize(
    "name", ["spk", "spk_id", "Participant ID", "participantId", "client_id", "SUBJECT", "speaker-id", "Speaker Name"]
)
def test_usual_names_of_speakers_are_known(tmp_path, name):
    """SpeechBrain's spk_id (speechbrain/speechbrain#1225), Common Voice's client_id (common-voice/cv-dataset#33), and
    what clinics write."""
    assert cells(imported(tmp_path, f"path,text,{name}\n0.wav,a,x\n1.wav,b,y\n"), "speaker") == [("x",), ("y",)]


def test_a_manifest_of_speechbrain_is_read(tmp_path):
    """Columns ID, duration, wav, spk_id, wrd (speechbrain/speechbrain#1985 asks what belongs there)."""
    made = imported(tmp_path, "ID,duration,wav,spk_id,wrd\nu1,0.3,0.wav,a,HELLO\nu2,0.3,1.wav,b,BYE\n")
    assert cells(made, "id", "speaker", "text") == [("u1", "a", "HELLO"), ("u2", "b", "BYE")]


def test_columns_that_are_not_used_are_named_in_one_line(tmp_path):
    """A misspelled column was ignored in silence (spiceai/spiceai#9827)."""
    made = imported(tmp_path, "path,text,speeker,age\n0.wav,a,x,40\n1.wav,b,y,50\n")
    assert "columns that are not used: speeker, age" in made.notes
    assert sum("not used" in note for note in made.notes) == 1


def test_no_speakers_are_said_aloud(tmp_path):
    """A split without speakers (danijel3/ClarinStudioKaldi#1)."""
    made = imported(tmp_path, "path,text\n0.wav,a\n1.wav,b\n")
    assert any(note.startswith("no speakers: one voice may be in train and in test") for note in made.notes)
    some = imported(tmp_path / "some", "path,text,speaker\n0.wav,a,x\n1.wav,b,\n")
    assert "1 of 2 utterances have no speaker: each counts as one of its own" in some.notes


def test_what_is_cut_out_of_one_file_without_a_speaker_stays_in_one_split(tmp_path):
    """Sessions of one speaker in train and in test (danijel3/ClarinStudioKaldi#1), as stretches of one recording."""
    rows = "".join(f"long.wav,{i / 10},{i / 10 + 0.1},t\n" for i in range(30))
    made = imported(tmp_path, f"path,start,end,text\n{rows}0.wav,0,0.3,a\n1.wav,0,0.3,b\n2.wav,0,0.3,b\n")
    assert len({u.split for u in made.corpus.utterances if u.audio_filepath.endswith("long.wav")}) == 1


def test_a_column_with_a_likely_name_whose_values_do_not_fit_is_named_and_not_taken(tmp_path):
    """ID as a person's number, Set as the name of a word list, times of the clock: read right before, and still."""
    table = "path,text,ID,Set,start\n0.wav,a,7,words,2021-03-01\n1.wav,b,7,words,2021-03-01\n"
    made = imported(tmp_path, table)
    assert cells(made, "id", "offset") == [("0", 0.0), ("1", 0.0)]
    assert {note.split(" is not")[0] for note in made.notes if "is not taken" in note} == {
        "column 'ID'",
        "column 'Set'",
        "column 'start'",
    }


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """Of two columns with one name the last one counted (datahub-project/datahub#19187 warns of such)."""
    with pytest.raises(DataError, match="2 columns are named 'text'"):
        imported(tmp_path, "path,text,text\n0.wav,a,b\n")


def test_exact_names_come_before_loose_ones(tmp_path):
    made = imported(tmp_path, "path,Text,text,speaker,Speaker\n0.wav,wrong,right,x,y\n")
    assert cells(made, "text", "speaker") == [("right", "x")]


def test_a_column_can_be_left_out(tmp_path):
    made = imported(tmp_path, "path,text,subject\n0.wav,a,maths\n", columns={"speaker": ""})
    assert cells(made, "speaker") == [("",)]


def test_known_names_are_told_apart():
    """No name is known for two fields, whatever its case and separators."""
    keys = [key for names in KNOWN_COLUMNS.values() for key in {name_key(name)[0] for name in names}]
    assert len(keys) == len(set(keys))
