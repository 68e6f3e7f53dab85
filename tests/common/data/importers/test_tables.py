"""Importing: tables of several shapes become one corpus; faults are named by file and line and leave nothing behind."""

import csv
import errno
import json
import os
from collections import Counter

import numpy as np
import pytest

from common.data.audit import audit
from common.data.corpus import Utterance, read_corpus
from common.data.importers import audiofolder, tables
from common.data.importers.splits import split_by_speaker
from common.errors import DataError, RetryableError, StoreError, UsageError
from tests.factories import write_wav


def import_table(*arguments, **options):
    return tables.import_table(*arguments, **options).corpus


def import_audiofolder(*arguments, **options):
    return audiofolder.import_audiofolder(*arguments, **options).corpus


HEADING = ("path", "transcript", "speaker", "etiology")


@pytest.fixture
def audio(tmp_path):
    folder = tmp_path / "audio"
    for i in range(6):
        write_wav(folder / f"{i}.wav", np.random.default_rng(i).uniform(-0.3, 0.3, 16000 + 1600 * i))
    return folder


def rows() -> list[dict[str, str]]:
    return [dict(zip(HEADING, (f"{i}.wav", f"text, {i}", f"s{i}", "ab"[i % 2]), strict=True)) for i in range(6)]


def write_table(path, records: list[dict[str, str]], separator: str = ","):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(records)
    return path


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t"), ("t.jsonl", "")])
def test_a_table_becomes_a_corpus(tmp_path, audio, name, separator):
    corpus = import_table(write_table(audio / name, rows(), separator), tmp_path / "out")
    assert [u.id for u in corpus.utterances] == [str(i) for i in range(6)]
    first = corpus.utterances[3]
    assert (first.text, first.speaker, first.etiology, first.duration) == ("text, 3", "s3", "b", 1.3)
    assert corpus.path(first) == audio / "3.wav"
    assert audit(corpus) == []
    assert corpus == read_corpus(tmp_path / "out")


def test_a_line_of_json_may_leave_out_what_another_one_has(tmp_path, audio):
    first, second = {"audio": "0.wav", "text": "x"}, {"audio": "1.wav", "text": "y", "split": "test", "speaker": "s"}
    corpus = import_table(write_table(audio / "t.jsonl", [first | {"split": "train"}, second]), tmp_path / "out")
    assert [(u.split, u.speaker) for u in corpus.utterances] == [("train", ""), ("test", "s")]
    with pytest.raises(DataError, match=r"t\.jsonl:1: no split, but other rows have one"):
        import_table(write_table(audio / "t.jsonl", [first, second]), tmp_path / "other")


def test_copied_audio_makes_a_corpus_that_can_move(tmp_path, audio):
    corpus = import_table(write_table(audio / "t.csv", rows()), tmp_path / "out", copy_audio=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = read_corpus(tmp_path / "moved")
    assert moved.digest == corpus.digest
    assert audit(moved) == []


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EIO, RetryableError, "out: the file system fails"),
        (errno.ENOSPC, StoreError, "out: the disk is full"),
        (errno.ENOENT, DataError, r"t\.csv:2: .*0\.wav was removed"),
    ],
)
def test_a_copy_that_fails_is_named_and_leaves_nothing(tmp_path, audio, monkeypatch, number, kind, message):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(kind, match=message):
        import_table(write_table(audio / "t.csv", rows()), tmp_path / "deep" / "out", copy_audio=True)
    assert not any((tmp_path / "deep").iterdir())


def test_columns_and_audio_root_can_be_named(tmp_path, audio):
    records = [{"clip": r["path"], "said": r["transcript"], "who": "x", "said2": "other", "set": "val"} for r in rows()]
    table = write_table(tmp_path / "t.csv", records)
    columns = {"audio_filepath": "clip", "text": "said", "speaker": "who", "text_alt": "said2", "split": "set"}
    corpus = import_table(table, tmp_path / "out", audio_root=audio, columns=columns)
    assert {(u.speaker, u.text_alt, u.split) for u in corpus.utterances} == {("x", "other", "dev")}


def test_stretches_of_a_long_file_get_ids_of_their_own(tmp_path, audio):
    records = [{"path": "5.wav", "text": "a", "offset": str(o), "duration": "0.5"} for o in (0, 0.5, 1.05)]
    corpus = import_table(write_table(audio / "t.csv", records), tmp_path / "out")
    assert [(u.id, u.offset, u.duration) for u in corpus.utterances] == [
        ("5", 0.0, 0.5),
        ("5@0.5", 0.5, 0.5),
        ("5@1.05", 1.05, 0.45),
    ]


