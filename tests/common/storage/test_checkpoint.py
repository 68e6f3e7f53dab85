"""Checkpoints are whole or skipped, and written while the training goes on."""

import hashlib
import json
import logging
import math
import pickle
import threading

import pytest
import torch

from common.errors import DataError, RetryableError, StoreError
from common.storage import open_store
from common.storage.checkpoint import Checkpointer
from tests.common.storage.test_store import dies_at

TENSORS = {
    "w": torch.arange(12.0).reshape(3, 4),
    "ids": torch.tensor([2, 3]),
    "half": torch.ones(2, dtype=torch.bfloat16),
}
PREFIX = "artifacts/asr/abc/checkpoints/"


def open_in(store, tmp_path):
    return Checkpointer(store, PREFIX, scratch=tmp_path / "scratch")


def steps(store):
    """Steps of the finished checkpoints."""
    return [int(e.key[len(PREFIX) :][:9]) for e in store.list(PREFIX) if e.key.endswith("/manifest.json")]


def file_of(store, step, name):
    return next(e.key for e in store.list(f"{PREFIX}{step:09d}") if e.key.endswith(f"/{name}"))


def test_the_latest_comes_back_to_the_last_bit(any_store, tmp_path):
    points = open_in(any_store, tmp_path)
    assert points.latest() is None
    state = {"best": math.inf, "rows": [{"loss": 0.1 + 0.2}], "name": "ü"}
    points.save(7, TENSORS, {"old": True})
    points.save(12, TENSORS, state, wait=True)
    step, tensors, restored = open_in(any_store, tmp_path).latest()
    assert (step, restored) == (12, state)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert not any((tmp_path / "scratch").glob("*"))


