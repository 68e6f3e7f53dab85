"""Several rows of one file: which part is whose, and whether the file has it."""

import pytest

from common.errors import DataError
from tests.field.tables import cells, imported

NAMES = [
    ("offset", "duration"),
    ("start", "end"),
    ("begin", "end"),
    ("start_time", "end_time"),
    ("Start", "Stop"),
    ("onset", "offset"),
    ("start", "duration"),
]


@pytest.mark.parametrize(("begin", "end"), NAMES)
def test_the_usual_columns_cut_a_file(tmp_path, begin, end):
    """The key "offset" was ignored and an hour read for each segment (NVIDIA-NeMo/Speech#15080); segments with start
    and stop (speechbrain/speechbrain#1225, facebookresearch/fairseq#3962)."""
    second = 1.5 if end == "duration" else 2.5
    made = imported(tmp_path, f"path,{begin},{end},text\nlong.wav,0,1,a\nlong.wav,1,{second},b\n")
    assert cells(made, "offset", "duration", "text") == [(0, 1, "a"), (1, 1.5, "b")]


def test_milliseconds_and_clock_times_are_understood(tmp_path):
    """Times as duration[ms] in Common Voice's tables (common-voice/cv-dataset#31) and as 0:01:02 in annotations."""
    table = "path,start_ms,End[ms],text\nlong.wav,0,1000,a\nlong.wav,1000,2500,b\n"
    assert cells(imported(tmp_path / "ms", table), "offset", "duration") == [(0, 1), (1, 1.5)]
    table = "path,start,end,text\nlong.wav,0:00,0:01.0,a\nlong.wav,0:00:01,00:00:02.500,b\n"
    assert cells(imported(tmp_path / "clock", table), "offset", "duration") == [(0, 1), (1, 1.5)]


def test_an_end_of_minus_one_is_the_end_of_the_file(tmp_path):
    """Kaldi's segments may end at -1 (lhotse-speech/lhotse#925)."""
    made = imported(tmp_path, "path,start,end,text\nlong.wav,0,1,a\nlong.wav,3,-1,b\n")
    assert cells(made, "offset", "duration") == [(0, 1), (3, 1)]


def test_rows_that_share_a_file_without_a_stretch_are_refused_with_both_rows(tmp_path):
    """Each row became the whole recording (NVIDIA-NeMo/Speech#15080)."""
    with pytest.raises(DataError, match=r"t\.csv:2: .*t\.csv:3 names .*long\.wav too"):
        imported(tmp_path, "id,path,text\na,long.wav,one\nb,long.wav,two\n")


def test_a_stretch_without_an_end_inside_of_which_another_begins_is_refused(tmp_path):
    """A column of starts alone: each row went on to the end of the file (facebookresearch/fairseq#3962)."""
    with pytest.raises(DataError, match=r"t\.csv:2: begins at 0 s .* has no end, though .*t\.csv:3"):
        imported(tmp_path, "path,start,text\nlong.wav,0,one\nlong.wav,2,two\n")


@pytest.mark.parametrize("row", ["long.wav,3,6,b", "long.wav,4520,4545,b", "long.wav,2,1,b", "long.wav,2,2,b"])
def test_a_stretch_that_the_file_does_not_have_is_refused(tmp_path, row):
    """A begin_time of 4540 s in a file of 704 s (SpeechColab/GigaSpeech#125); it was cut, and kept all its text."""
    with pytest.raises(DataError, match=r"t\.csv:3: "):
        imported(tmp_path, f"path,start,end,text\nlong.wav,0,1,a\n{row}\n")


def test_a_rounded_end_is_cut_off(tmp_path):
    """A supervision to 73.37 s of a recording of 73.365 s (lhotse-speech/lhotse#1107)."""
    made = imported(tmp_path, "path,start,end,text\nlong.wav,0,1,a\nlong.wav,3,4.005,b\n")
    assert cells(made, "offset", "duration") == [(0, 1), (3, 1)]


@pytest.mark.parametrize("times", ["90.0,90.3", "1440000,1444800", "90000,90300"])
def test_clips_that_are_cut_already_may_keep_their_times_in_the_long_recording(tmp_path, times):
    """Read right before: files of their own beside start and end of a longer file, in s, samples or ms."""
    made = imported(tmp_path, f"path,start,end,text\n0.wav,{times},a\n1.wav,{times},b\n")
    assert cells(made, "offset", "duration") == [(0, 0.3), (0, 0.3)]


def test_a_file_that_is_shorter_than_its_table_says_is_named(tmp_path):
    """Declared and loaded samples diverge (lhotse-speech/lhotse#1437): half of a file may be missing."""
    made = imported(tmp_path, "path,text,duration\n0.wav,a,0.3\n1.wav,b,9.5\n")
    assert any("another duration than 1 files" in note and "t.csv:3: 9.5 s" in note for note in made.notes)
