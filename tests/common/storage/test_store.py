"""Both kinds of store behave the same, lose nothing to a fault, and say in one line what is wrong."""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.data.sources import download_folder
from common.errors import ConfigError, DataError, MoeAsrError, RetryableError, StoreError
from common.files import UMASK, NotFound
from common.storage import open_store
from common.storage.doctor import check_store
from common.storage.local import LocalStore
from common.storage.s3 import S3Store
from common.storage.s3_errors import explain
from common.storage.store import Entry
from tests.servers import ACCESS, SECRET, free_port

BLOB = bytes(range(256)) * 1000


@pytest.fixture
def broken_store(bucket, proxy, impatient):
    """A store behind the proxy, greeted already."""
    store = open_store(f"s3://{bucket}/p", endpoint_url=proxy.endpoint)
    store.size("nothing")
    proxy.seen.clear()
    return store


def names(store, prefix=""):
    return [entry.key for entry in store.list(prefix)]


# What every store does


def test_what_is_written_is_read_back_whole_and_in_ranges(any_store):
    any_store.write("a/b", BLOB)
    assert any_store.read("a/b") == BLOB
    assert any_store.read_range("a/b", 1000, 17) == BLOB[1000:1017]
    assert any_store.read_range("a/b", 5, 0) == b""
    assert any_store.size("a/b") == len(BLOB)
    any_store.write("a/b", b"new")
    assert any_store.read("a/b") == b"new"


def test_what_is_absent_is_told_apart(any_store, tmp_path):
    assert any_store.size("a") is None
    assert names(any_store) == []
    for ask in (
        any_store.read,
        lambda key: any_store.read_range(key, 0, 1),
        lambda key: any_store.get(key, tmp_path / "x"),
    ):
        with pytest.raises(NotFound, match="does not exist"):
            ask("a")
    any_store.delete("a")


@pytest.mark.parametrize("start", [250, 256, 10_000])
def test_a_range_past_the_end_is_refused(any_store, start):
    any_store.write("a", BLOB[:256])
    with pytest.raises(DataError, match="truncated"):
        any_store.read_range("a", start, 10)


def test_files_travel_both_ways_and_leave_no_temporary_name(any_store, tmp_path):
    (tmp_path / "in").write_bytes(BLOB)
    any_store.put("x/y", tmp_path / "in")
    any_store.get("x/y", tmp_path / "out" / "deep")
    assert (tmp_path / "out" / "deep").read_bytes() == BLOB
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "deep"]
    assert list(any_store.leftovers()) == []
    with pytest.raises(NotFound):
        any_store.put("x/z", tmp_path / "none")


def test_listings_are_complete_sorted_and_by_any_prefix(any_store):
    keys = ["a.b", "a/b/c", "a/b.c", "a/bb/d", "b", "a b/ü%20+&", "a-1/x"]
    for key in keys:
        any_store.write(key, key.encode())
    assert names(any_store) == sorted(keys)
    assert names(any_store, "a/") == ["a/b.c", "a/b/c", "a/bb/d"]
    assert names(any_store, "a/b") == ["a/b.c", "a/b/c", "a/bb/d"]
    assert names(any_store, "a/b.") == ["a/b.c"]
    assert names(any_store, "zz/") == []
    assert {entry.key: entry.size for entry in any_store.list("")} == {key: len(key.encode()) for key in keys}


def test_of_many_racing_puts_one_wins_and_its_bytes_stay(any_store):
    for round_ in range(5):
        bodies = [f"{round_}-{i}".encode() * 50 for i in range(12)]
        with ThreadPoolExecutor(12) as pool:
            won = list(pool.map(lambda body: any_store.put_if_absent(f"race/{round_}", body), bodies))  # noqa: B023
        assert won.count(True) == 1
        assert any_store.read(f"race/{round_}") == bodies[won.index(True)]


