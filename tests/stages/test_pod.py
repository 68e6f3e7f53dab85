"""What a stage's process does in a workflow's pod: names in the cache, lists, outcome."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from common.config import to_yaml
from common.errors import ConfigError
from common.pipeline.plan import Plan, Planned, Task
from common.pipeline.runs import read_record
from common.storage import open_store
from common.storage.artifacts import commit, inspect, make_key, new_attempt, shard_key
from stages import STAGES
from stages.local_runner import Run, run_one
from stages.pod import (
    config_from_variables,
    config_text,
    failed_nodes,
    fan_out_lists,
    memo_key,
    plan_stage,
    write_outcome,
)
from tests.factories import run_record
from tests.stages.test_local_runner import micro_config

GROUP = make_key("experts", 1, {"seed": 1}, {})
EXPERTS = next(contract for contract in STAGES if contract.name == "experts")


def planned(store, number=0, status="done"):
    """A piece of the experts as the plan sees it."""
    task = Task(EXPERTS, number, shard_key(GROUP, number), {})
    return Planned(task, status, "", inspect(store, task.key).manifest)


def make(store, tmp_path, number=0, **metrics):
    """Commits a piece."""
    key = shard_key(GROUP, number)
    folder = new_attempt(store, key, tmp_path)
    (folder / "weights").write_bytes(b"w")
    return commit(store, key, folder, shard=number, started=0.0, seconds=1.0, metrics=metrics)


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


@pytest.mark.parametrize(("gpus", "processes"), [("", 1), ("1", 1), ("4", 4)])
def test_a_pod_trains_with_a_process_for_each_of_its_gpus(monkeypatch, gpus, processes):
    monkeypatch.setenv("MOE_ASR_STORE", "s3://bucket/runs")
    monkeypatch.setenv("MOE_ASR_GPU", "h100-80")
    monkeypatch.setenv("MOE_ASR_GPUS", gpus)
    assert config_from_variables().runtime.processes == processes


def test_gpus_that_cannot_share_a_step_are_refused_in_the_plan(monkeypatch):
    monkeypatch.setenv("MOE_ASR_STORE", "s3://bucket/runs")
    monkeypatch.setenv("MOE_ASR_GPU", "h100-80")
    monkeypatch.setenv("MOE_ASR_GPUS", "3")
    with pytest.raises(ConfigError, match="3 processes cannot share"):
        config_from_variables()


@pytest.mark.parametrize("memo", ["", 7, "a\nb", "x" * 32, "{{workflow.name}}"])
def test_a_name_in_the_cache_that_no_plan_makes_is_not_handed_on(store, tmp_path, memo):
    make(store, tmp_path, memo=memo)
    assert re.fullmatch("[0-9a-f]{32}", memo_key(planned(store), "workflow-2"))


def test_what_is_done_keeps_the_name_under_which_it_was_made(store, tmp_path):
    first = memo_key(planned(store, status="todo"), "workflow-1")
    make(store, tmp_path, memo=first)
    assert memo_key(planned(store), "workflow-2") == memo_key(planned(store), "workflow-3") == first


@pytest.mark.parametrize("status", ["todo", "stale"])
def test_what_is_lost_or_damaged_gets_a_name_that_no_cache_has_seen(store, tmp_path, status):
    made = memo_key(planned(store, status="todo"), "workflow-1")
    make(store, tmp_path, memo=made)
    assert memo_key(planned(store, status=status), "workflow-2") != made


def test_tries_of_one_plan_agree_and_pieces_do_not_share_a_name(store):
    names = [memo_key(planned(store, number, "todo"), "workflow-1") for number in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_work_of_a_local_run_has_a_name_that_changes_when_it_is_made_again(store, tmp_path):
    make(store, tmp_path)
    before = memo_key(planned(store), "workflow-1")
    assert before == memo_key(planned(store), "workflow-2")
    store.delete(planned(store).task.key.prefix + "manifest.json")
    make(store, tmp_path)
    assert memo_key(planned(store), "workflow-3") != before


def test_names_in_the_cache_are_as_argo_wants_them(store):
    assert memo_key(planned(store, status="todo"), "any/thing").isalnum()


def test_each_plan_adds_the_tasks_that_it_knows_to_the_record(store, tmp_path, monkeypatch, micro_model, tones):
    config = micro_config(tmp_path / "store", micro_model, tones, asr__pretrain="alone")
    values = {"CONFIG": to_yaml(config), "STORE": store.url, "RUN": "micro", "CORPUS": str(tones), "WORKFLOW": "ns/w1"}
    for name, value in values.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", value)
    monkeypatch.setenv("MOE_ASR_CACHE", str(tmp_path / "cache"))
    plan_stage("")
    first = read_record(store, "micro")
    run = Run(config)
    for known in run.plan().planned:  # extract, cluster and gating
        run_one(run, known, stopping=lambda: False)
    plan_stage("experts")
    then = read_record(store, "micro")
    assert not any(label.startswith("experts") for label in first["tasks"])
    assert {*first["tasks"], "experts[0]", "experts[1]", "asr"} <= then["tasks"].keys()
    assert (then["workflow"], then["status"], then["started"]) == ("ns/w1", "running", first["started"])


def lists(store, count, lanes, url="s3://here"):
    plan = Plan(tuple(planned(store, number, "todo") for number in range(count)), ())
    return fan_out_lists(plan, url, "workflow-1", lanes)


def test_a_list_has_one_item_per_piece_and_stages_without_pieces_are_empty(store):
    made = lists(store, 3, 2)
    assert [item["shard"] for item in made["experts"]] == ["0", "1", "2"]
    assert {name for name, items in made.items() if not items} == {c.name for c in STAGES} - {"experts"}


def test_no_more_lanes_than_may_run_at_once(store):
    assert {item["lane"] for item in lists(store, 7, 3)["experts"]} == {"0", "1", "2"}


def test_two_workflows_lock_the_same_piece_only_in_the_same_store(store):
    locks = [lists(store, 1, 1, url)["experts"][0]["lock"] for url in ("s3://here", "s3://here", "s3://there")]
    assert locks[0] == locks[1] != locks[2]


@pytest.mark.parametrize(("text", "told"), [("a: [", "not valid YAML"), ("- a", "must contain a mapping")])
def test_a_configuration_that_is_none_is_refused(text, told):
    with pytest.raises(ConfigError, match=told):
        config_text(text)


FAILURES = json.dumps(
    [
        {"displayName": "plan(0)", "message": "main: Error (exit code 78): asr.epoch: no such setting"},
        {"displayName": "main", "message": "child 'x' failed"},
        {"displayName": "asr", "message": ""},
    ]
)


@pytest.mark.parametrize("text", [FAILURES, json.dumps(FAILURES)], ids=["list", "quoted"])
def test_failures_are_the_nodes_that_say_why(text):
    (node,) = failed_nodes(text)
    assert node == {"task": "plan(0)", "message": "main: Error (exit code 78): asr.epoch: no such setting"}


def test_failures_that_cannot_be_read_are_quoted():
    assert failed_nodes("[" * 100_000) == [{"task": "?", "message": "[" * 500}]


@pytest.mark.parametrize("text", ["", "null", "[]", '"null"'])
def test_no_failures_are_none(text):
    assert failed_nodes(text) == []


@pytest.fixture
def webhook():
    """An HTTP server; yields its address and the list of bodies that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", got
        server.shutdown()
        thread.join()


