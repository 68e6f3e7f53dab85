"""The five stages on one machine: what a run leaves, what a second one skips, what a broken one loses."""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cli.runs import status
from common.config import validate
from common.errors import ConfigError, DataError, Preempted, RetryableError
from common.pipeline.plan import Planned, Task
from common.pipeline.stage import execute
from common.signals import handle_signals
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from common.storage.manifest import FileRecord, Manifest, content_digest
from stages import STAGES, run_function
from stages.local_runner import Run, run_one, run_pipeline
from stages.processes import parallel_slots, run_in_processes
from tests.servers import free_port

RUNTIME = {"num_workers": 0, "device": "cpu", "quiet": True, "plots": False}


def micro_config(store, model, corpus, **changes):
    """A configuration that runs in seconds; `changes` are `section__key` values."""
    tree = {
        "run": "micro",
        "store": str(store),
        "corpus": {"path": str(corpus)},
        "model": {"name": str(model)},
        "num_experts": 2,
        "subsets": {"embeddings_percent": 100, "experts_percent": 50, "test_samples": 12},
        "lora": {"rank": 2, "alpha": 4, "shared_rank": 4, "targets": ["q_proj", "fc1"]},
        "cluster": {"plot": "none", "algorithm": "spectral"},
        "gating": {"epochs": 2, "batch_size": 16},
        "experts": {"epochs": 1, "batch_size": 8},
        "asr": {"epochs": 2, "batch_size": 8, "select_samples": 4, "pretrain": "alone"},  # every stage runs
        "decode": {"max_new_tokens": 6},
        "runtime": RUNTIME,
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return validate(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_model, tones):
    """A finished run: (store folder, configuration, summary)."""
    store = tmp_path_factory.mktemp("finished") / "store"
    config = micro_config(store, micro_model, tones)
    return store, config, run_pipeline(config)


@pytest.fixture
def again(finished, tmp_path, micro_model, tones):
    """A copy of the finished run, to be broken."""
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    return store, micro_config(store, micro_model, tones)


def digests(store):
    """label → content digest of every task of a store's run."""
    record = json.loads((Path(store) / "micro" / "run.json").read_text())
    results = {}
    for label, task in record["tasks"].items():
        state = inspect(open_store(store), Key(task["stage"], task["key"]), deep=True)
        results[label] = state.manifest.digest if state.status == "done" else state.status
    return results


@contextmanager
def watched(*ports):
    """Reads the metrics at these ports as often as it can while the block runs; the last text of each."""
    texts, stop = {}, threading.Event()

    def look():
        while not stop.wait(0.1):
            for port in ports:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    texts[port] = answer.read().decode()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield texts
    finally:
        stop.set()
        thread.join()


def statuses(config):
    return {p.task.label: (p.status, p.reason) for p in Run(config).plan(deep=True).planned}


def test_a_run_leaves_summary_report_and_model(finished):
    store, _, summary = finished
    assert json.loads((store / "micro" / "summary.json").read_text()) == summary
    assert {"wer_before", "wer_after", "cer_before", "cer_after", "by_etiology"} <= set(summary)
    assert set(summary["seconds"]) == {"extract", "cluster", "gating", "experts", "asr"}
    assert set(summary["by_etiology"]) == {"typical", "low", "high"}
    page = (store / "micro" / "report.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "")
    model = next(store.glob("artifacts/asr/*/*/recogniser.json")).parent
    assert (model / "gate.safetensors").is_file()
    assert [(model / "experts" / str(i) / "adapter_model.safetensors").is_file() for i in (0, 1)] == [True, True]


def test_no_checkpoint_and_no_part_outlives_its_stage(finished):
    assert not [p for p in finished[0].rglob("*") if p.is_file() and ("checkpoints" in p.parts or "parts" in p.parts)]


def test_a_second_run_does_nothing(again):
    store, config = again
    before = {p: p.stat().st_mtime_ns for p in (store / "artifacts").rglob("*") if p.is_file()}
    run_pipeline(config)
    assert {p: p.stat().st_mtime_ns for p in (store / "artifacts").rglob("*") if p.is_file()} == before


def test_the_same_seed_gives_the_same_weights_and_scores_in_another_store(finished, tmp_path, micro_model, tones):
    store, _, summary = finished
    other = tmp_path / "elsewhere"
    repeated = run_pipeline(micro_config(other, micro_model, tones))
    assert digests(other) == digests(store)
    assert repeated["wer_after"] == summary["wer_after"]


def test_another_seed_shares_nothing_but_the_store(again, micro_model, tones):
    store, config = again
    first = digests(store)
    changed = micro_config(store, micro_model, tones, seed=7, run="seven")
    keys = {p.task.key.digest for p in Run(config).plan().planned}
    assert all(p.status == "todo" and p.task.key.digest not in keys for p in Run(changed).plan().planned)
    assert digests(store) == first


def test_a_changed_value_names_itself_and_leaves_earlier_stages_alone(again, micro_model, tones):
    store, _ = again
    changed = micro_config(store, micro_model, tones, asr__epochs=3)
    states = statuses(changed)
    assert states["asr"] == ("stale", "asr.epochs 2 → 3")
    assert {status for label, (status, _) in states.items() if label != "asr"} == {"done"}


def test_a_run_with_another_configuration_is_refused_without_resume(again, micro_model, tones):
    store, _ = again
    with pytest.raises(ConfigError, match=r"asr\.epochs 2 → 3.*--resume"):
        run_pipeline(micro_config(store, micro_model, tones, asr__epochs=3))


def test_another_plot_of_the_clusters_makes_nothing_again(again, finished, micro_model, tones):
    store, _ = again
    plotted = micro_config(store, micro_model, tones, cluster__plot="pca")
    assert {s for s, _ in statuses(plotted).values()} == {"done"}
    run_pipeline(plotted)
    assert "No map: the clusters were made without a projection" in (store / "micro" / "report.html").read_text()
    next((store / "artifacts" / "cluster").glob("*/*/centroids.npy")).unlink()
    states = statuses(plotted)
    run = Run(plotted)
    (cluster,) = [p for p in run.plan().planned if p.task.contract.name == "cluster"]
    run_one(run, cluster, lambda: False)
    assert states["cluster"][0] == "stale" and {s for s, _ in statuses(plotted).values()} == {"done"}
    assert next((store / "artifacts" / "cluster").glob("*/*/projection.jsonl")).is_file()
    assert digests(store) == digests(finished[0])


def test_the_timeline_and_status_tell_of_results_with_this_configuration_only(again, micro_model, tones, capsys):
    store, config = again

    def timeline():
        return json.loads((store / "micro" / "run.json").read_text())["timeline"]

    first = {row["key"]: row["seconds"] for row in timeline()}
    run_pipeline(micro_config(store, micro_model, tones, asr__epochs=1, asr__pretrain="gate"), resume=True)
    assert sorted(row["stage"] for row in timeline()) == ["asr", "cluster", "extract", "gating"]
    longer = Run(micro_config(store, micro_model, tones, asr__epochs=3))
    longer.save("running", longer.plan())
    status.main(["micro", "--store", str(store)], standalone_mode=False)
    results = {line.split()[0]: line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[2:]}
    assert results["asr"] == "not done" and " on " in results["gating"]
    run_pipeline(config, resume=True)
    assert {row["key"]: row["seconds"] for row in timeline()} == first


def test_status_finds_results_that_the_record_of_a_workflow_does_not_tell_yet(again, capsys):
    store, _ = again
    path = store / "micro" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"timeline": []}))
    status.main(["micro", "--store", str(store)], standalone_mode=False)
    results = capsys.readouterr().out.splitlines()[3:]
    assert len(results) == len(record["tasks"]) and all(" on " in line for line in results)


