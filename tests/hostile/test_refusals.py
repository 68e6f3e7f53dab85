"""Stores that allow only a part: no deletes, no lists of uploads, no more files, no writes, another clock."""

import sys
import time

import pytest
import yaml

from cli.main import cli
from common.console import run_command
from common.errors import StoreError
from common.storage import open_store
from common.storage import store as stores
from common.storage.artifacts import commit, inspect, new_attempt, shard_key
from common.storage.doctor import check_store
from common.storage.garbage import garbage
from common.storage.s3_errors import RIGHTS, RIGHTS_TO_CLEAN
from common.storage.store import remove_all
from tests.common.storage.test_artifacts import KEY, keys, make
from tests.servers import mounted
from tests.stages.test_local_runner import micro_config


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(stores, "_warned", set())
    monkeypatch.setattr("common.storage.doctor.MANY", 20)
    monkeypatch.setattr("common.storage.doctor.LARGE", 2**20)


@pytest.fixture
def no_deletes(bucket, proxy, impatient):
    """A store whose server refuses all deletes."""
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    proxy.break_next("status", 403, times=10**6, method="DELETE", code="AccessDenied")
    return store


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "the command continues" in record.getMessage()]


# Deletes denied


def test_where_deletes_are_denied_a_stage_is_committed_and_this_is_said_once(no_deletes, tmp_path, caplog):
    make(no_deletes, tmp_path)
    for key in ("checkpoints/000000001-x/state.json", "parts/p"):
        no_deletes.write(KEY.prefix + key, b"1")
    for _ in range(3):
        remove_all(no_deletes, f"{KEY.prefix}checkpoints/")
        remove_all(no_deletes, f"{KEY.prefix}parts/")
    assert make(no_deletes, tmp_path, started=2.0).started == 1.0  # the loser cannot clean up, and is no failure
    (told,) = warnings(caplog)
    assert RIGHTS_TO_CLEAN in told and "\n" not in told
    assert inspect(no_deletes, KEY, deep=True).status == "done"


def test_where_deletes_are_denied_checkpoints_are_saved_and_found(no_deletes, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from common.storage.checkpoint import Checkpointer

    checkpointer = Checkpointer(no_deletes, "c/", scratch=tmp_path)
    for step in (1, 2, 3):
        checkpointer.save(step, {"w": torch.full((2,), step)}, {"step": step}, wait=True)
    step, tensors, state = checkpointer.latest()
    assert (step, tensors["w"].tolist(), state) == (3, [3, 3], {"step": 3})
    checkpointer.clear()
    assert len(warnings(caplog)) == 1


def test_the_doctor_says_what_a_store_without_deletes_costs(no_deletes):
    checks = {check.name.removeprefix("store: "): check for check in check_store(no_deletes)}
    assert {name for name, check in checks.items() if check.state == "fail"} == set()
    assert {name for name, check in checks.items() if check.state == "note"} == {
        *("delete", "quarantine", "many keys", "large file")
    }
    assert "s3:DeleteObject" in checks["delete"].detail
    assert len(keys(no_deletes)) < 30  # it does not leave a thousand files that nobody can remove


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented"), (405, "MethodNotAllowed")]
)
def test_a_server_that_lists_no_uploads_can_be_cleaned_of_the_rest(bucket, proxy, tmp_path, caplog, status, code):
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    make(store, tmp_path)
    store.write(f"{KEY.prefix}dead/half", b"1")
    proxy.break_next("status", status, times=10**6, method="GET", path="uploads", code=code)
    assert [entry.key for entry in garbage(store, older_than_hours=-1)] == [f"{KEY.prefix}dead/half"]
    assert len(warnings(caplog)) == 1
    assert [(check.name, check.state) for check in check_store(store) if check.state != "ok"] == [
        ("store: unfinished uploads", "note")
    ]


@pytest.mark.parametrize(
    ("right", "method", "path"),
    [
        ("s3:ListBucket", "GET", "list-type"),
        ("s3:GetObject", "GET", "/a"),
        ("s3:PutObject", "PUT", ""),
        ("s3:DeleteObject", "DELETE", ""),
        ("s3:ListBucketMultipartUploads", "GET", "uploads"),
    ],
)
def test_the_rights_in_the_error_are_those_that_the_doctor_misses(bucket, proxy, impatient, right, method, path):
    store = open_store(f"s3://{bucket}", endpoint_url=proxy.endpoint)
    store.write("a", b"1")
    proxy.break_next("status", 403, times=10**6, method=method, path=path, code="AccessDenied")
    missed = [(check.state, check.detail) for check in check_store(store) if "AccessDenied" in check.detail]
    if right == "s3:GetObject":  # /a is read by nobody but us
        with pytest.raises(StoreError) as told:
            store.read("a")
        missed = [("fail", str(told.value))]
    assert missed and all(right in detail for _, detail in missed)
    assert {state for state, _ in missed} == {"fail" if right in RIGHTS else "note"}


