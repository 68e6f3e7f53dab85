"""Tables of other kinds: read, or named for what they are."""

import gzip
import json

import pytest

from common.errors import DataError, UsageError
from tests.field.tables import cells, imported

RECORDS = [{"path": "0.wav", "text": "a"}, {"path": "1.wav", "text": "b"}]
TWO = [("0", "a"), ("1", "b")]


def test_an_array_of_objects_is_read(tmp_path):
    """A JSON array where lines were expected (NVIDIA-NeMo/Speech#4156)."""
    for name, content in (("a", json.dumps(RECORDS)), ("b", json.dumps(RECORDS, indent=2))):
        assert cells(imported(tmp_path / name, content, name="t.json"), "id", "text") == TWO


@pytest.mark.parametrize(
    "content",
    [
        {"path": {"0": "0.wav", "1": "1.wav"}, "text": {"0": "a", "1": "b"}},
        {"0": RECORDS[0], "1": RECORDS[1]},
        {"columns": ["path", "text"], "index": [0, 1], "data": [["0.wav", "a"], ["1.wav", "b"]]},
        {"data": RECORDS},
    ],
)
def test_what_pandas_makes_of_a_table_is_read(tmp_path, content):
    """`DataFrame.to_json` in its orders, `{"data": […]}` (pooya-mohammadi/audio-classification-pytorch#1)."""
    assert cells(imported(tmp_path, json.dumps(content), name="t.json"), "id", "text") == TWO


def test_the_json_of_speechbrain_is_read_with_its_names_as_ids(tmp_path):
    """Utterances by name, as in speechbrain/speechbrain#1225; a path as an object with samples is refused."""
    content = {"u1": {"wav": "0.wav", "spk_id": "s", "words": "A"}, "u2": {"wav": "1.wav", "spk_id": "t", "words": "B"}}
    made = imported(tmp_path, json.dumps(content), name="t.json")
    assert cells(made, "id", "speaker", "text") == [("u1", "s", "A"), ("u2", "t", "B")]
    content["u1"]["wav"] = {"file": "0.wav", "start": 0, "stop": 3200}
    with pytest.raises(DataError, match="'u1': column 'wav' contains an object with file, start, stop"):
        imported(tmp_path / "o", json.dumps(content), name="t.json")


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz", "t.tsv"])
def test_a_gzipped_table_is_read_whatever_its_name(tmp_path, name):
    """`jsonl.gz` (lhotse-speech/lhotse#1388), byte 0x8b (streamlit/files-connection#11)."""
    content = "\n".join(map(json.dumps, RECORDS)) if "json" in name else "path,text\n0.wav,a\n1.wav,b\n"
    assert cells(imported(tmp_path, gzip.compress(content.encode()), name=name), "id", "text") == TWO


def test_suffixes_in_capitals_are_read(tmp_path):
    """`.JSONL`: the content says what a file is, not its name (NVIDIA-NeMo/Speech#14287)."""
    assert cells(imported(tmp_path, "\n".join(map(json.dumps, RECORDS)), name="T.JSONL"), "text") == [("a",), ("b",)]


def test_bars_separate_and_quotes_belong_to_the_text(tmp_path):
    """LJSpeech's metadata.csv (rhasspy/piper#246), with commas in the text (pytorch/audio#4161)."""
    made = imported(tmp_path, 'path|text\n0.wav|he said "yes, yes, yes", twice\n1.wav|a "b\n')
    assert cells(made, "text") == [('he said "yes, yes, yes", twice',), ('a "b',)]


def test_a_table_without_a_header_row_keeps_its_first_row(tmp_path):
    """audio1|This is my sentence. (coqui-ai/TTS#3050); names without a suffix (mozilla/DeepSpeech#1928)."""
    content = "0|Printing, in the only sense|Printing\n1|b, c|B\n"
    with pytest.raises(DataError, match="if it has no header row, name its columns by --header"):
        imported(tmp_path / "a", content)
    made = imported(tmp_path / "b", content, header=["audio_filepath", "text", "text_alt"])
    assert cells(made, "text", "text_alt") == [("Printing, in the only sense", "Printing"), ("b, c", "B")]
    with pytest.raises(DataError, match="its first row is data"):
        imported(tmp_path / "c", "0.wav,hi\n1.wav,b\n", columns={"audio_filepath": "0.wav", "text": "hi"})
    with pytest.raises(UsageError, match="leave out --header"):
        imported(tmp_path / "d", json.dumps(RECORDS), header=["path", "text"])


def test_the_separator_that_excel_names_and_its_tail_of_empty_cells(tmp_path):
    """`sep=;` (PowerShell/PowerShell#7776), rows of empty cells (chanzuckerberg/czid-web#2743, jvalue/ods#290)."""
    made = imported(tmp_path, "sep=;\r\npath;text;;\r\n0.wav;a, b;;\r\n1.wav;c;;\r\n;;;\r\n;;;\r\n")
    assert cells(made, "text") == [("a, b",), ("c",)]
    assert "empty rows that are omitted: 2" in made.notes


def test_backslashes_are_slashes_where_no_file_has_them(tmp_path):
    """Lists written on Windows (nl8590687/ASRT_SpeechRecognition#15)."""
    (tmp_path / "sub").mkdir()
    made = imported(tmp_path, "path,text\nsub\\..\\0.wav,a\n")
    assert cells(made, "id") == [("sub/../0",)]
    with pytest.raises(DataError, match=r"t\.csv:2: C:\\x\\0\.wav is a path of Windows"):
        imported(tmp_path / "c", "path,text\nC:\\x\\0.wav,a\n")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04 and so on", "an Excel workbook"),
        (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
        (b"PAR1", "Parquet"),
        (b"BZh9", "compressed with bzip2"),
        (b"\x1f\x8b\x08damaged", "a damaged gzip file"),
        (b"RIFF....WAVE", "audio: name the table"),
        (b'{"id": "c", "start": 0, "supervisions": [], "recording": {}}', "a manifest of Lhotse"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[1, 2]", "no table"),
        (b"path,text\nhttps://example.org/a.wav,x\n", "is an address, no file"),
    ],
)
def test_others_are_named_for_what_they_are(tmp_path, content, kind):
    """A file in the wrong parser fails without a word of its kind (NVIDIA-NeMo/Speech#16033)."""
    with pytest.raises(DataError, match=kind):
        imported(tmp_path, content, name="table.dat")