def test_moving_the_corpus_and_the_model_changes_no_key(again, tmp_path, micro_model, tones):
    store, _ = again
    shutil.copytree(tones, tmp_path / "corpus")
    shutil.copytree(micro_model, tmp_path / "model")
    assert {s for s, _ in statuses(micro_config(store, tmp_path / "model", tmp_path / "corpus")).values()} == {"done"}


def damage(path, how):
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_one_damaged_expert_is_made_again_and_nothing_else(again, finished, how):
    store, config = again
    record = json.loads((store / "micro" / "run.json").read_text())
    folder = store / "artifacts" / "experts" / record["tasks"]["experts[1]"]["key"]
    damage(next(folder.glob("*/adapter_model.safetensors")), how)
    states = statuses(config)
    assert states["experts[1]"][0] == "stale"
    assert "adapter_model.safetensors" in states["experts[1]"][1]
    assert {status for label, (status, _) in states.items() if label != "experts[1]"} == {"done"}
    run_pipeline(config)
    assert digests(store) == digests(finished[0])


def test_a_deleted_manifest_means_not_done(again, finished):
    store, config = again
    next((store / "artifacts" / "gating").glob("*/manifest.json")).unlink()
    assert statuses(config)["gating"][0] == "todo"
    run_pipeline(config)
    assert digests(store) == digests(finished[0])


