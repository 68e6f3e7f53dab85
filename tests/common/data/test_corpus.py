"""The index: what is refused and how it says so, what the digest depends on, and subsets that lie inside each other."""

import json
import random
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import pytest

from common.data.corpus import (
    Utterance,
    corpus_stats,
    index_digest,
    read_corpus,
    write_index,
)
from common.data.subsets import stratified_subset
from common.errors import DataError, StoreError


def make_utterance(number: int, **changes: object) -> Utterance:
    plain = Utterance(f"u{number:05d}", f"audio/{number}.wav", 2.0, "some words", speaker=f"s{number % 7}")
    return replace(plain, **changes)


def make_utterances(sizes: dict[str, int]) -> list[Utterance]:
    etiologies = [name for name, size in sizes.items() for _ in range(size)]
    return [make_utterance(i, etiology=name) for i, name in enumerate(etiologies)]


def write_lines(folder, *records: object) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


GOOD = {"id": "a", "audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}


def test_what_is_written_is_read_back(tmp_path):
    written = [
        make_utterance(2, text="naïve “quotes”", etiology="typical", severity="mild", text_alt="naive", offset=3.25),
        make_utterance(1, split="test", audio_filepath="/somewhere/else.flac"),
    ]
    write_index(tmp_path, written)
    corpus = read_corpus(tmp_path)
    assert corpus.utterances == tuple(sorted(written, key=lambda u: u.id))
    assert corpus.digest == index_digest(written)
    assert [u.id for u in corpus.split("test")] == ["u00001"]
    assert corpus.split("dev") == []
    assert corpus.path(corpus.utterances[1]) == tmp_path / "audio/2.wav"
    assert str(corpus.path(corpus.utterances[0])) == "/somewhere/else.flac"


def test_an_index_file_and_its_folder_are_the_same_corpus(tmp_path):
    write_index(tmp_path, [make_utterance(1)])
    assert read_corpus(tmp_path / "index.jsonl") == read_corpus(str(tmp_path))


def test_a_nemo_manifest_needs_no_id_and_may_hold_more(tmp_path):
    records = [{**GOOD, "lang": "en"}, {**GOOD, "offset": 1.5}]
    (tmp_path / "manifest.json").write_text("\n".join(json.dumps(r | {"id": None}) for r in records), encoding="utf-8")
    assert [u.id for u in read_corpus(tmp_path / "manifest.json").utterances] == ["a.wav", "a.wav@1.5"]


@pytest.mark.parametrize(
    ("second_line", "words"),
    [
        ("{not json", ["not JSON", "column"]),
        ("[1, 2]", ["list", "object"]),
        ({**GOOD, "text": None}, ["'text'", "missing"]),
        ({k: v for k, v in GOOD.items() if k != "audio_filepath"}, ["'audio_filepath'", "missing"]),
        ({**GOOD, "duration": "long"}, ["'duration'", "number", "long"]),
        ({**GOOD, "duration": True}, ["'duration'", "number", "true"]),
        ({**GOOD, "duration": -1}, ["'duration'", "0 or more", "-1"]),
        ('{"audio_filepath": "a.wav", "duration": NaN, "text": ""}', ["'duration'", "finite"]),
        ({**GOOD, "id": "b", "speaker": 7}, ["'speaker'", "7", "quotes"]),
        ({**GOOD, "id": ""}, ["'id'", "empty"]),
        ({**GOOD, "audio_filepath": ""}, ["'audio_filepath'", "empty"]),
        (GOOD, ["'a'", "line 1"]),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, second_line, words):
    write_lines(tmp_path, GOOD, second_line)
    with pytest.raises(DataError) as error:
        read_corpus(tmp_path)
    message = str(error.value)
    assert f"{tmp_path / 'index.jsonl'}:2" in message
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_an_empty_corpus_is_refused(tmp_path):
    write_lines(tmp_path, "", "  ")
    with pytest.raises(DataError, match="contains no utterance"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("name", ["", "missing", "index.jsonl"])
def test_a_missing_index_says_how_to_make_one(tmp_path, name):
    with pytest.raises(DataError, match="corpus import"):
        read_corpus(tmp_path / name)


def test_an_index_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "index.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match="utf-8"):
        read_corpus(tmp_path)


def test_the_digest_ignores_order_and_place(tmp_path):
    for name, order in (("here", 1), ("there", -1)):
        root = tmp_path / name
        (root / "audio").mkdir(parents=True)
        absolute = [make_utterance(i, audio_filepath=str(root / f"audio/{i}.wav")) for i in range(5)]
        records = [{f.name: getattr(u, f.name) for f in fields(u)} for u in absolute]
        write_lines(root, *records[::order])
    here, there = read_corpus(tmp_path / "here"), read_corpus(tmp_path / "there")
    assert here.digest == there.digest
    assert here.utterances == there.utterances


@pytest.mark.parametrize("field", [f.name for f in fields(Utterance)])
def test_the_digest_changes_with_every_field(field):
    plain = make_utterance(1)
    changed = replace(plain, **{field: 9.5 if field in ("duration", "offset") else "changed"})
    assert index_digest([plain]) != index_digest([changed])


def test_a_failed_write_leaves_the_old_index(tmp_path):
    write_index(tmp_path, [make_utterance(1)])
    before = (tmp_path / "index.jsonl").read_bytes()
    with pytest.raises(TypeError):
        write_index(tmp_path, [make_utterance(2), make_utterance(3, text=object())])
    assert (tmp_path / "index.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["index.jsonl"]


def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StoreError, match="is a file where a folder is needed"):
        write_index(tmp_path / "file", [make_utterance(1)])


def test_subsets_are_nested_by_percent_and_by_count():
    utterances = make_utterances({"a": 300, "b": 90, "c": 7, "": 40})
    counts = [1, 2, 5, 10, 44, 66, 200, 437]
    subsets = [stratified_subset(utterances, count=n, seed=1) for n in counts]
    subsets += [stratified_subset(utterances, percent=p, seed=1) for p in (0.001, 10, 15, 50, 99, 100)]
    subsets.sort(key=len)
    assert [len(s) for s in subsets] == sorted([*counts, 1, 44, 66, 219, 433, 437])
    for small, large in pairwise(subsets):
        assert set(small) <= set(large)
        assert small == sorted(small, key=lambda u: u.id)


def test_subsets_keep_the_etiologies_in_proportion():
    sizes = {"a": 600, "b": 300, "c": 90, "d": 10}
    for percent in (2, 10, 33):
        counts = Counter(u.etiology for u in stratified_subset(make_utterances(sizes), percent=percent, seed=3))
        assert all(abs(counts[name] - size * percent / 100) <= 1 for name, size in sizes.items()), counts


def test_subsets_do_not_depend_on_the_order_of_the_file():
    utterances = make_utterances({"a": 50, "b": 20})
    shuffled = random.Random(0).sample(utterances, len(utterances))
    assert stratified_subset(utterances, percent=20, seed=5) == stratified_subset(shuffled, percent=20, seed=5)


def test_another_seed_takes_another_subset():
    utterances = make_utterances({"a": 200})
    assert stratified_subset(utterances, count=20, seed=1) != stratified_subset(utterances, count=20, seed=2)


def test_a_corpus_of_one_has_a_subset_of_one():
    assert stratified_subset([make_utterance(1)], percent=1, seed=1) == [make_utterance(1)]
    assert stratified_subset([make_utterance(1)], count=50, seed=1) == [make_utterance(1)]
    assert stratified_subset([], percent=10, seed=1) == []


def test_stats_count_utterances_hours_and_speakers(tmp_path):
    utterances = [make_utterance(i, duration=1800.0, split="test" if i == 0 else "train") for i in range(8)]
    write_index(tmp_path, utterances)
    stats = corpus_stats(read_corpus(tmp_path))
    assert (stats["utterances"], stats["hours"], stats["speakers"], stats["words"]) == (8, 4.0, 7, 16)
    assert stats["by_split"]["test"]["utterances"] == 1
    assert set(stats["by_speaker"]) == {f"s{i}" for i in range(7)}
    assert "by_etiology" not in stats
    json.dumps(stats)
