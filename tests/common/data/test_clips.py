"""The cache of remote audio: never above its limit, the least recently used goes first, safe under races and kills.
And of a remote corpus only what is needed travels.
"""

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from common.data.batches import BatchLoader, epoch_batches, make_examples
from common.data.clips import AudioCache
from common.data.corpus import read_corpus
from common.data.shards import pack_corpus
from common.data.sources import open_corpus
from common.data.subsets import stratified_subset
from common.data.tokens import load_codec
from common.errors import DataError, RetryableError, StoreError
from common.storage import open_store
from tests.common.data.test_shards import SHARD, load_all
from tests.common.storage.test_store import dies_at

LIMIT = 10_000


@pytest.fixture
def cache(tmp_path):
    return AudioCache(tmp_path / "audio", LIMIT)


def name_of(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def content(number, size=900):
    return bytes([number % 256]) * size


def never():
    raise AssertionError("it should have been in the cache")


def total(cache):
    return sum(p.stat().st_size for p in cache.folder.rglob("*") if p.is_file() and len(p.name) == 64)


def holds(cache, name):
    return (cache.folder / name[:2] / name).exists()


# The cache


def test_what_was_brought_once_is_not_brought_again(cache):
    assert cache.get(name_of(1), lambda: content(1)) == content(1)
    assert cache.get(name_of(1), never) == content(1)
    assert holds(cache, name_of(1)) and not holds(cache, name_of(2))


def test_the_limit_holds_and_the_least_recently_used_goes_first(cache):
    kept = name_of("kept")
    cache.get(kept, lambda: content(0))
    for number in range(1, 60):
        cache.get(name_of(number), lambda number=number: content(number))
        cache.get(kept, never)
        assert total(cache) <= LIMIT
        assert holds(cache, name_of(number))
    assert not holds(cache, name_of(1))


@pytest.mark.parametrize("limit", [0, 500])
def test_what_is_larger_than_the_cache_is_used_and_not_kept(tmp_path, limit):
    cache = AudioCache(tmp_path / "audio", limit)
    for _ in range(2):
        assert cache.get(name_of(1), lambda: content(1)) == content(1)
    assert total(cache) == 0


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_file_that_a_power_cut_tore_is_brought_again(cache, how):
    cache.get(name_of(1), lambda: content(1))
    path = cache.folder / name_of(1)[:2] / name_of(1)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "flipped": b"x" + data[1:], "empty": b""}[how])
    assert cache.get(name_of(1), lambda: content(1)) == content(1)
    assert cache.get(name_of(1), never) == content(1)


@pytest.mark.parametrize("text", ["", "rubbish", "-5", "99999999999999999999"])
def test_a_lost_account_is_counted_anew(cache, text):
    for number in range(5):
        cache.get(name_of(number), lambda number=number: content(number))
    (cache.folder / "used").write_text(text)
    for number in range(5, 40):
        cache.get(name_of(number), lambda number=number: content(number))
        assert total(cache) <= LIMIT
    assert int((cache.folder / "used").read_text()) == total(cache)


def test_what_killed_writers_left_goes(cache):
    cache.get(name_of(1), lambda: content(1))
    torn = cache.folder / name_of(1)[:2] / ".tmp-dead"
    torn.write_bytes(b"half")
    os.utime(torn, (1, 1))
    for number in range(40):
        cache.get(name_of(number), lambda number=number: content(number))
    assert not torn.exists()


def test_a_fetch_that_fails_leaves_nothing(cache):
    def fail():
        raise RetryableError("no answer")

    with pytest.raises(RetryableError):
        cache.get(name_of(1), fail)
    assert total(cache) == 0


def test_a_full_disk_costs_time_and_not_the_run(small_disk, caplog):
    cache = AudioCache(small_disk[0] / "audio", 10**9)
    for number in range(20):
        body = content(number, 200_000)
        assert cache.get(name_of(number), lambda body=body: body) == body
    assert "No space left" in caplog.text
    assert not list(cache.folder.rglob(".tmp-*"))


def test_threads_share_it(cache):
    def use(number):
        for i in range(40):
            body = content((number * 7 + i) % 25)
            assert cache.get(name_of(body), lambda body=body: body) == body

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert total(cache) <= LIMIT
    assert int((cache.folder / "used").read_text()) == total(cache)