def test_work_of_another_content_is_not_taken_for_the_same(again):
    store, config = again
    path = next((store / "artifacts" / "gating").glob("*/manifest.json"))
    made = Manifest.from_json(path.read_bytes(), str(path))
    (path.parent / made.attempt / "more").write_bytes(b"")
    files = made.files | {"more": FileRecord(0, hashlib.sha256(b"").hexdigest())}
    path.write_bytes(replace(made, files=files, digest=content_digest(files, made.volatile)).to_json())
    states = statuses(config)
    assert states["experts[0]"] == ("stale", "its input gating (gate) was recomputed with other content")


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"asr__pretrain": "none"}, {"extract", "asr"}),
        ({"asr__pretrain": "none", "asr__mixture": "loss"}, {"extract", "asr"}),
        ({"asr__pretrain": "gate"}, {"extract", "cluster", "gating", "asr"}),
        ({"asr__pretrain": "gate", "asr__route_by": "speaker"}, {"extract", "cluster", "gating", "asr"}),
        ({"asr__route_by": "table"}, {"asr"}),
        (
            {"asr__route_by": "table", "asr__pretrain": "gate", "gating__target": "etiology"},
            {"extract", "cluster", "gating", "asr"},
        ),
        ({"asr__mixture": "hard"}, {"extract", "cluster", "gating", "experts", "asr"}),
        ({"asr__shared_expert": False}, {"extract", "cluster", "gating", "experts", "asr"}),
        ({"num_experts": 1}, {"asr"}),
        ({"asr__adapt": "adalora"}, {"asr"}),
        ({"asr__adapt": "full", "asr__gradient_checkpointing": True}, {"asr"}),
    ],
    ids=["regular", "loss", "default", "speaker", "table", "both", "hard", "alone", "dense", "adalora", "full"],
)
def test_every_regime_runs_to_a_report(again, micro_model, tones, changes, stages):
    store, _ = again
    summary = run_pipeline(micro_config(store, micro_model, tones, run="other", asr__epochs=1, **changes))
    assert set(summary["seconds"]) == stages
    assert (store / "other" / "report.html").is_file()


def test_experts_trained_side_by_side_equal_those_trained_in_turn(again, finished, micro_model, tones):
    store, _ = again
    record = json.loads((store / "micro" / "run.json").read_text())
    folders = [store / "artifacts" / "experts" / record["tasks"][f"experts[{number}]"]["key"] for number in (0, 1)]
    (folders[0] / "manifest.json").unlink()
    damage(next(folders[1].glob("*/adapter_model.safetensors")), "flipped")
    old = [row | {"host": "elsewhere"} for row in record["timeline"]]
    (store / "micro" / "run.json").write_text(json.dumps(record | {"timeline": old}))
    port = free_port()
    runtime = RUNTIME | {"parallel_experts": 2, "metrics_port": port, "metrics_linger_seconds": 5}
    with watched(port + 1, port + 2) as served:
        run_pipeline(micro_config(store, micro_model, tones, runtime=runtime))
    assert digests(store) == digests(finished[0])
    timeline = json.loads((store / "micro" / "run.json").read_text())["timeline"]
    made = sorted((r["shard"], r["status"], r["host"] != "elsewhere") for r in timeline if r["stage"] == "experts")
    assert made == [("0", "run", True), ("1", "run", True)]
    assert [{name for name in ("0", "1") if f'shard="{name}"' in text} for text in served.values()] in (
        [{"0"}, {"1"}],
        [{"1"}, {"0"}],
    )


def test_a_shard_that_the_timeline_lost_is_in_it_again(again):
    store, config = again
    record = json.loads((store / "micro" / "run.json").read_text())
    kept = [r for r in record["timeline"] if (r["stage"], r["shard"]) != ("experts", "1")]
    (store / "micro" / "run.json").write_text(json.dumps(record | {"timeline": kept}))
    run_pipeline(config)
    timeline = json.loads((store / "micro" / "run.json").read_text())["timeline"]
    assert timeline[:-1] == kept
    assert (timeline[-1]["stage"], timeline[-1]["shard"], timeline[-1]["status"]) == ("experts", "1", "skipped")


