"""Live metrics: names, what a stage leaves in them, the server, and that a port in use harms nothing."""

import json
import logging
import re
import socket
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from types import ModuleType

import pytest

from common import telemetry
from common.errors import DataError, Preempted, StoreError
from common.files import NotFound
from common.pipeline.metrics import MetricsLog
from common.storage.checkpoint import Checkpointer
from common.storage.local import LocalStore
from common.storage.measured import measured_store
from common.telemetry import METRICS, STAGE, Telemetry, device_memory, serving


@pytest.fixture
def live():
    return Telemetry().stage("asr")


def read(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_rules_of_prometheus(metric):
    assert re.fullmatch(r"moe_asr_[a-z_]+", metric.name) and metric.help.endswith(".")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert set(metric.labels) <= {
        *STAGE, "split", "expert", "etiology", "model", "operation", "result", "status", "version", "python", "torch"
    }  # fmt: skip


def test_two_processes_worth_of_metrics_do_not_mix():
    first, second = Telemetry().stage("asr"), Telemetry().stage("asr")
    first.add(telemetry.SAMPLES, 5)
    assert first.values()["moe_asr_samples_total"] == 5
    assert "moe_asr_samples_total" not in second.values()


def test_a_stage_sees_its_own_values_only():
    process = Telemetry()
    process.stage("experts", 0).set(telemetry.LOSS, 1.5, split="train")
    process.stage("experts", 1).set(telemetry.LOSS, 2.5, split="train")
    assert process.stage("experts", 1).values() == {'moe_asr_loss{split="train"}': 2.5}


def test_rows_of_the_log_become_gauges(live, tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", live)
    log.log({"step": 1, "epoch": 0, "split": "train", "lr": 0.1, "loss": 3.0, "grad_norm": 2.0, "entropy": 0.5})
    log.log({"step": 1, "epoch": 0, "split": "dev", "loss": 4.0, "wer": 0.25})
    log.progress(1, 8)
    values = live.values()
    assert values['moe_asr_loss{split="train"}'] == 3.0 and values['moe_asr_loss{split="dev"}'] == 4.0
    assert values["moe_asr_learning_rate"] == 0.1 and values["moe_asr_gradient_norm"] == 2.0
    assert values['moe_asr_word_error_ratio{etiology="all",model="after",split="dev"}'] == 0.25
    assert (values["moe_asr_progress_units"], values["moe_asr_progress_expected_units"]) == (1, 8)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "result"), [(None, "run"), (DataError("bad"), "failed"), (Preempted("stop"), "preempted")]
)
def test_how_a_stage_ended_is_counted(live, error, result):
    def work():
        with live.running():
            assert live.values()["moe_asr_stage_running"] == 1
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    values = live.values()
    counts = {name: values[f'moe_asr_tasks_total{{result="{name}"}}'] for name in ("run", "failed", "preempted")}
    assert counts == {name: float(name == result) for name in counts}
    assert values["moe_asr_stage_running"] == 0


def test_store_calls_bytes_and_errors_are_counted_and_results_unchanged(live, tmp_path):
    plain = LocalStore(tmp_path / "store")
    store = measured_store(plain, live)
    store.write("a/b", b"12345")
    assert store.read("a/b") == plain.read("a/b") == b"12345"
    assert not store.put_if_absent("a/b", b"other")
    store.get("a/b", tmp_path / "copy")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"1234567")
    store.put_folder(tmp_path / "folder", "c")
    assert [entry.key for entry in store.list("")] == ["a/b", "c/x"]
    with pytest.raises(NotFound):
        store.read("nothing")
    with pytest.raises(StoreError):
        measured_store(LocalStore(tmp_path / "copy"), live).write("under-a-file", b"")
    values = live.values()
    moved = {"write": 5, "read": 5, "get": 5, "put_folder": 7, "put_if_absent": 0}
    assert {name: values[f'moe_asr_store_bytes_total{{operation="{name}"}}'] for name in moved} == moved
    errors = {name: value for name, value in values.items() if name.startswith("moe_asr_store_errors") and value}
    assert errors == {'moe_asr_store_errors_total{operation="write"}': 1}
    assert values['moe_asr_store_operations_total{operation="read"}'] == 2


def test_checkpoints_and_their_failures_are_counted(live, tmp_path):
    Checkpointer(LocalStore(tmp_path / "good"), "c/", scratch=tmp_path, live=live).save(1, {}, {}, wait=True)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        Checkpointer(LocalStore(tmp_path / "file"), "c/", scratch=tmp_path, live=live).save(1, {}, {}, wait=True)
    values = live.values()
    assert (values["moe_asr_checkpoints_total"], values["moe_asr_checkpoint_errors_total"]) == (1, 1)
    assert values["moe_asr_checkpoint_seconds_total"] > 0


def test_the_server_shows_stage_process_and_memory(live):
    live.set(telemetry.LOSS, 1.25, split="dev")
    with serving(live.telemetry, 0, None, 0) as port:
        text = read(port)
    assert 'moe_asr_loss{shard="",split="dev",stage="asr"} 1.25' in text
    assert 'moe_asr_device_memory_bytes{device="cpu",kind="used"}' in text
    assert "moe_asr_build_info{" in text and "process_cpu_seconds_total" in text


def test_no_port_means_no_server(live):
    with serving(live.telemetry, None, None, 0) as port:
        assert port is None


def test_a_port_in_use_is_said_and_harms_nothing(live, caplog):
    with socket.socket() as other, caplog.at_level(logging.WARNING):
        other.bind(("127.0.0.1", 0))
        other.listen()
        with serving(live.telemetry, other.getsockname()[1], None, 5) as port:
            assert port is None
    assert str(other) and "metrics port" in caplog.text and "goes on without metrics" in caplog.text


def test_only_the_first_process_of_a_training_serves(live, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with serving(live.telemetry, 0, None, 0) as port:
        assert port is None


def test_the_end_waits_for_one_more_scrape_where_there_were_any(live):
    texts = []

    def scraper(port, stop):
        with suppress(OSError):  # the server ends after its last answer
            while not stop.wait(0.2):
                texts.append(read(port))

    stop = threading.Event()
    with serving(live.telemetry, 0, None, 30) as port:
        thread = threading.Thread(target=scraper, args=(port, stop))
        thread.start()
        while not texts:
            time.sleep(0.01)
        live.set(telemetry.LOSS, 0.125, split="test")
        threading.Timer(0.8, stop.set).start()
    thread.join()
    assert any('split="test"' in text for text in texts)


def test_nobody_waits_where_nobody_scrapes(live):
    started = time.monotonic()
    with serving(live.telemetry, 0, None, 30):
        live.values()  # what the manifest takes is no scrape
    assert time.monotonic() - started < 10


def test_values_fit_into_json(live):
    from common.pipeline.stage import last_values

    live.set(telemetry.LOSS, float("nan"), split="train")
    live.set(telemetry.LEARNING_RATE, 0.5)
    text = json.dumps(last_values(live), allow_nan=False)
    assert json.loads(text) == {'moe_asr_loss{split="train"}': None, "moe_asr_learning_rate": 0.5}


def test_a_scrape_while_torch_is_being_imported_is_answered(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert set(device_memory()) == {("cpu", "used")}
