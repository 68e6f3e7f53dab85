"""One bad row does not end all: every fault is listed, and the others can be imported."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.data.corpus import read_corpus
from common.errors import DataError
from tests.field.tables import imported, recordings

TABLE = """path,text,speaker
0.wav,a,s
gone.wav,b,s
empty.wav,c,t
1.wav,,u
1.wav,x,y,z
2.wav,ok,v
"""


def bad_table(folder):
    recordings(folder)
    (folder / "empty.wav").write_bytes(b"")
    return folder


def test_all_faults_are_listed_in_order_and_nothing_is_written(tmp_path):
    """One error for each full pass: the same stage again and again (lhotse-speech/lhotse#1541); all error lines at
    once (NVIDIA-NeMo/Speech#8661)."""
    with pytest.raises(DataError) as caught:
        imported(bad_table(tmp_path), TABLE)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith("4 of 6 rows cannot be used")
    assert "--skip-bad" in head
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines] == ["3", "4", "5", "6"]
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out").exists()


def test_each_fault_is_a_line_of_its_own_on_a_terminal_and_its_text_begins_none(tmp_path):
    """The list was shown as one line with `\\n` in it."""
    rows = TABLE + '"x\nerror: forged.wav",d,s\n'
    (bad_table(tmp_path) / "t.csv").write_text(rows, "utf-8")
    words = ["-m", "cli.main", "corpus", "import", tmp_path / "t.csv", tmp_path / "out"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    head, *lines = done.stderr.splitlines()
    assert done.returncode == 65 and head.startswith("error: 5 of 7 rows cannot be used")
    assert len(lines) == 5 and all(line.startswith("  ") and "t.csv:" in line for line in lines)


def test_the_others_can_be_imported_and_provenance_counts_the_rest(tmp_path):
    """An importer should skip what is corrupt and go on (mozilla/DeepSpeech#1955)."""
    bad_table(tmp_path)
    (tmp_path / "t.csv").write_text(TABLE, "utf-8")
    done = CliRunner().invoke(cli, ["corpus", "import", str(tmp_path / "t.csv"), str(tmp_path / "out"), "--skip-bad"])
    assert done.exit_code == 0, done.output
    assert len(read_corpus(tmp_path / "out").utterances) == 2
    assert done.stderr.count("omitted: ") == 4
    assert "omitted: 4 with a fault" in done.stdout
    record = json.loads((tmp_path / "out" / "provenance.json").read_text("utf-8"))
    assert (record["rows"], record["utterances"], record["left_out"]) == (6, 2, {"with a fault": 4})
    assert len(record["faults"]) == 4
    assert "left_out: 4 with a fault" in CliRunner().invoke(cli, ["corpus", "stats", str(tmp_path / "out")]).stdout


def test_rows_without_any_good_one_are_an_error_with_and_without_skipping(tmp_path):
    """A wrong --audio-root: a short message, not a thousand lines."""
    rows = "".join(f"gone{i}.wav,a\n" for i in range(500))
    for skip in (False, True):
        with pytest.raises(DataError, match="none of 500 rows can be used") as caught:
            imported(tmp_path, f"path,text\n{rows}", skip_bad=skip)
        assert str(caught.value).count("\n") == 6
    assert not (tmp_path / "out").exists()


def test_a_bad_line_of_json_is_one_fault_among_others(tmp_path):
    """NVIDIA-NeMo/Speech#8661."""
    lines = ['{"path": "0.wav", "text": "a"}', "{bad", '{"path": "1.wav", "text": "b"}', "[1]"]
    made = imported(tmp_path, "\n".join(lines), name="t.jsonl", skip_bad=True)
    assert len(made.corpus.utterances) == 2
    assert ["t.jsonl:2" in made.faults[0], "t.jsonl:4" in made.faults[1]] == [True, True]


def test_ids_that_stand_twice_are_faults_of_their_rows(tmp_path):
    made = imported(tmp_path, "id,path,text\na,0.wav,x\na,1.wav,y\nb,2.wav,z\n", skip_bad=True)
    assert [u.id for u in made.corpus.utterances] == ["a", "b"]
    assert "t.csv:3: id 'a' is already at" in made.faults[0]