@pytest.mark.parametrize(
    ("visible", "device", "parallel", "expected"),
    [
        (None, "auto", None, ["0", "1"]),
        ("2,3", "auto", None, ["2", "3"]),
        ("GPU-ab, GPU-cd", "cuda", 3, ["GPU-ab", "GPU-cd", "GPU-ab"]),
        ("2,3", "cuda:1", 2, ["2,3", "2,3"]),
        ("2,3", "cpu", 2, ["", ""]),
    ],
)
def test_processes_get_the_gpus_that_the_user_left_visible(monkeypatch, visible, device, parallel, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = validate({"runtime": {"device": device, "parallel_experts": parallel}})
    assert parallel_slots(config) == expected


STAGE = """#!{python} -S
import signal, sys, time

def write(name, text):
    with open(f"{{__file__}}.{{name}}", "a") as file:
        file.write(f"{{text}}\\n")

def told(*_):
    write("said", "told")
    sys.exit(143)

signal.signal(signal.SIGTERM, told)
write("started", signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
while True:
    time.sleep(0.05)
"""


def test_a_stop_reaches_the_processes_and_no_more_are_started(tmp_path, micro_model, tones, monkeypatch):
    program = tmp_path / "stage"
    program.write_text(STAGE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr("stages.processes.sys.executable", str(program))
    config = micro_config(tmp_path / "store", micro_model, tones)
    contract = next(stage for stage in STAGES if stage.name == "experts")
    planned = [Planned(Task(contract, i, Key("experts", str(i)), {}), "todo", "", None) for i in range(3)]
    started, said = Path(f"{program}.started"), Path(f"{program}.said")

    def stopping():
        return started.is_file() and started.read_text().count("\n") == 2

    with pytest.raises(Preempted, match="stopped by a signal"):
        run_in_processes(config, planned, ["", ""], scratch=tmp_path, stopping=stopping)
    assert said.read_text() == "told\n" * 2
    assert started.read_text() == "True\n" * 2  # whether SIGINT is blocked: a Ctrl-C is ours alone to pass on
    assert not list(tmp_path.glob("*.yaml"))


def test_a_second_wish_to_stop_reaches_the_processes_as_an_alarm(tmp_path, micro_model, tones, monkeypatch):
    """SIGTERM twice within seconds is taken for one wish."""
    program = tmp_path / "stage"
    program.write_text(STAGE.format(python=sys.executable).replace("sys.exit(143)", "pass"))
    program.chmod(0o755)
    monkeypatch.setattr("stages.processes.sys.executable", str(program))
    config = micro_config(tmp_path / "store", micro_model, tones)
    contract = next(stage for stage in STAGES if stage.name == "experts")
    planned = [Planned(Task(contract, 0, Key("experts", "0"), {}), "todo", "", None)]
    started, said = Path(f"{program}.started"), Path(f"{program}.said")

    def interrupt():
        for sign in (started, said):
            while not sign.is_file():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

    impatient = threading.Thread(target=interrupt)
    with handle_signals() as stopping, pytest.raises(KeyboardInterrupt):
        impatient.start()
        run_in_processes(config, planned, [""], scratch=tmp_path, stopping=stopping)
    impatient.join()
    assert said.read_text() == "told\n"


@pytest.mark.parametrize(
    ("end", "message"), [("exit 75", "exit code 75"), ("kill -9 $$", "experts.0. was killed by SIGKILL")]
)
def test_a_process_gets_the_configuration_it_is_given_and_tells_what_may_pass(
    tmp_path, micro_model, tones, monkeypatch, end, message
):
    program = tmp_path / "stage"
    program.write_text(f"#!/bin/sh\n/usr/bin/env > {tmp_path}/seen\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr("stages.processes.sys.executable", str(program))
    monkeypatch.setenv("MOE_ASR_STORE", "elsewhere")
    monkeypatch.setenv("MOE_ASR_CACHE", "kept")
    config = micro_config(tmp_path / "store", micro_model, tones)
    contract = next(stage for stage in STAGES if stage.name == "experts")
    with pytest.raises(RetryableError, match=message):
        run_in_processes(
            config, [Planned(Task(contract, 0, Key("experts", "0"), {}), "todo", "", None)], ["3"], scratch=tmp_path
        )
    seen = (tmp_path / "seen").read_text()
    assert "MOE_ASR_STORE" not in seen
    assert "MOE_ASR_CACHE=kept\n" in seen
    assert "CUDA_VISIBLE_DEVICES=3\n" in seen


@pytest.mark.parametrize(
    ("error", "status"), [(Preempted("told"), "stopped"), (KeyboardInterrupt(), "stopped"), (DataError("x"), "failed")]
)
@pytest.mark.parametrize("place", ["_run_stages", "finish"])
def test_how_a_run_ended_is_recorded(again, monkeypatch, error, status, place):
    store, config = again

    def fail(*_):
        raise error

    monkeypatch.setattr(f"stages.local_runner.{place}", fail)
    with pytest.raises(type(error)):
        run_pipeline(config)
    assert json.loads((store / "micro" / "run.json").read_text())["status"] == status


def test_results_that_stay_damaged_end_a_run_as_failed(again, monkeypatch):
    store, config = again

    def fail(*_):
        raise RetryableError("damaged")

    monkeypatch.setattr("stages.local_runner.finish", fail)
    with pytest.raises(RetryableError):
        run_pipeline(config)
    assert json.loads((store / "micro" / "run.json").read_text())["status"] == "failed"


def run_task(run, task, scratch, stopping=lambda: False):
    """Runs a task of a plan as the pipeline does, in this process."""
    function = run_function(task.contract.name)
    return execute(task, function, run.config, run.store, corpus=run.corpus, scratch=scratch, stopping=stopping)


def stop_after(count):
    """A stop flag that rises at the count-th question."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= count


@pytest.mark.parametrize("stage", ["gating", "experts", "asr"])
@pytest.mark.parametrize("step", [1, 3])
def test_stopped_and_resumed_training_ends_with_the_same_bits(again, finished, stage, step):
    store, config = again
    for manifest in (store / "artifacts" / stage).glob("*/manifest.json"):
        manifest.unlink()
    run = Run(config)
    task = next(p.task for p in run.plan().planned if p.task.contract.name == stage)
    with pytest.raises(Preempted):
        run_task(run, task, store / "scratch", stop_after(step))
    assert list((store / "artifacts" / stage / task.key.digest / "checkpoints").rglob("state.safetensors"))
    run_pipeline(config)
    assert digests(store) == digests(finished[0])


def test_stopped_extraction_keeps_its_finished_parts(tmp_path, finished, micro_model, tones):
    config = micro_config(tmp_path, micro_model, tones, extract__checkpoint_every=20)
    run = Run(config)
    task = run.plan().planned[0].task
    with pytest.raises(Preempted):
        run_task(run, task, tmp_path / "s", stop_after(3))
    assert len(list((tmp_path / task.key.prefix / "parts").iterdir())) == 2
    whole = run_task(run, task, tmp_path / "s")
    reference = np.load(next(finished[0].glob("artifacts/extract/*/*/embeddings.npy")))
    np.testing.assert_allclose(
        np.load(tmp_path / task.key.prefix / whole.attempt / "embeddings.npy"), reference, rtol=1e-4, atol=1e-5
    )


def test_parts_of_another_size_are_not_taken_for_ones_own(tmp_path, finished, micro_model, tones):
    """`extract.checkpoint_every` is in no key: another try may have another one."""
    for every, stop in ((20, stop_after(3)), (7, lambda: False)):
        config = micro_config(tmp_path, micro_model, tones, extract__checkpoint_every=every)
        run = Run(config)
        task = run.plan().planned[0].task
        with suppress(Preempted):
            made = run_task(run, task, tmp_path / "s", stop)
    reference = np.load(next(finished[0].glob("artifacts/extract/*/*/embeddings.npy")))
    vectors_ND = np.load(tmp_path / task.key.prefix / made.attempt / "embeddings.npy")
    np.testing.assert_allclose(vectors_ND, reference, rtol=1e-4, atol=1e-5)


def test_contracts_name_only_what_exists():
    outputs = {contract.output for contract in STAGES}
    for number, contract in enumerate(STAGES):
        assert set(contract.inputs) <= {earlier.output for earlier in STAGES[:number]}
    assert len(outputs) == len(STAGES)


def test_a_stage_reads_no_value_outside_its_contract(finished, monkeypatch):
    """Each value that a stage asks for is declared, or belongs to what no result depends on."""
    import ast
    import inspect as source

    from common.config import known_paths

    free = ("runtime", "model.name", "extract.checkpoint_every", "extract.clear_cache")
    for contract in STAGES:
        tree = ast.parse(source.getsource(source.getmodule(run_function(contract.name))))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("config."):
                path = ast.unparse(node).removeprefix("config.")
                if path in known_paths():
                    declared = (*contract.reads, *free)
                    assert any(path == r or path.startswith(f"{r}.") for r in declared), (contract.name, path)


def test_a_corpus_of_one_sample_is_refused_with_what_to_do(tmp_path, micro_model):
    from tests.factories import micro_corpus

    folder = micro_corpus(tmp_path / "one", speakers=1, utterances=1)
    with pytest.raises(DataError, match="no utterances in split"):
        run_pipeline(micro_config(tmp_path / "s", micro_model, folder))


def test_more_experts_than_samples_are_refused(again, micro_model, tones):
    store, _ = again
    config = micro_config(store, micro_model, tones, run="many", num_experts=500)
    with pytest.raises(DataError, match="cannot make 500 clusters"):
        run_pipeline(config)