def test_the_outcome_is_in_the_store_and_told_to_the_webhook(store, monkeypatch, tmp_path, webhook):
    url, got = webhook
    store.write("mine/run.json", json.dumps(run_record(workflow="ns/w1")).encode())
    for name, value in {"STORE": tmp_path / "store", "RUN": "mine", "WORKFLOW": "ns/w1", "WEBHOOK": url}.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))
    write_outcome("Failed", FAILURES)
    outcome = json.loads(store.read("mine/outcome.json"))
    assert got == [outcome] and outcome["status"] == "Failed" and outcome["failures"][0]["task"] == "plan(0)"
    assert json.loads(store.read("mine/run.json"))["status"] == "failed"


def test_the_outcome_of_an_extension_is_that_of_its_run(store, monkeypatch, tmp_path):
    for name, value in {"STORE": tmp_path / "store", "PARENT": "mine", "WORKFLOW": "ns/w1"}.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))
    write_outcome("Failed", FAILURES)
    assert json.loads(store.read("mine-extended/outcome.json"))["status"] == "Failed"


def test_a_configuration_that_fails_is_still_told_to_the_webhook(store, monkeypatch, tmp_path, webhook):
    url, got = webhook
    for name, value in {"STORE": tmp_path / "store", "CONFIG": "asr: {epoch: 3}", "WEBHOOK": url}.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))
    write_outcome("Failed", FAILURES)
    assert got[0]["failures"] == failed_nodes(FAILURES)


def test_a_webhook_that_does_not_answer_is_no_failure(store, monkeypatch, tmp_path):
    for name, value in {"STORE": tmp_path / "store", "WEBHOOK": "http://127.0.0.1:9/none"}.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))
    assert write_outcome("Succeeded", "[]")["status"] == "Succeeded"


@pytest.mark.parametrize("url", ["http://u:WORD@host:port/", "http://[WORD", "no WORD", "http://u:WORD@127.0.0.1:9/"])
def test_a_webhook_that_cannot_be_is_no_failure_and_not_shown(store, monkeypatch, tmp_path, caplog, url):
    for name, value in {"STORE": tmp_path / "store", "WEBHOOK": url}.items():
        monkeypatch.setenv(f"MOE_ASR_{name}", str(value))
    write_outcome("Succeeded", "[]")
    assert "webhook" in caplog.text and "WORD" not in caplog.text
