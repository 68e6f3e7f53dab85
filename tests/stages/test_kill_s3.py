"""The same on a server: killed between any two of its writes, a run leaves every artifact absent or whole, and goes on
to the same end; and what else may happen to a run whose store is a bucket.
"""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.errors import RetryableError, StoreError
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages.local_runner import Run, run_pipeline
from tests.servers import Server, new_bucket, set_environment
from tests.stages.test_kill import quick_config, run_and_die
from tests.stages.test_s3 import stored_digests

RESUMED = 4  # of the states that a kill can leave, this many are run to the end
MANY = str(10**9)


@dataclass
class Recorded:
    """A finished run in a bucket, and copies of the bucket at every write boundary."""

    server: Server
    bucket: str
    folder: Path
    states: list[Path] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def remember(self) -> None:
        # Nobody else gets past a write meanwhile; what is on its way just now may land or not, as in a real kill.
        with self.lock:
            state = self.folder / f"{len(self.states):04d}"
            self.server.copy(self.bucket, state)
            self.states.append(state)

    def store(self, name=None):
        return open_store(f"s3://{name or self.bucket}/runs", endpoint_url=self.server.endpoint)


def bucket_config(server, bucket, model, corpus, endpoint=None):
    config = quick_config(f"s3://{bucket}/runs", model, corpus)
    return config.model_copy(update={"endpoint_url": endpoint or server.endpoint})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, s3_server, micro_model, tones):
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, folder)
        patch.setenv("MOE_ASR_CACHE", str(folder / "cache"))
        made = Recorded(s3_server, new_bucket(s3_server), folder)
        patch.setenv("MOE_ASR_DIE_AT_STORE_OP", MANY)  # so that clients look at every request
        patch.setattr("common.storage.s3.moment", made.remember)
        run_pipeline(bucket_config(s3_server, made.bucket, micro_model, tones))
    made.remember()
    return made


@pytest.fixture
def copied(recorded, bucket):
    """Puts a state into a bucket of its own."""

    def copy(state):
        recorded.server.restore(state, bucket)
        return bucket

    return copy


def test_after_a_kill_at_any_write_every_artifact_in_the_bucket_is_absent_or_whole(recorded):
    assert len(recorded.states) > 100
    seen = set()
    for state in recorded.states:
        root = state / "root" / "runs"  # objects are plain files there
        for folder in root.glob("artifacts/*/*"):
            artifact = inspect(open_store(root), Key(folder.parent.name, folder.name), deep=True)
            assert artifact.status in ("missing", "done"), (state, folder, artifact.reason)
            seen.add((folder.parent.name, artifact.status))
    assert seen >= {(stage, s) for stage in ("extract", "gating", "experts", "asr") for s in ("missing", "done")}


