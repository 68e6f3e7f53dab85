"""The same run on an S3 server: the same keys, weights and scores as on a folder, corpus and model in buckets too."""

import json
import logging
from types import SimpleNamespace

from common.data import sources
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from stages.local_runner import Run, log_to_run, run_pipeline
from tests.stages.test_local_runner import digests, micro_config


def stored_digests(store):
    """label → key and content digest of every task of a store's run, re-hashed."""
    tasks = json.loads(store.read("micro/run.json"))["tasks"]
    return {
        label: inspect(store, Key(task["stage"], task["key"]), deep=True).manifest.digest
        for label, task in tasks.items()
    }


def test_a_run_in_a_bucket_equals_one_in_a_folder_and_a_second_one_does_nothing(
    tmp_path, s3_server, bucket, micro_model, tones, monkeypatch
):
    copies, download = set(), sources.download_folder
    monkeypatch.setattr(sources, "download_folder", lambda store, to: (copies.add(to), download(store, to)))
    place = {"endpoint_url": s3_server.endpoint}
    for name, folder in (("corpus", tones), ("model", micro_model)):
        open_store(f"s3://{bucket}/{name}", **place).put_folder(folder, "")
    config = micro_config(
        f"s3://{bucket}/runs", f"s3://{bucket}/model", f"s3://{bucket}/corpus", asr__epochs=1, **place
    )
    remote = run_pipeline(config)
    assert len(copies) == 1  # of the model: a stage uses the one that is there
    local = run_pipeline(micro_config(tmp_path / "local", micro_model, tones, asr__epochs=1))
    store = open_store(f"s3://{bucket}/runs", **place)
    assert stored_digests(store) == digests(tmp_path / "local")
    assert remote["wer_after"] == local["wer_after"]
    assert store.size("micro/report.html") and store.size("micro/logs/run.log") is not None

    before = [(entry.key, entry.modified) for entry in store.list("artifacts/")]
    assert Run(config).plan(deep=True).finished
    run_pipeline(config)
    assert [(entry.key, entry.modified) for entry in store.list("artifacts/")] == before


def test_the_log_in_a_bucket_has_the_lines_of_all_machines_and_of_no_other_run(tmp_path, s3_server, bucket):
    def log_line(place, machine, line):
        store = open_store(f"s3://{bucket}/{place}", endpoint_url=s3_server.endpoint)
        run = SimpleNamespace(config=SimpleNamespace(run="micro"), store=store, cache=tmp_path / machine)
        with log_to_run(run):
            logging.getLogger().error(line)
        return [line.rpartition(" ")[2] for line in store.read("micro/logs/run.log").decode().splitlines()]

    assert log_line("a", "first", "one") == ["one"]
    assert log_line("b", "first", "two") == ["two"]
    assert log_line("a", "second", "three") == ["one", "three"]
    assert log_line("a", "first", "four") == ["one", "three", "four"]
