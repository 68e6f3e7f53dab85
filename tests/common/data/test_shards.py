"""A packed corpus is the same corpus; only the ranges that are asked for travel; what lies in an index or a tar is
refused.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import wave
from dataclasses import replace

import pytest
import torch

from common.data.audit import audit
from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.clips import Place
from common.data.corpus import read_corpus
from common.data.shards import check_shard, pack_corpus, parse_size
from common.data.sources import open_corpus
from common.data.tokens import load_codec
from common.errors import DataError, UsageError
from common.storage import open_store
from tests.common.storage.test_store import dies_at

CPU = torch.device("cpu")
SHARD = 200_000  # bytes: a handful of files


@pytest.fixture(scope="module")
def packed(tones, tmp_path_factory):
    """The corpus of tones, packed in a folder."""
    folder = tmp_path_factory.mktemp("packed")
    pack_corpus(read_corpus(tones), open_store(folder / "corpus"), shard_bytes=SHARD, scratch=folder)
    return folder / "corpus"


@pytest.fixture
def broken(packed, tmp_path):
    """A copy of it to be spoiled."""
    return shutil.copytree(packed, tmp_path / "broken")


def load_all(corpus, model, *, workers=0, utterances=None):
    """id → audio of every utterance, through the loader."""
    codec = load_codec(model)
    examples = make_examples(corpus, utterances or corpus.utterances, codec, context="dynamic", margin=64)
    loader = BatchLoader(examples, num_workers=workers, device=CPU)
    audio = {}
    for batch in loader(epoch_batches(examples, batch_size=4, shuffle=False)):
        audio |= dict(zip(batch.ids, batch.audio_BS, strict=True))
    return audio


def lines(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def rewrite(folder, number, **changes):
    """Changes fields of one line of an index."""
    rows = lines(folder)
    rows[number] |= changes
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Packing


def test_packed_and_unpacked_are_the_same_corpus(tones, packed, micro_model):
    plain, made = read_corpus(tones), read_corpus(packed)
    assert made.digest == plain.digest
    assert made.utterances == plain.utterances
    before, after = load_all(plain, micro_model), load_all(made, micro_model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_are_plain_tars_of_at_most_the_size_asked_for(tones, packed):
    shards = sorted((packed / "shards").iterdir())
    assert len(shards) > 5
    assert all(path.stat().st_size <= SHARD + 20 * 512 for path in shards)  # a tar ends in padding
    contents = {}
    for path in shards:
        with tarfile.open(path, "r:") as tar:
            contents |= {member.name: tar.extractfile(member).read() for member in tar}
    assert contents == {str(p.relative_to(tones)): p.read_bytes() for p in tones.rglob("*.wav")}


def test_the_index_names_the_bytes(tones, packed):
    for row in lines(packed):
        with (packed / row["shard"]).open("rb") as file:
            file.seek(row["byte_offset"])
            assert file.read(row["byte_size"]) == (tones / row["audio_filepath"]).read_bytes()
            assert hashlib.sha256((tones / row["audio_filepath"]).read_bytes()).hexdigest() == row["sha256"]


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_a_file_larger_than_a_shard_and_a_shard_larger_than_the_corpus(tones, tmp_path, shard_bytes):
    made = pack_corpus(read_corpus(tones), open_store(tmp_path / "out"), shard_bytes=shard_bytes, scratch=tmp_path)
    assert made.shards == (1 if shard_bytes > 1 else made.files)
    assert audit(read_corpus(tmp_path / "out")) == audit(read_corpus(tones))


def test_names_that_no_tar_should_have_are_replaced(tones, tmp_path):
    corpus = read_corpus(tones)
    outside = str(corpus.path(corpus.utterances[0]))
    changed = replace(corpus, utterances=(replace(corpus.utterances[0], audio_filepath=outside), corpus.utterances[1]))
    pack_corpus(changed, open_store(tmp_path / "out"), shard_bytes=SHARD, scratch=tmp_path)
    again = read_corpus(tmp_path / "out")
    assert [u.audio_filepath for u in again.utterances] == [u.audio_filepath for u in changed.utterances]
    assert again.audio(again.utterances[0]) == corpus.audio(corpus.utterances[0])
    with tarfile.open(next((tmp_path / "out" / "shards").iterdir())) as tar:
        assert not [name for name in tar.getnames() if name.startswith("/")]


def test_packing_to_and_from_a_server_and_again_gives_the_same_bytes(packed, tones, bucket, s3_server, tmp_path):
    place = {"endpoint_url": s3_server.endpoint}
    open_store(f"s3://{bucket}/plain", **place).put_folder(tones, "")
    plain = open_corpus(f"s3://{bucket}/plain", tmp_path / "cache", **place)
    remote = open_store(f"s3://{bucket}/packed", **place)
    pack_corpus(plain, remote, shard_bytes=SHARD, scratch=tmp_path)
    again = open_store(tmp_path / "again")
    made = pack_corpus(open_corpus(remote.url, tmp_path / "cache", **place), again, shard_bytes=SHARD, scratch=tmp_path)
    wanted = {str(p.relative_to(packed)): p.read_bytes() for p in packed.rglob("*") if p.is_file()}
    for store in (remote, again):
        assert {entry.key: store.read(entry.key) for entry in store.list("")} == wanted
    assert made.stored == made.shards


def test_packing_goes_on_where_it_was_killed(tones, tmp_path):
    """Kills a packing at every write boundary: no index before all shards are whole; the same command mends it."""
    corpus = read_corpus(tones)
    few = replace(corpus, utterances=corpus.utterances[:12])
    moments = 0
    for moment in range(1, 200):
        store = open_store(tmp_path / str(moment))
        pack = lambda store=store: pack_corpus(few, store, shard_bytes=SHARD, scratch=tmp_path)  # noqa: E731
        if not dies_at(moment, pack):
            break
        moments = moment
        if store.size("index.jsonl") is not None:
            assert load_bytes(store) == {u.id: corpus.audio(u) for u in few.utterances}
        shards = sum(entry.key.endswith(".tar") for entry in store.list("shards/"))
        made = pack()
        assert made.shards - made.stored == shards
        assert load_bytes(store) == {u.id: corpus.audio(u) for u in few.utterances}
    assert moments >= 8


def load_bytes(store):
    corpus = read_corpus(store.root)
    return {u.id: corpus.audio(u) for u in corpus.utterances}


def test_another_corpus_is_not_overwritten(packed, tones, tmp_path):
    store = open_store(tmp_path / "out")
    store.write("index.jsonl", b"{}")
    with pytest.raises(UsageError, match="already holds another index"):
        pack_corpus(read_corpus(tones), store, shard_bytes=SHARD, scratch=tmp_path)
    assert {entry.key: store.read(entry.key) for entry in store.list("")} == {"index.jsonl": b"{}"}


def test_the_provenance_of_another_index_of_the_same_audio_is_kept(broken, tones, tmp_path):
    source = shutil.copytree(tones, tmp_path / "source")
    (source / "provenance.json").write_text("new")
    (broken / "provenance.json").write_text("old")
    rows = [row | {"text": "another"} for row in lines(source)]
    (source / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="already holds another index"):
        pack_corpus(read_corpus(source), open_store(broken), shard_bytes=SHARD, scratch=tmp_path)
    assert (broken / "provenance.json").read_text() == "old"


def test_packing_the_same_again_does_nothing(tones, broken, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in broken.rglob("*") if p.is_file()}
    made = pack_corpus(read_corpus(tones), open_store(broken), shard_bytes=SHARD, scratch=tmp_path)
    assert made.stored == 0
    assert {p: p.stat().st_mtime_ns for p in broken.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("content", [pickle.dumps([1] * 100), b"", None], ids=["pickle", "empty", "missing"])
def test_what_is_no_audio_is_not_packed(tones, tmp_path, content):
    source = shutil.copytree(tones, tmp_path / "source")
    victim = sorted(source.rglob("*.wav"))[40]
    victim.unlink()
    if content is not None:
        victim.write_bytes(content)
    with pytest.raises(DataError, match=victim.name):
        pack_corpus(read_corpus(source), open_store(tmp_path / "out"), shard_bytes=SHARD, scratch=tmp_path)
    assert open_store(tmp_path / "out").size("index.jsonl") is None


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256 * 10**6), ("1.5 GiB", 3 * 2**29), ("1000", 1000), ("2k", 2000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1MB", "0", "1TB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="write it as 256MB"):
        parse_size(text)


# Indexes and shards that lie


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "../../etc/passwd"}, "leads out of the corpus"),
        ({"shard": "/etc/passwd"}, "leads out of the corpus"),
        ({"shard": 7}, "must name a tar"),
        ({"byte_offset": -1}, "are not a valid range"),
        ({"byte_offset": "0"}, "are not a valid range"),
        ({"byte_size": 0}, "are not a valid range"),
        ({"byte_size": 2**40}, "are not a valid range"),
        ({"byte_size": True}, "are not a valid range"),
        ({"sha256": "x"}, "64 hex digits"),
        ({"sha256": None}, "64 hex digits"),
    ],
)
def test_a_place_that_cannot_be_is_refused(broken, changes, message):
    rewrite(broken, 3, **changes)
    with pytest.raises(DataError, match=rf"index\.jsonl:4.*{message}"):
        read_corpus(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byte_size": 2**29}, "truncated"),
        ({"byte_size": 100}, "not those that the index names"),
        ({"byte_offset": 0}, "not those that the index names"),
        ({"shard": "shards/none.tar"}, "does not exist"),
        ({"sha256": "0" * 64}, "not those that the index names"),
    ],
)
def test_a_place_that_lies_is_refused_when_it_is_read(broken, changes, message, micro_model):
    rewrite(broken, 3, **changes)
    corpus = read_corpus(broken)
    with pytest.raises(DataError, match=message):
        corpus.audio(corpus.utterances[3])
    with pytest.raises(DataError, match=message):
        load_all(corpus, micro_model)


def test_one_audio_in_two_places_is_refused(broken):
    rows = lines(broken)
    extra = rows[0] | {"id": "other", "byte_offset": rows[0]["byte_offset"] + 1}
    with (broken / "index.jsonl").open("a") as file:
        file.write(json.dumps(extra) + "\n")
    with pytest.raises(DataError, match="has two locations in the index"):
        read_corpus(broken)


def test_a_flipped_bit_in_a_shard_is_found(broken, micro_model):
    row = lines(broken)[5]
    path = broken / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["byte_offset"] + 1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="shard is damaged"):
        load_all(read_corpus(broken), micro_model)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def wav(seconds=1):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)) * (125 * seconds))
    return buffer.getvalue()


def poisoned_tar(path, kind):
    """A tar with one honest file and one poisoned member; the honest file's place."""
    honest, extra = tarfile.TarInfo("audio/a.wav"), tarfile.TarInfo("audio/b.wav")
    honest.size = len(wav())
    body = b""
    match kind:
        case "link":
            extra.type, extra.linkname = tarfile.SYMTYPE, "/etc/passwd"
        case "hard link":
            extra.type, extra.linkname = tarfile.LNKTYPE, "../../etc/passwd"
        case "device":
            extra.type = tarfile.CHRTYPE
        case "absolute":
            extra.name, body = "/tmp/b.wav", wav()
        case "above":
            extra.name, body = "../b.wav", wav()
        case "pickle":
            extra.name, body = "audio/data.pkl", pickle.dumps(Bomb())
    extra.size = len(body)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        tar.addfile(honest, io.BytesIO(wav()))
        place = Place("shards/x.tar", 512, len(wav()), hashlib.sha256(wav()).hexdigest())
        tar.addfile(extra, io.BytesIO(body))
    if kind == "size":  # the header says more than the file holds
        data = bytearray(path.read_bytes())
        data[124:136] = b"77777777777\0"
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        path.write_bytes(data)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:20_000])
    return place