# Clocks


@pytest.mark.parametrize("ahead", [-3, 3, 400])
def test_a_clock_that_is_days_off_makes_no_garbage_of_what_is_being_written(any_store, tmp_path, monkeypatch, ahead):
    any_store.write(f"{KEY.prefix}beef/being-written", b"1")
    any_store.write(f"{KEY.prefix}checkpoints/000000001-x/state.json", b"1")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead * 86400)
    assert list(garbage(any_store)) == []
    assert abs(any_store.now() - now()) < 60


@pytest.mark.parametrize("ahead", [-3, 3])
def test_a_clock_that_is_days_off_prunes_no_checkpoint_that_another_process_writes(tmp_path, monkeypatch, ahead):
    from common.storage.checkpoint import Checkpointer

    store = open_store(tmp_path / "store")
    store.write("c/000000009-theirs/state.json", b"half")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead * 86400)
    checkpointer = Checkpointer(store, "c/", scratch=tmp_path)
    for step in (1, 2, 3):
        checkpointer.save(step, {}, {}, wait=True)
    assert store.read("c/000000009-theirs/state.json") == b"half"
    assert checkpointer.latest()[0] == 3


def test_a_clock_that_is_set_back_meanwhile_makes_no_manifest_that_is_refused(tmp_path, monkeypatch):
    store = open_store(tmp_path / "store")
    manifest = make(store, tmp_path, started=time.time() + 1e6, seconds=-5.0)
    assert inspect(store, KEY, deep=True).manifest == manifest


# Disks


def test_a_disk_without_inodes_is_told_and_keeps_what_was_there(tmp_path):
    with mounted(tmp_path / "small", "size=1m,nr_inodes=24") as folder:
        store = open_store(folder)
        manifest = make(store, tmp_path / "scratch")
        told = []
        for number in range(30):  # each needs a folder and files of its own
            other = shard_key(KEY, number)
            try:
                attempt = new_attempt(store, other, tmp_path)
                (attempt / "f").write_bytes(b"small")
                commit(store, other, attempt, started=1.0, seconds=1.0)
            except (StoreError, OSError) as error:
                told.append(error)
        assert told and all("No space left" in str(error) for error in told)
        assert any(isinstance(error, StoreError) and "disk is full" in str(error) for error in told)
        for key in (KEY, *(shard_key(KEY, number) for number in range(30))):
            assert inspect(store, key, deep=True).status in ("done", "missing")
        assert inspect(store, KEY, deep=True).manifest == manifest
        for entry in [*garbage(store, older_than_hours=-1), *store.list(shard_key(KEY, 0).prefix)]:
            store.delete(entry.key)
        store.write("demo/run.json", b"fits again")


@pytest.mark.parametrize("place", ["cache", "log_file"])
def test_a_folder_that_is_read_only_ends_a_command_in_one_line(
    small_disk, tmp_path, micro_model, tones, place, monkeypatch, capsys, caplog
):
    folder, make_read_only = small_disk
    make_read_only()
    config = micro_config(tmp_path / "store", micro_model, tones).model_dump(mode="json")
    if place == "log_file":
        config["runtime"]["log_file"] = str(folder / "log")
    else:
        monkeypatch.setenv("MOE_ASR_CACHE", str(folder / "cache"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["moe-asr", "run", "--config", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as ended:
        run_command(cli)
    told = capsys.readouterr().err + caplog.text
    assert ended.value.code == 74, told
    assert "Traceback" not in told and str(folder) in told


def test_a_read_only_store_is_cleaned_up_by_nobody_and_that_is_no_failure(small_disk, tmp_path, caplog):
    folder, make_read_only = small_disk
    store = open_store(folder)
    make(store, tmp_path)
    store.write(f"{KEY.prefix}parts/p", b"1")
    make_read_only()
    remove_all(store, f"{KEY.prefix}parts/")
    assert len(warnings(caplog)) == 1
    assert store.now() > 0 and list(garbage(store)) == []