def test_processes_share_it_and_one_that_is_killed_does_no_harm(cache):
    code = (
        "import sys, hashlib; from pathlib import Path; from common.data.clips import AudioCache\n"
        f"cache = AudioCache(Path(sys.argv[1]), {LIMIT})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(int(sys.argv[2]), 10**9 if sys.argv[3] else 400):\n"
        "    n = i % 25; body = bytes([n]) * 900\n"
        "    assert cache.get(hashlib.sha256(str(n).encode()).hexdigest(), lambda: body) == body\n"
    )
    command = [sys.executable, "-c", code, str(cache.folder)]
    users = [
        subprocess.Popen([*command, str(i), "x" * (i == 0)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for i in range(3)
    ]
    for user in users:
        user.stdout.readline()
    for user in users:
        user.stdin.write(b"\n")
        user.stdin.flush()
    assert users[1].wait(60) == users[2].wait(60) == 0
    users[0].kill()
    users[0].wait()
    assert total(cache) <= LIMIT
    for number in range(25, 60):
        cache.get(name_of(number), lambda number=number: content(number))
        assert total(cache) <= LIMIT
    for user in users:
        user.stdin.close()
        user.stdout.close()


# Remote corpora


@pytest.fixture
def remote(tones, bucket, s3_server, tmp_path):
    """Address of the tones in a bucket, packed."""
    store = open_store(f"s3://{bucket}/packed", endpoint_url=s3_server.endpoint)
    pack_corpus(read_corpus(tones), store, shard_bytes=SHARD, scratch=tmp_path)
    return store.url


def corpus_at(url, proxy, tmp_path, cache_bytes=10**9):
    return open_corpus(url, tmp_path / "cache", endpoint_url=proxy.endpoint, cache_bytes=cache_bytes)


def audio_bytes(proxy):
    """Bytes that left the server since the last call, without those of the index."""
    sizes = [size for method, path, size in proxy.seen if method == "GET" and "index.jsonl" not in path]
    proxy.seen.clear()
    return sum(sizes)


def test_a_tenth_of_a_corpus_costs_a_tenth_of_its_bytes(remote, tones, proxy, tmp_path, micro_model):
    whole = sum(path.stat().st_size for path in tones.rglob("*.wav"))
    corpus = corpus_at(remote, proxy, tmp_path)
    part = stratified_subset(corpus.utterances, percent=10, seed=1)
    local = read_corpus(tones)
    loaded = load_all(corpus, micro_model, utterances=part)
    listings = 2_000  # answers to questions about the bucket
    assert sum(len(local.audio(u)) for u in part) <= audio_bytes(proxy) <= 0.12 * whole + listings
    wanted = load_all(local, micro_model, utterances=part)
    assert all(torch.equal(loaded[u.id], wanted[u.id]) for u in part)
    load_all(corpus, micro_model, utterances=part)
    assert audio_bytes(proxy) <= listings  # the second epoch is local


def test_loader_processes_read_a_remote_corpus_and_share_the_cache(remote, tones, proxy, tmp_path, micro_model):
    corpus = corpus_at(remote, proxy, tmp_path)
    part = corpus.utterances[:24]
    loaded = load_all(corpus, micro_model, workers=2, utterances=part)
    wanted = load_all(read_corpus(tones), micro_model, utterances=part)
    assert all(torch.equal(loaded[u.id], wanted[u.id]) for u in part)
    proxy.seen.clear()
    load_all(corpus, micro_model, utterances=part)
    assert audio_bytes(proxy) == 0


def test_a_cache_smaller_than_the_corpus_never_grows_above_its_limit(remote, tones, proxy, tmp_path, micro_model):
    corpus = corpus_at(remote, proxy, tmp_path, cache_bytes=150_000)
    loaded, wanted = load_all(corpus, micro_model), load_all(read_corpus(tones), micro_model)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    assert 0 < total(AudioCache(tmp_path / "cache" / "audio", 0)) <= 150_000


def test_the_next_batch_is_brought_while_one_is_in_use(remote, proxy, tmp_path, micro_model):
    corpus = corpus_at(remote, proxy, tmp_path)
    examples = make_examples(corpus, corpus.utterances[:12], load_codec(micro_model), context="dynamic", margin=64)
    batches = epoch_batches(examples, batch_size=4, shuffle=False)
    loading = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))(batches)
    next(loading)
    loading.close()  # waits for what is on its way
    cached = [[holds(corpus.remote.cache, examples[n].clip.cache_name) for n in numbers] for numbers in batches]
    assert all(cached[0]) and all(cached[1])
    assert not any(cached[2])