def changed(number: int, **changes: str) -> list[dict[str, str]]:
    records = [{**row, "split": "", "offset": ""} for row in rows()]
    records[number] |= changes
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (changed(1, path="gone.wav"), r"t\.csv:3: cannot read .*gone\.wav"),
        (changed(1, path="t.csv"), r"t\.csv:3: .*t\.csv"),
        (changed(2, transcript=" "), r"t\.csv:4: column 'transcript' is empty"),
        (changed(0, path=""), r"t\.csv:2: column 'path' is empty"),
        (changed(2, split="holdout"), r"t\.csv:4: split 'holdout' is not one of train"),
        (changed(2, split="test"), r"t\.csv:2: no split, but other rows have one"),
        (changed(2, offset="soon"), r"t\.csv:4: offset 'soon' is not a number"),
        (changed(2, offset="60"), r"t\.csv:4: offset 60 s, but .* lasts 1\.20 s"),
        (changed(2, path="1.wav"), r"t\.csv:4: .*t\.csv:3 names .*1\.wav too"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_left(tmp_path, audio, records, message):
    table = write_table(audio / "t.csv", records)
    with pytest.raises(DataError, match=message):
        import_table(table, tmp_path / "deep" / "out")
    assert not any((tmp_path / "deep").glob("*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("path,text\n", "no rows"),
        ("film,text\n0.wav,a\n", "no column for 'audio_filepath'.*'film', 'text'"),
        ("path,text\n0.wav\n", "t.csv:2: .*cells"),
        ("path,text\n0.wav,a,b\n", "t.csv:2: .*cells"),
        ('path,text\n0.wav,"a\n', "t.csv:2: .*quotes"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, audio, content, message):
    (audio / "t.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        import_table(audio / "t.csv", tmp_path / "out")


@pytest.mark.parametrize("name", ["long " * 60, "a\0b.wav"])
def test_a_path_that_no_file_can_have_is_a_fault_of_its_row(tmp_path, audio, name):
    table = write_table(audio / "t.jsonl", [{"path": "0.wav", "text": "a"}, {"path": name, "text": "b"}])
    with pytest.raises(DataError, match=r"t\.jsonl:2: cannot read .*(File name too long|no file can have this name)"):
        import_table(table, tmp_path / "out")
    assert len(import_table(table, tmp_path / "out", skip_bad=True).utterances) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"columns": [0, 1], "data": [["0.wav", "a"]]}, "no column for 'audio_filepath'.*it has '0', '1'"),
        ({"columns": ["audio", "text"], "data": 3}, "JSON, but no table"),
        ({"columns": 3, "data": [["0.wav", "a"]]}, "JSON, but no table"),
        ({"columns": ["audio", "text"], "data": [["0.wav", "a"], 3]}, "JSON, but no table"),
    ],
)
def test_a_table_of_pandas_without_names_or_rows_is_refused(tmp_path, audio, content, message):
    (audio / "t.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        import_table(audio / "t.json", tmp_path / "out")


def test_unknown_columns_and_fields_name_those_that_exist(tmp_path, audio):
    table = write_table(audio / "t.csv", rows())
    with pytest.raises(DataError, match="no column 'Diagnosis' for 'etiology': it has path, transcript, speaker"):
        import_table(table, tmp_path / "out", columns={"etiology": "Diagnosis"})
    with pytest.raises(UsageError, match=r"'diagnosis'.*etiology"):
        import_table(table, tmp_path / "out", columns={"diagnosis": "etiology"})


def test_missing_and_mistyped_tables_are_refused(tmp_path, audio):
    (audio / "t.jsonl").write_text("[1]\n", encoding="utf-8")
    (audio / "t.csv").write_bytes("path,text\n0.wav,größer\n".encode("latin-1"))
    for name, message in (("gone.csv", "cannot read"), ("t.jsonl", r"t\.jsonl:1"), ("t.csv", "utf-8")):
        with pytest.raises(DataError, match=message):
            import_table(audio / name, tmp_path / "out")


def test_an_audiofolder_with_splits(tmp_path, audio):
    for split, numbers in (("train", (0, 1)), ("validation", (2,)), ("test", (3,))):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for i in numbers:
            (folder / f"{i}.wav").write_bytes((audio / f"{i}.wav").read_bytes())
        records = [{"file_name": f"{i}.wav", "transcription": f"text {i}"} for i in numbers]
        write_table(folder / ("metadata.csv" if split == "train" else "metadata.jsonl"), records)
    corpus = import_audiofolder(tmp_path / "data", tmp_path / "out")
    assert {u.id: u.split for u in corpus.utterances} == {
        "train/0": "train",
        "train/1": "train",
        "validation/2": "dev",
        "test/3": "test",
    }
    with pytest.raises(DataError, match=r"metadata\.csv"):
        import_audiofolder(audio, tmp_path / "none")


def test_splits_of_an_audiofolder_may_use_the_same_names(tmp_path, audio):
    for split in ("train", "test"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        (folder / "0001.wav").write_bytes((audio / "0.wav").read_bytes())
        write_table(folder / "metadata.csv", [{"file_name": "0001.wav", "transcription": split}])
    corpus = import_audiofolder(tmp_path / "data", tmp_path / "out")
    assert {u.id: u.text for u in corpus.utterances} == {"train/0001": "train", "test/0001": "test"}


def test_a_stretch_without_an_offset_begins_at_0_and_has_its_own_duration(tmp_path, audio):
    first = {"id": "a", "audio": "5.wav", "text": "first", "offset": "", "duration": "0.4", "split": "train"}
    second = first | {"id": "b", "text": "second", "offset": "0.4", "duration": "1.1"}
    for name in ("t.csv", "t.jsonl"):
        corpus = import_table(write_table(audio / name, [first, second]), tmp_path / name)
        assert [(u.offset, u.duration) for u in corpus.utterances] == [(0, 0.4), (0.4, 1.1)]
    again = import_table(tmp_path / "t.csv" / "index.jsonl", tmp_path / "again")  # which leaves out an offset of 0
    assert [(u.offset, u.duration) for u in again.utterances] == [(0, 0.4), (0.4, 1.1)]


def test_quotes_in_a_table_with_tabs_are_part_of_the_text(tmp_path, audio):
    texts = ["plain", '"Quote starts here', 'ends here"', '"Yes," she said', '"all of ""it"" quoted"']
    lines = ["path\tsentence", *(f"{i}.wav\t{text}" for i, text in enumerate(texts))]
    (audio / "t.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = import_table(audio / "t.tsv", tmp_path / "out")
    assert [u.text for u in corpus.utterances] == [*texts[:4], 'all of "it" quoted']


def people(sizes: dict[str, int]) -> list[Utterance]:
    speakers = [(name, i) for name, size in sizes.items() for i in range(size)]
    return [
        Utterance(f"{name}{i}-{k}", "a.wav", 1.0, "text", speaker=f"{name}{i}", etiology=name)
        for name, i in speakers
        for k in range(3)
    ]


def test_speakers_are_dealt_whole_and_in_every_etiology():
    dealt = split_by_speaker(people({"a": 20, "b": 5, "c": 2, "d": 1}), fractions=(0.8, 0.1, 0.1), seed=1)
    assert len({(u.speaker, u.split) for u in dealt}) == 28
    counts = Counter((u.etiology, u.split) for u in dealt)
    assert counts == {
        ("a", "train"): 48,
        ("a", "dev"): 6,
        ("a", "test"): 6,
        ("b", "train"): 9,
        ("b", "dev"): 3,
        ("b", "test"): 3,
        ("c", "train"): 3,
        ("c", "test"): 3,
        ("d", "train"): 3,
    }


def test_dealing_depends_on_the_seed_and_not_on_the_order():
    utterances = people({"a": 12, "b": 9})

    def dealt(order: list[Utterance], seed: int) -> dict[str, str]:
        return {u.speaker: u.split for u in split_by_speaker(order, fractions=(0.6, 0.2, 0.2), seed=seed)}

    assert dealt(utterances, 1) == dealt(utterances[::-1], 1)
    assert dealt(utterances, 1) != dealt(utterances, 2)


def test_utterances_without_speakers_are_dealt_one_by_one():
    utterances = [Utterance(f"u{i}", f"{i}.wav", 1.0, "text") for i in range(50)]
    counts = Counter(u.split for u in split_by_speaker(utterances, fractions=(0.8, 0.1, 0.1), seed=1))
    assert counts == {"train": 40, "dev": 5, "test": 5}
