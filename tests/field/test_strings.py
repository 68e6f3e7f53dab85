"""Texts that UTF-8 cannot hold, and ends of lines that are none."""

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.data.corpus import read_corpus
from common.errors import DataError
from common.json_files import read_rows
from tests.cli.test_main import ENVIRONMENT
from tests.field.tables import cells, imported, recordings


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_separators_inside_of_a_text_or_id_do_not_end_a_line(tmp_path, separator):
    """`splitlines` on JSON Lines (wbolster/jsonlines#53, datalad/datalad#3523, hegeldev/hegel-core#25)."""
    row = {"id": f"a{separator}b", "path": "0.wav", "text": f"one{separator}two"}
    made = imported(tmp_path, json.dumps(row, ensure_ascii=False) + "\n", name="t.jsonl")
    assert cells(made, "id", "text") == [("a b", f"one{separator}two")]
    assert read_corpus(tmp_path / "out").digest == made.corpus.digest
    table = tmp_path / "assignments.jsonl"
    table.write_text(json.dumps({"id": f"a{separator}b", "cluster": 3}, ensure_ascii=False) + "\n", "utf-8")
    assert read_rows(table) == [{"id": f"a{separator}b", "cluster": 3}]


def test_a_csv_keeps_them_too(tmp_path):
    """datalad/datalad#3523, in a table."""
    assert cells(imported(tmp_path, "path,text\n0.wav,one\u2028two\n1.wav,b\n"), "text") == [("one\u2028two",), ("b",)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_half_a_surrogate_pair_is_one_line(tmp_path, name):
    """`surrogates not allowed` (mozilla/DeepSpeech#3685): a traceback in three stages."""
    content = '{"path": "0.wav", "text": "x\\ud83d"}'
    with pytest.raises(DataError, match=r"contains \\ud83d, half of a surrogate pair") as caught:
        imported(tmp_path, content if name == "t.jsonl" else f"[{content}]", name=name)
    assert "\n" not in str(caught.value)
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(DataError, match=r":1: contains \\ud83d"):
        read_rows(tmp_path / name)
    (tmp_path / name).write_text('{"path": "0.wav", "text": "\\ud83d\\ude00"}', "utf-8")
    assert read_rows(tmp_path / name)[0]["text"] == "\U0001f600"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are no text")
def test_a_latin_1_file_name_is_one_line_that_any_terminal_prints(tmp_path):
    """A name in an old encoding ended the program (quodlibet/mutagen#648, ahupp/python-magic#144)."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xf6sse"))
    recordings(folder)
    (folder / "t.csv").write_text("path,text\n0.wav,a\n", "utf-8")
    done = CliRunner(env=ENVIRONMENT).invoke(cli, ["corpus", "import", str(folder / "t.csv"), str(tmp_path / "out")])
    assert isinstance(done.exception, DataError)
    message = str(done.exception)
    assert "its name is not UTF-8" in message
    message.encode()
    assert not (tmp_path / "out").exists()


def test_a_table_in_utf_16_is_read_and_one_in_latin_1_named_with_its_line(tmp_path):
    """Windows programs write UTF-16 (bazelbuild/rules_pkg#1021)."""
    made = imported(tmp_path, "path\ttext\n0.wav\tgrößer\n".encode("utf-16"), name="t.txt")
    assert cells(made, "text") == [("größer",)]
    with pytest.raises(DataError, match=r"t\.csv:3 is not utf-8 text"):
        imported(tmp_path / "latin", "path,text\n0.wav,a\n1.wav,größer\n".encode("latin-1"))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_name_in_the_other_unicode_form_is_found(tmp_path, forms):
    """macOS decomposes names of files (clementine-player/Clementine#5151, renpy/renpy#2327)."""
    import unicodedata

    recordings(tmp_path)
    written, named = (unicodedata.normalize(form, "José.wav") for form in forms)
    (tmp_path / "0.wav").rename(tmp_path / written)
    assert len(cells(imported(tmp_path, f"path,text\n{named},a\n"), "id")) == 1