def test_what_changes_after_saving_is_not_in_the_checkpoint(tmp_path):
    store = SlowStore(open_store(tmp_path))
    points = open_in(store, tmp_path)
    weights, rows = torch.zeros(3), [1]
    points.save(1, {"w": weights, "turned": torch.arange(6).reshape(2, 3).T}, {"rows": rows})
    weights += 1
    rows.append(2)
    store.go.set()
    _, tensors, state = points.latest()
    assert torch.equal(tensors["w"], torch.zeros(3))
    assert tensors["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert state == {"rows": [1]}


class SlowStore:
    """A store that writes only when it is told to."""

    def __init__(self, store):
        self.store, self.go = store, threading.Event()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def put_folder(self, folder, prefix):
        assert self.go.wait(30)
        self.store.put_folder(folder, prefix)


def test_training_goes_on_while_one_is_written_and_the_newest_waiting_one_wins(tmp_path, monkeypatch):
    monkeypatch.setattr("common.storage.checkpoint.KEEP", 9)
    store = SlowStore(open_store(tmp_path))
    points = open_in(store, tmp_path)
    for step in range(1, 6):
        points.save(step, TENSORS, {})  # returns although nothing can be written
    store.go.set()
    points.wait()
    assert steps(store)[-1] == 5
    assert len(steps(store)) <= 2


def test_the_newest_are_kept_and_all_can_be_cleared(any_store, tmp_path):
    points = open_in(any_store, tmp_path)
    for step in (1, 2, 10, 100, 20_000):
        points.save(step, TENSORS, {}, wait=True)
    assert steps(any_store) == [100, 20_000]
    points.clear()
    assert list(any_store.list("")) == []


def test_the_same_step_saved_again_never_overwrites(tmp_path):
    store = open_store(tmp_path)
    points = open_in(store, tmp_path)
    points.save(5, TENSORS, {"try": 1}, wait=True)
    points.save(5, TENSORS, {"try": 2}, wait=True)
    assert steps(store) == [5, 5]
    assert points.latest()[2] == {"try": 2}


def damage_bit(store, name):
    key = file_of(store, 2, name)
    body = bytearray(store.read(key))
    body[-1] ^= 1
    store.write(key, bytes(body))


DAMAGES = {
    "bit of a weight": lambda store: damage_bit(store, "state.safetensors"),
    "bit of the state": lambda store: damage_bit(store, "state.json"),
    "truncated": lambda store: store.write(file_of(store, 2, "state.safetensors"), b"short"),
    "missing file": lambda store: store.delete(file_of(store, 2, "state.json")),
    "missing manifest": lambda store: store.delete(file_of(store, 2, "manifest.json")),
    "torn manifest": lambda store: store.write(file_of(store, 2, "manifest.json"), b'{"schema": 1, "st'),
    "odd manifest": lambda store: store.write(file_of(store, 2, "manifest.json"), b'{"schema": 1, "files": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_skipped_aloud_for_the_one_before(any_store, tmp_path, caplog, damage):
    points = open_in(any_store, tmp_path)
    points.save(1, TENSORS, {"n": 1}, wait=True)
    points.save(2, TENSORS, {"n": 2}, wait=True)
    DAMAGES[damage](any_store)
    with caplog.at_level(logging.WARNING):
        step, _, state = points.latest()
    assert (step, state) == (1, {"n": 1})
    assert "000000002" in caplog.text
    assert "is skipped" in caplog.text


class Bomb:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_poisoned_pickle_is_refused_even_with_right_hashes(any_store, tmp_path, caplog):
    points = open_in(any_store, tmp_path)
    points.save(1, TENSORS, {"n": 1}, wait=True)
    points.save(2, TENSORS, {"n": 2}, wait=True)
    poison = pickle.dumps(Bomb())
    manifest = json.loads(any_store.read(file_of(any_store, 2, "manifest.json")))
    for name in ("state.safetensors", "state.json"):
        any_store.write(file_of(any_store, 2, name), poison)
        manifest["files"][name] = {"size": len(poison), "sha256": hashlib.sha256(poison).hexdigest()}
    any_store.write(file_of(any_store, 2, "manifest.json"), json.dumps(manifest).encode())
    assert points.latest()[0] == 1
    assert "is skipped" in caplog.text


def test_a_newer_format_is_refused(tmp_path):
    store = open_store(tmp_path)
    points = open_in(store, tmp_path)
    points.save(1, TENSORS, {}, wait=True)
    store.write(file_of(store, 1, "manifest.json"), b'{"schema": 3}')
    with pytest.raises(DataError, match=r"format 3.*upgrade"):
        points.latest()


def test_a_failed_write_is_told_at_the_next_call_and_then_forgotten(tmp_path):
    class Failing(SlowStore):
        def put_folder(self, folder, prefix):
            raise RetryableError("the store is away")

    store = Failing(open_store(tmp_path))
    points = open_in(store, tmp_path)
    points.save(1, TENSORS, {})
    with pytest.raises(RetryableError, match="the store is away"):
        points.wait()
    points.wait()
    assert list(store.list("")) == []  # nothing half done is left in the way


def test_a_full_disk_is_told_and_keeps_the_checkpoint_before(small_disk, tmp_path):
    store = open_store(small_disk[0])
    points = open_in(store, tmp_path)
    points.save(1, TENSORS, {}, wait=True)
    with pytest.raises(StoreError, match="disk is full"):
        points.save(2, {"w": torch.zeros(2**20)}, {}, wait=True)
    assert points.latest()[0] == 1
    points.save(3, TENSORS, {}, wait=True)
    assert points.latest()[0] == 3


def test_killed_at_any_moment_the_one_before_or_the_new_one_is_found(tmp_path):
    restored_steps = []
    for n in range(1, 100):
        store = open_store(tmp_path / str(n))
        points = open_in(store, tmp_path)
        for step in (1, 2):
            points.save(step, {}, {"n": step}, wait=True)
        if not dies_at(n, lambda points=points: points.save(3, {}, {"n": 3}, wait=True)):
            break
        step, _, state = points.latest()
        assert state == {"n": step}
        restored_steps.append(step)
    assert len(restored_steps) >= 8
    assert restored_steps == sorted(restored_steps)
    assert set(restored_steps) == {2, 3}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_copied_at_once(tmp_path):
    store = SlowStore(open_store(tmp_path))
    points = open_in(store, tmp_path)
    weights = torch.ones(2**20, device="cuda")
    points.save(1, {"w": weights}, {})
    weights.zero_()
    store.go.set()
    assert points.latest()[1]["w"].sum() == 2**20