def test_processes_race_and_one_wins(tmp_path):
    code = (
        "import sys; from common.storage import open_store; store = open_store(sys.argv[1]); sys.stdin.readline();"
        "print(sum(store.put_if_absent(f'k/{i}', sys.argv[2].encode()) for i in range(100)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(4)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == 100
    store = open_store(tmp_path)
    assert sorted(won) == sorted(sum(store.read(f"k/{i}") == str(r).encode() for i in range(100)) for r in range(4))


def test_moving_aside_needs_the_bytes_that_were_judged(any_store):
    any_store.write("m", b"one")
    assert not any_store.move_aside("m", "m.old", b"other")
    assert names(any_store) == ["m"]
    assert any_store.move_aside("m", "m.old", b"one")
    assert names(any_store) == ["m.old"]
    assert not any_store.move_aside("m", "m.old", b"one")


def test_moving_aside_what_another_process_moves_meanwhile_is_no_fault(any_store, monkeypatch):
    any_store.write("m", b"one")
    if isinstance(any_store, LocalStore):
        monkeypatch.setattr("common.storage.local.moment", lambda: (any_store.root / "m").unlink(missing_ok=True))
    else:
        write = S3Store.write
        monkeypatch.setattr(S3Store, "write", lambda self, *words: (write(self, *words), self.delete("m")))
    any_store.move_aside("m", "m.old", b"one")
    assert "m" not in names(any_store)


def test_folders_travel_both_ways_and_again_only_what_changed(any_store, tmp_path):
    source = tmp_path / "source"
    for i in range(20):
        (source / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
        (source / f"d{i % 3}" / f"f{i}").write_bytes(BLOB[: i * 100])
    any_store.put_folder(source, "")
    assert len(names(any_store)) == 20
    target = tmp_path / "target"
    download_folder(any_store, target)
    assert {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()} == {
        p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()
    }
    before = {p: p.stat().st_ino for p in target.rglob("f*")}
    any_store.write("d0/f0", b"changed")
    (target / "stray").write_bytes(b"")
    download_folder(any_store, target)
    assert (target / "d0" / "f0").read_bytes() == b"changed"
    assert {p for p, inode in before.items() if p.stat().st_ino != inode} == {target / "d0" / "f0"}
    assert not (target / "stray").exists()


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x", "a\0b", "./a"])
def test_no_key_leads_out_of_the_store(any_store, key):
    for act in (any_store.read, any_store.delete, lambda key: any_store.write(key, b"")):
        with pytest.raises(DataError, match="cannot be a key"):
            act(key)


def test_the_doctor_finds_both_kinds_well(any_store):
    checks = list(check_store(any_store))
    assert [check for check in checks if check.state != "ok"] == []
    assert len(checks) >= 9
    assert names(any_store) == []  # it cleans up


def test_stores_are_opened_by_address(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    store = open_store("s3://bucket/a/b/", endpoint_url="http://127.0.0.1:1")
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix, store.url) == ("bucket", "a/b/", "s3://bucket/a/b")


@pytest.mark.parametrize(
    "url", ["gs://b/x", "file:///x", "http://h/x", "", "s3://", "s3:///x", "s3://KEY:SECRETWORD@b/x"]
)
def test_other_addresses_are_refused_without_echoing_secrets(url):
    with pytest.raises(ConfigError) as told:
        open_store(url)
    assert "SECRETWORD" not in str(told.value)


# Folders


def test_a_linked_folder_is_followed_and_a_loop_is_not(tmp_path):
    store = open_store(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_bytes(b"1")
    store.write("a/b/c", b"2")
    (tmp_path / "store" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store" / "a" / "b" / "loop").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "dangling").symlink_to(tmp_path / "none")
    assert names(store) == ["a/b/c", "linked/f"]


def test_empty_folders_go_with_their_last_file(tmp_path):
    store = open_store(tmp_path)
    store.write("a/b/c", b"")
    store.write("a/d", b"")
    store.delete("a/b/c")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "d"]
    store.delete("a/d")
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_writers_are_not_disturbed_by_folders_that_vanish(tmp_path):
    store = open_store(tmp_path)

    def churn(i):
        for j in range(40):
            store.write(f"x/y/{i}", bytes([j]))
            store.delete(f"x/y/{i}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert names(store) == []


def test_temporary_files_of_killed_writers_are_hidden_and_found(tmp_path):
    store = open_store(tmp_path)
    store.write("a/b", b"1")
    (tmp_path / "a" / ".tmp-dead").write_bytes(b"half")
    assert names(store) == ["a/b"]
    assert [entry.key for entry in store.leftovers()] == ["a/.tmp-dead"]
    store.delete("a/.tmp-dead")
    assert list(store.leftovers()) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    store = open_store(tmp_path)
    store.write("a", b"")
    with pytest.raises(StoreError, match="a is a file where a folder is needed"):
        store.write("a/b", b"")


def test_a_folder_in_its_place_is_as_readable_as_the_umask_allows(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "model.safetensors").touch(mode=0o600)  # as safetensors makes them
    open_store(tmp_path).put_folder(tmp_path / "a", "a")
    for path, rights in ((folder, 0o555), (folder / "model.safetensors", 0o444)):
        assert path.stat().st_mode & rights == rights & ~UMASK


def test_a_folder_without_rights_is_named(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)

    def write_as_nobody():
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(StoreError, match=r"shut.*no permission"):
            open_store(tmp_path / "shut").write("a", b"")

    assert not dies_at(10**6, write_as_nobody)


def test_a_full_disk_is_told_and_keeps_what_was_there(small_disk, tmp_path):
    folder, _ = small_disk
    store = open_store(folder)
    store.write("a/old", b"old")
    store.write("a/kept", b"kept")
    (tmp_path / "big").write_bytes(bytes(2**21))
    for act in (
        lambda: store.write("a/old", bytes(2**21)),
        lambda: store.put_if_absent("a/new", bytes(2**21)),
        lambda: store.put("a/put", tmp_path / "big"),
    ):
        with pytest.raises(StoreError, match=r"disk is full.*free some space"):
            act()
    assert {key: store.read(key) for key in names(store)} == {"a/old": b"old", "a/kept": b"kept"}
    assert list(store.leftovers()) == []
    store.write("a/new", b"fits")


def test_a_read_only_store_is_told_and_can_be_read(small_disk):
    folder, make_read_only = small_disk
    store = open_store(folder)
    store.write("a/b", b"1")
    make_read_only()
    for act in (lambda: store.write("a/b", b"2"), lambda: store.put_if_absent("c", b""), lambda: store.delete("a/b")):
        with pytest.raises(StoreError, match=r"read-only.*choose another place"):
            act()
    assert store.read("a/b") == b"1"


def test_killed_at_any_moment_a_write_is_absent_or_whole(tmp_path):
    """Forks a process per moment, which dies there."""

    def act(store, body):
        store.write("x/file", body)
        store.put_if_absent("x/once", body)
        store.move_aside("x/once", "x/aside", body)
        store.delete("x/file")

    states, moments = set(), 0
    for moment in range(1, 100):
        store = open_store(tmp_path / str(moment))
        if not dies_at(moment, lambda store=store: act(store, BLOB)):
            break
        moments = moment
        contents = {entry.key: store.read(entry.key) for entry in store.list("")}
        assert set(contents.values()) <= {BLOB}
        states.add(tuple(contents))
        act(store, BLOB)
        assert names(store) == ["x/aside"]
    assert moments >= 10
    assert {(), ("x/file",), ("x/file", "x/once"), ("x/aside", "x/file"), ("x/aside",)} == states


def dies_at(moment, act):
    """Runs `act` in a forked process that kills itself at the n-th moment; False if it came to its end before."""

    def body():
        os.environ["MOE_ASR_DIE_AT_STORE_OP"] = str(moment)
        act()

    process = multiprocessing.get_context("fork").Process(target=body)
    with warnings.catch_warnings():  # from 3.12 on, Python warns of forks beside threads; none of ours holds a lock
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join(60)
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


# Servers that fail for a while


@pytest.mark.parametrize("fault", ["status", "drop", "lose"])
def test_a_server_out_of_order_for_a_while_is_waited_for(broken_store, proxy, fault, tmp_path):
    (tmp_path / "f").write_bytes(BLOB)
    for method, act in {
        "PUT": lambda: broken_store.put("a/b", tmp_path / "f"),
        "GET": lambda: broken_store.read("a/b") == BLOB,
        "HEAD": lambda: broken_store.size("a/b"),
        "DELETE": lambda: broken_store.delete("a/c"),
    }.items():
        planned = proxy.break_next(fault, 503, times=4, method=method, code="SlowDown")
        act()
        assert planned.times == 0
    assert broken_store.read("a/b") == BLOB


def test_an_answer_that_does_not_come_is_asked_for_again(bucket, proxy, impatient, monkeypatch):
    monkeypatch.setattr("common.storage.s3.READ_SECONDS", 0.5)
    store = open_store(f"s3://{bucket}/p", endpoint_url=proxy.endpoint)
    store.write("a", BLOB)
    planned = proxy.break_next("delay", 2.0, times=2, method="GET", path="/p/a")
    assert store.read("a") == BLOB
    assert planned.times == 0


def test_a_file_that_changes_while_its_parts_are_read_is_not_mixed(bucket, s3_server, monkeypatch, tmp_path):
    monkeypatch.setattr("common.storage.s3_parts.PART_BYTES", 50_000)
    store = open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint)
    store.write("a", BLOB)
    get, asked = store._client.get_object, []

    def change_before_the_third_request(**options):
        asked.append(options)
        if len(asked) == 3:
            store.write("a", BLOB[::-1])
        return get(**options)

    monkeypatch.setattr(store._client, "get_object", change_before_the_third_request)
    with pytest.raises(RetryableError, match="changed by another process"):
        store.get("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_answer_that_breaks_off_is_asked_for_again(broken_store, proxy, monkeypatch, tmp_path):
    monkeypatch.setattr("common.storage.s3.STREAM_PAUSES", (0.01,) * 3)
    broken_store.write("a", BLOB)
    proxy.break_next("truncate", 1000, times=2, method="GET")
    assert broken_store.read("a") == BLOB
    proxy.break_next("truncate", 10, times=2, method="GET")
    assert broken_store.read_range("a", 500, 100) == BLOB[500:600]
    proxy.break_next("truncate", 1000, times=2, method="GET")
    broken_store.get("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BLOB
    proxy.break_next("truncate", 1000, times=99, method="GET")
    with pytest.raises(RetryableError, match="broke off repeatedly"):
        broken_store.read("a")


def test_a_server_that_stays_out_of_order_is_worth_another_try_later(broken_store, proxy):
    proxy.break_next("status", 500, times=99)
    with pytest.raises(RetryableError, match="busy or unavailable") as told:
        broken_store.read("a")
    assert told.value.exit_code == 75


def test_a_lost_answer_to_a_conditional_write_does_not_make_it_somebody_elses(broken_store, proxy):
    proxy.break_next("lose", times=1, method="PUT")
    assert broken_store.put_if_absent("m", b"ours")
    assert [method for method, _, _ in proxy.seen] == ["PUT", "PUT", "GET"]
    proxy.break_next("lose", times=1, method="PUT")
    assert not broken_store.put_if_absent("m", b"theirs")
    assert not broken_store.put_if_absent("m", b"ours")  # nothing was lost: equal bytes are somebody else's
    assert broken_store.read("m") == b"ours"


def test_a_conflict_is_tried_again(broken_store, proxy, monkeypatch):
    monkeypatch.setattr("common.storage.s3.STREAM_PAUSES", (0.01,) * 3)
    proxy.break_next("status", 409, times=2, method="PUT", code="ConditionalRequestConflict")
    assert broken_store.put_if_absent("m", b"1")


def test_a_server_without_conditional_writes_is_still_of_use(broken_store, proxy):
    proxy.break_next("status", 501, times=1, method="PUT", code="NotImplemented")
    assert broken_store.put_if_absent("m", b"1")
    proxy.break_next("status", 501, times=1, method="PUT", code="NotImplemented")
    assert not broken_store.put_if_absent("m", b"2")


def test_large_files_go_in_parts_and_survive_a_broken_one(broken_store, proxy, tmp_path):
    body = os.urandom(2**20) * 40
    (tmp_path / "f").write_bytes(body)
    proxy.break_next("drop", times=2, method="PUT", path="partNumber=2")
    broken_store.put("big", tmp_path / "f")
    assert sum("partNumber" in path for _, path, _ in proxy.seen) == 3
    proxy.break_next("truncate", 5000, times=2, method="GET")
    broken_store.get("big", tmp_path / "g")
    assert hashlib.sha256((tmp_path / "g").read_bytes()).digest() == hashlib.sha256(body).digest()


def test_an_upload_whose_last_answer_is_lost_is_there_all_the_same(broken_store, proxy, tmp_path):
    """The request is repeated, and the server knows no such upload any more."""
    (tmp_path / "f").write_bytes(os.urandom(2**20) * 40)
    lost = proxy.break_next("lose", times=1, method="POST", path="uploadId=")
    broken_store.put("big", tmp_path / "f")
    assert broken_store.size("big") == 40 * 2**20
    assert [path for method, path, _ in proxy.seen if method == "POST" and "uploadId" in path][1:], lost


def test_unfinished_uploads_are_found_and_ended(bucket, s3_server):
    from common.storage.s3 import make_client

    store = open_store(f"s3://{bucket}/p", endpoint_url=s3_server.endpoint)
    client = make_client(s3_server.endpoint)
    client.create_multipart_upload(Bucket=bucket, Key="p/big")
    client.create_multipart_upload(Bucket=bucket, Key="q/not-ours")
    left = list(store.leftovers())
    assert [entry.key.partition("?")[0] for entry in left] == ["big"]
    store.delete(left[0].key)
    assert list(store.leftovers()) == []


def test_only_the_range_asked_for_travels(broken_store, proxy):
    broken_store.write("a", BLOB)
    proxy.seen.clear()
    broken_store.read_range("a", 100, 50)
    assert [size for _, _, size in proxy.seen] == [50]


# Servers that refuse


REFUSED = {
    "AccessDenied": (403, "access denied.*s3:PutObject"),
    "InvalidAccessKeyId": (403, "does not know these credentials"),
    "SignatureDoesNotMatch": (403, "does not know these credentials"),
    "ExpiredToken": (400, "sign in again"),
    "NoSuchBucket": (404, "no such bucket.*create it"),
    "RequestTimeTooSkewed": (403, "clock.*differ"),
    "IllegalLocationConstraintException": (400, "another region"),
    "StorageFull": (507, "store is full"),
    "MethodNotAllowed": (405, "refuses with MethodNotAllowed"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_refusals_are_told_in_one_line_and_not_repeated(broken_store, proxy, code):
    status, pattern = REFUSED[code]
    planned = proxy.break_next("status", status, times=20, code=code)
    with pytest.raises(StoreError, match=pattern) as told:
        broken_store.write("a", b"")
    assert told.value.exit_code == 74
    assert "\n" not in str(told.value)
    assert planned.times >= 17


def test_wrong_credentials_never_show(bucket, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "quite-another-secret")
    with pytest.raises(StoreError, match="does not know these credentials") as told:
        open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint).read("a")
    for secret in ("quite-another-secret", ACCESS, SECRET):
        assert secret not in str(told.value)
    with pytest.raises(ConfigError, match="endpoint_url contains credentials") as told:
        open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint.replace("//", "//user:password@"))
    assert "password" not in str(told.value)


def test_no_credentials_are_told(bucket, s3_server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no credentials; set AWS_PROFILE"):
        open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint).read("a")


def test_a_wrong_profile_is_told(bucket, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="AWS_PROFILE names a profile"):
        open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint).read("a")


def test_a_missing_bucket_is_told_at_the_first_question(s3_server, s3_environment):
    with pytest.raises(StoreError, match="no such bucket"):
        open_store("s3://no-such-bucket/x", endpoint_url=s3_server.endpoint).size("a")


def test_a_wrong_clock_is_told(bucket, s3_server, monkeypatch):
    import datetime

    import botocore.auth

    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(
        "botocore.auth.get_current_datetime", lambda *a, **k: now(*a, **k) + datetime.timedelta(hours=2)
    )
    with pytest.raises(StoreError, match="clock"):
        open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint).read("a")


def test_an_endpoint_where_nobody_listens_is_told_in_seconds(s3_environment, impatient):
    with pytest.raises(RetryableError, match="check endpoint_url"):
        open_store("s3://bucket", endpoint_url=f"http://127.0.0.1:{free_port()}").read("a")


def test_a_host_that_does_not_exist_is_told(s3_environment, impatient):
    with pytest.raises(MoeAsrError, match="check endpoint_url"):
        open_store("s3://bucket", endpoint_url="http://no-such-host.invalid").read("a")


@pytest.mark.parametrize(("code", "kind"), [(socket.EAI_NONAME, StoreError), (socket.EAI_AGAIN, RetryableError)])
def test_a_name_server_that_is_away_for_a_moment_is_worth_another_try(code, kind):
    from botocore.exceptions import EndpointConnectionError
    from urllib3.exceptions import NameResolutionError

    cause = socket.gaierror(code, "x")
    failure = NameResolutionError("host", None, cause)
    failure.__cause__ = cause
    error = explain(EndpointConnectionError(endpoint_url="http://host", error=failure), "s3://b/k", "http://host")
    assert type(error) is kind and "check endpoint_url" in str(error)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp//x", "http://[x"])
def test_a_malformed_endpoint_is_told(s3_environment, endpoint):
    with pytest.raises(ConfigError, match=r"endpoint_url.*malformed"):
        open_store("s3://bucket", endpoint_url=endpoint).read("a")


def test_custom_endpoints_get_no_new_checksums_and_paths_with_the_bucket(broken_store, proxy):
    settings = broken_store._client.meta.config
    assert settings.request_checksum_calculation == settings.response_checksum_validation == "when_required"
    broken_store.write("k", b"1")
    assert proxy.seen[-1][1].startswith(f"/{broken_store.bucket}/p/k")


def test_a_store_goes_on_in_a_forked_process(bucket, s3_server):
    store = open_store(f"s3://{bucket}", endpoint_url=s3_server.endpoint)
    store.write("a", b"1")
    assert not dies_at(10**6, lambda: store.write("b", store.read("a")))
    assert store.read("b") == b"1"


def test_entries_are_plain_values():
    assert Entry("a", 1) == Entry("a", 1, 0.0)
    assert Path(open_store("x").url) == Path("x")


def test_no_more_is_read_at_once_than_is_asked_for(any_store):
    any_store.write("a/b", b"12345")
    assert any_store.read("a/b", 5) == b"12345"
    with pytest.raises(DataError, match=r"a/b has 5 bytes, but at most 4 are read"):
        any_store.read("a/b", 4)
    assert any_store.read("a/b") == b"12345"  # the connection is of use still