POISON = {
    "link": "not a regular file",
    "hard link": "not a regular file",
    "device": "not a regular file",
    "absolute": "leads out of the corpus",
    "above": "leads out of the corpus",
    "pickle": "the index does not name",
    "size": "the index does not name|not a complete tar",
    "truncated": "not a complete tar|has no file of",
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_tar_is_refused_and_nothing_of_it_is_executed_or_written(tmp_path, kind):
    folder = tmp_path / "corpus"
    place = poisoned_tar(folder / "shards" / "x.tar", kind)
    with pytest.raises(DataError, match=POISON[kind]):
        check_shard(folder / "shards" / "x.tar", [place])
    row = {"id": "a", "audio_filepath": "audio/a.wav", "duration": 1.0, "text": "one"}
    row |= {name: getattr(place, name) for name in ("shard", "byte_offset", "byte_size", "sha256")}
    (folder / "index.jsonl").write_text(json.dumps(row))
    assert "bad-shard" in {finding.kind for finding in audit(read_corpus(folder))}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["index.jsonl", "x.tar"]


def test_a_pickle_in_the_place_of_audio_is_refused_and_not_loaded(tmp_path, micro_model):
    """The hash in the index is right, so only its content speaks against it."""
    body = pickle.dumps(Bomb())
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "x.tar", "w") as tar:
        member = tarfile.TarInfo("audio/a.wav")
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))
    row = {"id": "a", "audio_filepath": "audio/a.wav", "duration": 1.0, "text": "one", "shard": "shards/x.tar"}
    row |= {"byte_offset": 512, "byte_size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    (tmp_path / "index.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"a\.wav"):
        load_all(read_corpus(tmp_path), micro_model)
    assert [f.kind for f in audit(read_corpus(tmp_path))] == ["unreadable-audio", "no-speakers"]
