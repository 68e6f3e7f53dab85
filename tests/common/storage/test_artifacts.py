"""An artifact is absent or whole: whoever dies, races or flips bits."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from common.errors import DataError, RetryableError, StoreError
from common.storage import open_store
from common.storage.artifacts import (
    Key,
    State,
    commit,
    fetch,
    inspect,
    make_key,
    new_attempt,
    quarantine,
    shard_key,
)
from common.storage.garbage import garbage
from common.storage.manifest import Malformed, Manifest
from tests.common.storage.test_store import dies_at

KEY = make_key("asr", 1, {"asr.epochs": 5, "seed": 42}, {"corpus": "sha256:abc"})
FILES = {"weights.safetensors": b"\x01" * 5000, "deep/er/metrics.jsonl": b"{}\n", "plot.png": b"\x89PNG"}


def make(store, scratch, *, key=KEY, files=FILES, **options):
    """Writes and commits an attempt."""
    folder = new_attempt(store, key, scratch)
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    known = {"volatile": ("*.png",), "started": 1.0, "seconds": 2.0, "metrics": {"wer": 12.5}}
    return commit(store, key, folder, **known | options)


def content(folder, manifest):
    return {name: (folder / name).read_bytes() for name in manifest.files}


def keys(store, prefix=""):
    return [entry.key for entry in store.list(prefix)]


def flip_bit(store, key, at=10):
    body = bytearray(store.read(key))
    body[at] ^= 4
    store.write(key, bytes(body))


def place(key, manifest, name):
    return f"{key.prefix}{manifest.attempt}/{name}"


# Keys


def test_a_key_depends_on_every_ingredient_and_on_no_order():
    base = ("asr", 1, {"a.x": 1, "b": [1, 2.5, None, "ü"]}, {"corpus": "c", "model": "m"})
    key = make_key(*base)
    assert len(key.digest) == 32
    assert make_key("asr", 1, {"b": (1, 2.5, None, "ü"), "a.x": 1}, {"model": "m", "corpus": "c"}) == key
    others = [
        make_key("experts", *base[1:]),
        make_key("asr", 2, *base[2:]),
        make_key("asr", 1, base[2] | {"a.x": 2}, base[3]),
        make_key("asr", 1, base[2] | {"new": None}, base[3]),
        make_key("asr", 1, base[2], base[3] | {"corpus": "d"}),
        shard_key(key, 0),
        shard_key(key, 1),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == 8


def test_ingredients_are_what_json_gives_back():
    key = make_key("asr", 1, {"layers": (1, 2)}, {})
    assert json.loads(json.dumps(key.ingredients)) == key.ingredients
    assert key == Key("asr", key.digest)


# Committing and fetching


def test_a_committed_artifact_is_done_and_comes_back_whole(any_store, tmp_path):
    assert inspect(any_store, KEY) == State("missing", "not made yet")
    manifest = make(any_store, tmp_path / "scratch")
    for deep in (False, True):
        state = inspect(any_store, KEY, deep=deep)
        assert (state.status, state.manifest) == ("done", manifest)
    folder = fetch(any_store, KEY, manifest, tmp_path / "into")
    assert content(folder, manifest) == FILES
    assert manifest.ingredients == KEY.ingredients
    assert (folder == tmp_path / "into") == (any_store.local_path("") is None)  # a folder store copies nothing


def test_the_digest_is_of_names_and_contents_without_what_may_vary(tmp_path):
    def digest(name, **changes):
        return make(open_store(tmp_path / name), tmp_path, files=FILES | changes).digest

    assert digest("a") == digest("b") == digest("c", **{"plot.png": b"other"})
    assert len({digest("a1"), digest("d", **{"weights.safetensors": b"x"}), digest("e", extra=b"")}) == 3


def test_the_second_of_two_writers_finds_its_work_done(any_store, tmp_path):
    first = make(any_store, tmp_path / "1")
    second = make(any_store, tmp_path / "2", started=2.0, files={"other": b""})
    assert second == first
    assert {key.split("/")[3] for key in keys(any_store)} == {"manifest.json", first.attempt}


def test_a_manifest_that_was_written_though_the_store_says_it_was_taken_is_ours(any_store, tmp_path, monkeypatch):
    """A network file system, or a request that was repeated, may answer so."""
    put = any_store.put_if_absent
    monkeypatch.setattr(type(any_store), "put_if_absent", lambda self, *given: put(*given) and False)
    made = make(any_store, tmp_path)
    assert inspect(any_store, KEY, deep=True).manifest == made
    assert inspect(any_store, KEY, deep=True).status == "done"


def test_of_many_racing_writers_all_get_the_same_whole_artifact(any_store, tmp_path):
    start = threading.Barrier(6)

    def race(i):
        start.wait()
        return make(any_store, tmp_path / str(i), started=float(i), files={"f": bytes([i]) * 1000})

    with ThreadPoolExecutor(6) as pool:
        manifests = list(pool.map(race, range(6)))
    assert len({manifest.started for manifest in manifests}) == 1
    assert inspect(any_store, KEY, deep=True).status == "done"
    assert any_store.read(place(KEY, manifests[0], "f")) == bytes([int(manifests[0].started)]) * 1000
    assert len(keys(any_store)) == 2


def test_artifacts_of_different_seeds_do_not_mix(any_store, tmp_path):
    made = {}
    for seed in (1, 2):
        key = make_key("asr", 1, {"seed": seed}, {})
        made[key] = make(any_store, tmp_path, key=key, files={"f": bytes([seed])})
    for key, manifest in made.items():
        assert inspect(any_store, key).manifest == manifest
    assert len({m.digest for m in made.values()}) == 2


def test_fetched_files_that_are_right_are_not_brought_again(bucket, proxy, tmp_path):
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    manifest = make(store, tmp_path / "scratch")
    into = tmp_path / "into"
    fetch(store, KEY, manifest, into)
    (into / "plot.png").write_bytes(b"torn")
    proxy.seen.clear()
    assert content(fetch(store, KEY, manifest, into), manifest) == FILES
    fetched = [path.rpartition("/")[2] for method, path, _ in proxy.seen if method == "GET"]
    assert fetched == ["plot.png"]


# Damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_found_told_and_made_again(any_store, tmp_path, damage):
    manifest = make(any_store, tmp_path / "scratch")
    victim = place(KEY, manifest, "weights.safetensors")
    if damage == "flip":
        flip_bit(any_store, victim)
    elif damage == "truncate":
        any_store.write(victim, any_store.read(victim)[:-1])
    else:
        any_store.delete(victim)
    state = inspect(any_store, KEY, deep=damage == "flip")
    reason = {"flip": "altered", "truncate": "has 4,999 bytes instead of 5,000", "remove": "missing"}[damage]
    assert (state.status, state.manifest) == ("damaged", manifest)
    assert "weights.safetensors" in state.reason
    assert reason in state.reason
    with pytest.raises(RetryableError, match=r"weights\.safetensors.*recreated"):
        fetch(any_store, KEY, manifest, tmp_path / "into")
    assert inspect(any_store, KEY).status == "missing"  # quarantined
    assert any(key.endswith(".damaged.json") for key in keys(any_store))
    again = make(any_store, tmp_path / "scratch")
    assert content(fetch(any_store, KEY, again, tmp_path / "into"), again) == FILES
    assert again.digest == manifest.digest


def test_bytes_that_suffer_on_their_way_are_brought_again(bucket, proxy, tmp_path):
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    manifest = make(store, tmp_path / "scratch")
    proxy.break_next("flip", 100, method="GET", path="weights")
    assert content(fetch(store, KEY, manifest, tmp_path / "into"), manifest) == FILES
    proxy.break_next("flip", 100, method="GET", path="weights")
    assert inspect(store, KEY, deep=True).status == "done"


def test_only_the_damaged_artifact_is_made_again(any_store, tmp_path):
    shards = [shard_key(KEY, i) for i in range(3)]
    made = [make(any_store, tmp_path, key=key, files={"f": bytes([i]) * 100}) for i, key in enumerate(shards)]
    flip_bit(any_store, place(shards[1], made[1], "f"))
    assert [inspect(any_store, key, deep=True).status for key in shards] == ["done", "damaged", "done"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"size": 5000', '"size": "5000"'),
        lambda text: text.replace('"attempt"', '"attempted"'),
        lambda text: text.replace("weights.safetensors", "../../weights"),
        lambda text: text.replace("weights.safetensors", "/etc/passwd"),
        lambda text: text.replace('"stage": "asr"', '"stage": "gating"'),
    ],
)
def test_a_damaged_manifest_is_found_and_quarantined(any_store, tmp_path, spoil):
    make(any_store, tmp_path / "scratch")
    text = any_store.read(f"{KEY.prefix}manifest.json").decode()
    assert spoil(text) != text
    any_store.write(f"{KEY.prefix}manifest.json", spoil(text).encode())
    state = inspect(any_store, KEY)
    assert state.status == "damaged"
    quarantine(any_store, KEY, state)
    assert inspect(any_store, KEY).status == "missing"


def test_a_commit_that_meets_a_damaged_manifest_takes_its_place(any_store, tmp_path):
    any_store.write(f"{KEY.prefix}manifest.json", b"{torn")
    manifest = make(any_store, tmp_path / "scratch")
    assert inspect(any_store, KEY, deep=True).manifest == manifest


def test_a_manifest_is_not_quarantined_when_it_was_mended_meanwhile(any_store, tmp_path):
    any_store.write(f"{KEY.prefix}manifest.json", b"{torn")
    judged = inspect(any_store, KEY)
    quarantine(any_store, KEY, judged)
    mended = make(any_store, tmp_path / "scratch")
    quarantine(any_store, KEY, judged)  # another process, late with the same judgement
    assert inspect(any_store, KEY).manifest == mended


def test_without_its_manifest_an_artifact_is_not_done(any_store, tmp_path):
    make(any_store, tmp_path / "scratch")
    any_store.delete(f"{KEY.prefix}manifest.json")
    assert inspect(any_store, KEY).status == "missing"


def test_a_newer_format_is_refused_with_the_remedy(any_store, tmp_path):
    manifest = make(any_store, tmp_path / "scratch")
    newer = json.loads(manifest.to_json()) | {"schema": 7, "version": "9.0", "files": "told otherwise"}
    any_store.write(f"{KEY.prefix}manifest.json", json.dumps(newer).encode())
    with pytest.raises(DataError, match=r"format 7, written by moe-asr 9\.0.*upgrade moe-asr"):
        inspect(any_store, KEY)
    assert garbage(any_store, older_than_hours=-1) == []  # nobody deletes what they do not understand


def test_manifests_survive_their_text_and_ignore_what_is_new_but_compatible(tmp_path):
    manifest = make(open_store(tmp_path), tmp_path)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    more = json.loads(manifest.to_json()) | {"note": "from a later version of the same format"}
    assert Manifest.from_json(json.dumps(more).encode(), "here") == manifest
    with pytest.raises(Malformed, match=r"here: seconds"):
        Manifest.from_json(replace(manifest, seconds="long").to_json(), "here")


def test_no_credential_reaches_a_manifest(any_store, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "")
    text = make(any_store, tmp_path).to_json().decode()
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no such key") not in text


# Garbage


def test_garbage_is_what_nothing_refers_to_and_nobody_writes(any_store, tmp_path):
    manifest = make(any_store, tmp_path / "scratch")
    open_key = shard_key(KEY, 5)
    any_store.write(f"{KEY.prefix}deadbeef/half", b"1")
    any_store.write(f"{KEY.prefix}checkpoints/000000010-x/state.json", b"2")
    any_store.write(f"{KEY.prefix}manifest.0badc0de.damaged.json", b"3")
    any_store.write(f"{open_key.prefix}beef/half", b"4")
    any_store.write(f"{open_key.prefix}checkpoints/000000010-x/state.json", b"5")
    any_store.write("demo/run.json", b"6")
    assert garbage(any_store) == []  # all of it is fresh
    leftovers = garbage(any_store, older_than_hours=-1)
    assert sorted(any_store.read(entry.key) for entry in leftovers) == [b"1", b"2", b"3", b"4"]
    for entry in leftovers:
        any_store.delete(entry.key)
    assert inspect(any_store, KEY, deep=True).manifest == manifest
    assert garbage(any_store, older_than_hours=-1) == []


def test_one_recent_file_protects_everything_under_its_key(tmp_path):
    store = open_store(tmp_path)
    store.write(f"{KEY.prefix}beef/old", b"")
    os.utime(tmp_path / KEY.prefix / "beef/old", (1, 1))
    store.write(f"{KEY.prefix}checkpoints/000000010-x/state.json", b"")
    assert garbage(store) == []
    long_ago = time.time() - 25 * 3600
    os.utime(tmp_path / KEY.prefix / "checkpoints/000000010-x/state.json", (long_ago, long_ago))
    assert [entry.key for entry in garbage(store)] == [f"{KEY.prefix}beef/old"]


# Being killed


def test_killed_at_any_moment_a_commit_is_absent_or_whole_in_a_folder(tmp_path):
    moments = die_everywhere(lambda n: open_store(tmp_path / f"{n}"), tmp_path)
    assert moments >= 8


def test_killed_at_any_moment_a_commit_is_absent_or_whole_on_a_server(bucket, s3_server, tmp_path):
    moments = die_everywhere(lambda n: open_store(f"s3://{bucket}/{n}", endpoint_url=s3_server.endpoint), tmp_path)
    assert moments >= 8  # before and after each of four writes


def die_everywhere(open_nth, tmp_path):
    """Kills a commit at each of its moments; afterwards the key is missing or whole, and making it again works."""
    statuses = []
    for n in range(1, 100):
        if not dies_at(n, lambda n=n: make(open_nth(n), tmp_path / "scratch")):
            break
        store = open_nth(n)
        state = inspect(store, KEY, deep=True)
        assert state.status in ("missing", "done")
        statuses.append(state.status)
        manifest = state.manifest or make(store, tmp_path / "scratch")
        assert content(fetch(store, KEY, manifest, tmp_path / "into" / str(n)), manifest) == FILES
        for entry in garbage(store, older_than_hours=-1):
            store.delete(entry.key)
        assert inspect(store, KEY, deep=True).status == "done"
        assert len(keys(store)) == 1 + len(FILES)
    assert set(statuses) == {"missing", "done"}
    assert statuses == sorted(statuses, reverse=True)  # once done, done at every later moment
    return len(statuses)


def test_a_full_disk_loses_nothing_and_is_told(small_disk, tmp_path):
    folder, _ = small_disk
    store = open_store(folder)
    manifest = make(store, tmp_path)
    other = shard_key(KEY, 1)
    attempt = new_attempt(store, other, tmp_path)
    (attempt / "f").write_bytes(b"small")
    store.write("filler", bytes(folder_space(folder)))
    with pytest.raises(StoreError, match="disk is full"):
        commit(store, other, attempt, started=1.0, seconds=1.0, metrics={"long": "x" * 5000})
    assert inspect(store, KEY, deep=True).manifest == manifest
    assert inspect(store, other).status == "missing"


def folder_space(folder):
    status = os.statvfs(folder)
    return status.f_bavail * status.f_bsize