def test_an_unpacked_remote_corpus_is_read_file_by_file(tones, bucket, s3_server, proxy, tmp_path, micro_model):
    open_store(f"s3://{bucket}/plain", endpoint_url=s3_server.endpoint).put_folder(tones, "")
    corpus = corpus_at(f"s3://{bucket}/plain", proxy, tmp_path)
    local = read_corpus(tones)
    assert (corpus.digest, corpus.utterances) == (local.digest, local.utterances)
    part = corpus.utterances[:10]
    proxy.seen.clear()
    loaded, wanted = load_all(corpus, micro_model, utterances=part), load_all(local, micro_model, utterances=part)
    assert all(torch.equal(loaded[u.id], wanted[u.id]) for u in part)
    assert len({path for method, path, _ in proxy.seen if path.endswith(".wav")}) == 10
    load_all(corpus, micro_model, utterances=part)
    assert len([path for method, path, _ in proxy.seen if path.endswith(".wav")]) == 10


def test_an_index_file_of_a_bucket_is_a_corpus_by_its_own_name(remote, proxy, tmp_path):
    assert corpus_at(f"{remote}/index.jsonl", proxy, tmp_path).digest == corpus_at(remote, proxy, tmp_path).digest


def test_a_changed_index_is_brought_again(remote, tones, proxy, tmp_path):
    before = corpus_at(remote, proxy, tmp_path)
    store = open_store(remote, endpoint_url=proxy.endpoint)
    store.write("index.jsonl", store.read("index.jsonl").splitlines(keepends=True)[0])
    assert len(corpus_at(remote, proxy, tmp_path).utterances) == 1 < len(before.utterances)


def test_bytes_that_suffer_on_their_way_are_asked_for_again(remote, tones, proxy, tmp_path):
    corpus = corpus_at(remote, proxy, tmp_path)
    proxy.break_next("flip", 100, method="GET", path=".tar")
    assert corpus.audio(corpus.utterances[0]) == read_corpus(tones).audio(corpus.utterances[0])


def test_a_damaged_remote_shard_is_never_used_nor_kept(remote, proxy, tmp_path, micro_model):
    corpus = corpus_at(remote, proxy, tmp_path)
    proxy.break_next("flip", 100, times=99, method="GET", path=".tar")
    with pytest.raises(DataError, match="shard is damaged"):
        load_all(corpus, micro_model, utterances=corpus.utterances[:4])
    assert total(corpus.remote.cache) == 0


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("status", "code", "kind"), [(403, "AccessDenied", StoreError), (500, "", RetryableError)])
def test_a_store_that_refuses_is_told_as_such_by_the_loader(
    remote, proxy, tmp_path, micro_model, monkeypatch, workers, status, code, kind
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    corpus = corpus_at(remote, proxy, tmp_path)
    proxy.break_next("status", status, times=99, method="GET", path=".tar", code=code or "InternalError")
    with pytest.raises(kind) as told:
        load_all(corpus, micro_model, workers=workers, utterances=corpus.utterances[:4])
    assert "\n" not in str(told.value)


def test_a_missing_remote_corpus_is_told(bucket, proxy, tmp_path):
    with pytest.raises(DataError, match=rf"s3://{bucket}/none/index\.jsonl does not exist"):
        corpus_at(f"s3://{bucket}/none", proxy, tmp_path)


def test_a_bad_line_of_a_remote_index_is_named_by_its_address(remote, proxy, tmp_path):
    open_store(remote, endpoint_url=proxy.endpoint).write("index.jsonl", b"{}\n")
    with pytest.raises(DataError, match=rf"{remote}/index\.jsonl:1: field"):
        corpus_at(remote, proxy, tmp_path)


def test_remote_names_cannot_leave_the_bucket(remote, proxy, tmp_path):
    corpus = corpus_at(remote, proxy, tmp_path)
    changed = replace(corpus.utterances[0], audio_filepath="../other/a.wav")
    with pytest.raises(DataError, match="cannot be a key"):
        corpus.audio(changed)


@pytest.mark.parametrize("function", ["ftruncate", "pwrite"])
def test_killed_while_it_keeps_a_file_the_cache_stays_whole_and_bounded(cache, monkeypatch, function):
    """Before its account is opened, and between the new name and the new account."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def keep_and_die():
        monkeypatch.setattr(f"common.data.clips.os.{function}", die)
        cache.get(name_of(1), lambda: content(1))

    cache.get(name_of(0), lambda: content(0))
    assert dies_at(10**6, keep_and_die)
    assert cache.get(name_of(0), never) == content(0)
    for number in range(10, 40):
        cache.get(name_of(number), lambda number=number: content(number))
        assert total(cache) <= LIMIT
    assert int((cache.folder / "used").read_text()) == total(cache)