@pytest.mark.parametrize("part", range(RESUMED))
def test_a_run_in_a_bucket_goes_on_from_any_state_to_the_same_weights_and_scores(
    recorded, copied, part, s3_environment, micro_model, tones
):
    name = copied(recorded.states[(len(recorded.states) - 1) * (2 * part + 1) // (2 * RESUMED)])
    run_pipeline(bucket_config(recorded.server, name, micro_model, tones))
    assert stored_digests(recorded.store(name)) == stored_digests(recorded.store())


@pytest.mark.parametrize("at", [70])
def test_kill_9_of_the_command_in_a_bucket_and_the_same_command_again(
    recorded, at, bucket, micro_model, tones, tmp_path
):
    config = bucket_config(recorded.server, bucket, micro_model, tones)
    run_and_die(config, tmp_path, at)
    run_pipeline(config)
    assert stored_digests(recorded.store(bucket)) == stored_digests(recorded.store())


def test_a_server_that_fails_now_and_then_does_not_change_a_run(
    recorded,
    bucket,
    proxy,
    impatient,
    micro_model,
    tones,
):
    store = recorded.store(bucket)
    faults = [
        proxy.break_next("status", 500, times=20, every=9),
        proxy.break_next("status", 503, times=20, every=11, code="SlowDown"),
        proxy.break_next("drop", times=20, every=13),
        proxy.break_next("lose", times=20, every=17, method="PUT"),
        proxy.break_next("truncate", 10, times=5, every=19, method="GET", path="artifacts"),
    ]
    run_pipeline(bucket_config(recorded.server, bucket, micro_model, tones, proxy.endpoint))
    assert all(fault.asked >= fault.every for fault in faults)
    assert stored_digests(store) == stored_digests(recorded.store())


def test_a_server_that_stays_broken_ends_the_run_in_one_line_and_nothing_is_lost(
    recorded,
    copied,
    proxy,
    impatient,
    monkeypatch,
    micro_model,
    tones,
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    name = copied(recorded.states[len(recorded.states) // 2])
    proxy.break_next("status", 500, times=10**6, method="PUT")
    with pytest.raises(RetryableError, match="busy or unavailable") as told:
        run_pipeline(bucket_config(recorded.server, name, micro_model, tones, proxy.endpoint))
    assert "\n" not in str(told.value)
    proxy.faults.clear()
    run_pipeline(bucket_config(recorded.server, name, micro_model, tones, proxy.endpoint))
    assert stored_digests(recorded.store(name)) == stored_digests(recorded.store())


def test_a_bucket_that_may_only_be_read_is_told_and_left_as_it_is(recorded, copied, proxy, micro_model, tones):
    name = copied(recorded.states[-1])
    before = {entry.key: entry.size for entry in recorded.store(name).list("")}
    for method in ("PUT", "POST", "DELETE"):
        proxy.break_next("status", 403, times=10**6, method=method, code="AccessDenied")
    config = bucket_config(recorded.server, name, micro_model, tones, proxy.endpoint)
    assert Run(config).plan(deep=True).finished  # looking is allowed
    with pytest.raises(StoreError, match="access denied") as told:
        run_pipeline(config)
    assert told.value.exit_code == 74
    assert {entry.key: entry.size for entry in recorded.store(name).list("")} == before


def test_a_bucket_without_deletes_costs_space_and_no_run(
    recorded, copied, proxy, impatient, micro_model, tones, caplog
):
    name = copied(recorded.states[len(recorded.states) // 2])
    proxy.break_next("status", 403, times=10**6, method="DELETE", code="AccessDenied")
    run_pipeline(bucket_config(recorded.server, name, micro_model, tones, proxy.endpoint))
    assert stored_digests(recorded.store(name)) == stored_digests(recorded.store())
    told = {record.getMessage() for record in caplog.records if "stay in the store" in record.getMessage()}
    assert len(told) == 1 and "s3:DeleteObject" in told.pop()


def test_one_expert_with_a_flipped_bit_in_the_bucket_is_made_again_and_nothing_else(
    recorded, copied, micro_model, tones
):
    name = copied(recorded.states[-1])
    store = recorded.store(name)
    task = next(
        p.task
        for p in Run(bucket_config(recorded.server, name, micro_model, tones)).plan().planned
        if p.task.label == "experts[1]"
    )
    attempt = inspect(store, task.key).manifest.attempt
    weights = f"{task.key.prefix}{attempt}/adapter_model.safetensors"
    data = bytearray(store.read(weights))
    data[-1] ^= 1
    store.write(weights, bytes(data))
    before = {e.key: e.modified for e in store.list("artifacts/") if e.key.endswith("/manifest.json")}
    run_pipeline(bucket_config(recorded.server, name, micro_model, tones))
    after = {e.key: e.modified for e in store.list("artifacts/") if e.key.endswith("/manifest.json")}
    assert before.keys() == after.keys()
    assert {key for key in after if before[key] != after[key]} <= {f"{task.key.prefix}manifest.json"}
    assert inspect(store, task.key, deep=True).manifest.attempt != attempt
    assert stored_digests(store) == stored_digests(recorded.store())
