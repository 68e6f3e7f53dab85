"""Folders: nothing in them is passed over in silence."""

import json
import shutil

import pytest

from common.data.importers.audiofolder import import_audiofolder
from common.data.importers.sap import import_sap
from common.data.importers.torgo import import_torgo
from common.errors import DataError
from tests.field.tables import cells, recordings

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"


def part(folder, name="metadata.csv", rows=("0.wav,a", "1.wav,b")):
    recordings(folder, len(rows))
    (folder / "long.wav").unlink()
    (folder / name).write_text("file_name,transcription\n" + "\n".join(rows) + "\n", "utf-8")


def test_names_of_splits_count_in_any_case_and_other_folders_are_named(tmp_path):
    """A folder "custom" beside train, test and validation disappears (huggingface/datasets#7529)."""
    for name in ("train", "Test", "VALIDATION", "extra"):
        part(tmp_path / "data" / name)
    (tmp_path / "data" / "extra" / "metadata.csv").write_text("no,table of audio\n1,2\n", "utf-8")
    made = import_audiofolder(tmp_path / "data", tmp_path / "out")
    assert {u.split for u in made.corpus.utterances} == {"train", "test", "dev"}
    assert len(made.corpus.utterances) == 6
    assert any(note.startswith("omitted: folder extra/, which is no split") for note in made.notes)


def test_metadata_at_the_top_takes_the_splits_of_its_paths(tmp_path):
    """The official split was dealt anew: Hugging Face reads it from the folders (huggingface/datasets#5608)."""
    for name in ("train", "test"):
        recordings(tmp_path / "data" / name, 2)
    rows = [f"{split}/{i}.wav,t" for split in ("train", "test") for i in range(2)]
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n" + "\n".join(rows), "utf-8")
    made = import_audiofolder(tmp_path / "data", tmp_path / "out")
    assert cells(made, "split") == [("test",), ("test",), ("train",), ("train",)]


def test_audio_that_no_row_names_is_counted(tmp_path):
    """13 rows of 20,000 files (huggingface/datasets#5608)."""
    part(tmp_path / "data", rows=("0.wav,a",))
    recordings(tmp_path / "data" / "more", 2)
    (tmp_path / "data" / "._0.wav").write_bytes(APPLE)
    made = import_audiofolder(tmp_path / "data", tmp_path / "out")
    assert any(note.startswith("omitted: 3 audio files that no row names, as more/0.wav") for note in made.notes)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("wav.scp", "Kaldi data folder"),
        ("data-00000-of-00001.arrow", "save_to_disk"),
        ("data/train-00000.parquet", "Parquet"),
        ("cuts_train.jsonl.gz", "Lhotse"),
        ("clips/a.mp3", "Common Voice"),
        ("1/2/1-2.trans.txt", "LibriSpeech"),
        ("a.TextGrid", "TextGrid"),
        ("train.tsv", "name the table itself"),
        ("ab/ab.json", "--format sap"),
        ("F01/Session1/prompts/0001.txt", "--format torgo"),
        ("index.jsonl", "a corpus already"),
        ("readme.md", "make a table"),
    ],
)
def test_other_folders_are_named_for_what_they_are(tmp_path, name, advice):
    """Manifests given to the wrong reader fail without a word of their kind (NVIDIA-NeMo/Speech#16033)."""
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("x", "utf-8")
    with pytest.raises(DataError, match=advice):
        import_audiofolder(tmp_path / "data", tmp_path / "out")


def test_leftovers_of_macos_are_nobodys_data(tmp_path):
    """`._` files beside the data (OpenNeuroOrg/openneuro#2520) stopped the import of SAP, and were prompts of TORGO."""
    sap, torgo = tmp_path / "sap" / "ab", tmp_path / "torgo" / "F01" / "Session1"
    recordings(sap, 1)
    (sap / "0.wav").rename(sap / "ab_0.wav")
    file = {"Filename": "ab_0.wav", "Prompt": {"Transcript": "It’s fine"}}
    (sap / "ab.json").write_text(json.dumps({"Contributor ID": "ab", "Etiology": "ALS", "Files": [file]}), "utf-8")
    recordings(torgo / "wav_headMic", 1)
    (torgo / "prompts").mkdir()
    (torgo / "prompts" / "0.txt").write_text("stick", "utf-8")
    for folder, name in ((sap, "._ab.json"), (sap, "._ab_0.wav"), (torgo / "prompts", "._0.txt")):
        (folder / name).write_bytes(APPLE)
    shutil.copytree(sap, tmp_path / "sap" / "__MACOSX" / "ab")
    assert cells(import_sap(tmp_path / "sap", tmp_path / "out"), "text") == [("It's fine",)]
    made = import_torgo(tmp_path / "torgo", tmp_path / "out2")
    assert (cells(made, "text"), dict(made.skipped)) == ([("stick",)], {})
