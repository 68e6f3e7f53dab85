"""What a store says is data: it does not decide where a command writes or listens, and ends none in a traceback."""

import copy
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.config import Config
from common.errors import DataError, UsageError
from common.pipeline.runs import read_record, recorded_states, run_names, settings_alone
from common.storage import open_store
from common.storage.artifacts import inspect
from common.storage.manifest import FileRecord, Malformed, Manifest, content_digest
from stages.__main__ import stage_config
from tests.common.storage.test_artifacts import KEY, make
from tests.factories import run_record
from tests.stages.test_local_runner import micro_config

NASTY = (None, True, -1, 10**30, 1e308, "", "x\ny", "\x1b[2J", "../../etc", "a" * 10_000, "\ud800", [], {}, {"a": {}})
DAMAGED = (b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}', b"9" * 5000, b'"run"')


def leaves(tree, path=()):
    """Paths of all values, containers too."""
    if path:
        yield path
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, name))


def changed(tree, path, value):
    """A copy with another value at a path; none at all where that is `...`."""
    made = copy.deepcopy(tree)
    at = made
    for name in path[:-1]:
        at = at[name]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


def variants(tree):
    """Each value of a tree replaced by each nasty one, or omitted."""
    return [changed(tree, path, value) for path in leaves(tree) for value in (*NASTY, ...)]


def command(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def test_no_run_json_ends_a_command_otherwise_than_by_one_error(tmp_path, tally):
    store = open_store(tmp_path)
    bodies = [*DAMAGED, *(json.dumps(variant).encode() for variant in variants(run_record()))]
    refused = 0
    for body in bodies:
        store.write("demo/run.json", body)
        try:
            record = read_record(store, "demo")
        except DataError as error:
            refused += 1
            assert len(str(error)) < 1000
            continue
        assert record["name"] == "demo"
        assert {state.status for _, _, state in recorded_states(store, record)} <= {"missing"}
        assert not {"runtime", "store", "endpoint_url", "run"} & settings_alone(record).keys()
    assert refused > len(bodies) // 2
    tally(len(bodies))


@pytest.mark.parametrize("body", DAMAGED)
def test_a_damaged_run_json_hides_no_other_run(tmp_path, body):
    store = open_store(tmp_path)
    store.write("good/run.json", json.dumps(run_record()).encode())
    store.write("bad/run.json", body)
    listed = command("runs", "list", "--store", tmp_path, "--json")
    assert listed.exit_code == 0
    assert {run["run"]: run["status"] for run in json.loads(listed.stdout)} == {"bad": "damaged", "good": "running"}
    assert command("status", "good", "--store", tmp_path).exit_code == 0
    for word in ("status", "verify", "logs"):
        assert isinstance(command(word, "bad", "--store", tmp_path).exception, DataError)


@pytest.mark.parametrize("summary", [b"{", b"[]", b'{"wer_before": "x", "wer_after": [1]}', b"[" * 100_000])
def test_a_damaged_summary_hides_no_run(tmp_path, summary):
    store = open_store(tmp_path)
    store.write("demo/run.json", json.dumps(run_record(status="done")).encode())
    store.write("demo/summary.json", summary)
    listed = command("runs", "list", "--store", tmp_path)
    assert listed.exit_code == 0 and "demo" in listed.stdout


def test_a_run_with_a_damaged_record_goes_on_and_writes_it_again(micro_run, tmp_path, micro_model, tones, caplog):
    import shutil

    from stages.local_runner import run_pipeline

    shutil.copytree(micro_run[0], tmp_path / "store")
    config = micro_config(tmp_path / "store", micro_model, tones)
    (tmp_path / "store" / "micro" / "run.json").write_bytes(b"{torn")
    run_pipeline(config)
    assert read_record(open_store(tmp_path / "store"), "micro")["status"] == "done"
    assert "run.json is damaged" in caplog.text
    manifests = [
        {path.relative_to(store): path.read_bytes() for path in store.rglob("manifest.json")}
        for store in (micro_run[0], tmp_path / "store")
    ]
    assert manifests[0] and manifests[0] == manifests[1]  # no stage is recomputed


# What a record may decide


@pytest.fixture
def poisoned(tmp_path):
    """A store whose newest run asks for a log file, an open port and other places."""
    config = Config().model_dump(mode="json")
    config |= {"store": "/elsewhere", "endpoint_url": "http://elsewhere", "run": "../elsewhere", "seed": 7}
    config["corpus"] = {"path": "/elsewhere/corpus"}
    config["model"]["name"] = "some/where"
    config["runtime"] |= {"log_file": str(tmp_path / "bashrc"), "metrics_host": "0.0.0.0", "metrics_port": 0}
    store = open_store(tmp_path / "store")
    store.write("demo/run.json", json.dumps(run_record(config=config)).encode())
    return {"store": str(tmp_path / "store")}


def test_a_stage_takes_neither_runtime_nor_places_from_a_record(poisoned):
    config = stage_config(poisoned | {"corpus": "mine", "model": "my/model"}, {})
    assert config.runtime == Config().runtime
    assert (config.store, config.endpoint_url, config.run) == (poisoned["store"], None, "demo")
    assert (config.corpus.path, config.model.name) == ("mine", "my/model")
    assert config.seed == 7  # what decides results does come from it


@pytest.mark.parametrize("given", [{}, {"corpus": "mine"}, {"model": "my/model"}, {"settings": ("corpus.path=mine",)}])
def test_a_place_that_only_the_record_names_is_asked_for(poisoned, given):
    with pytest.raises(UsageError, match=r"--(corpus|model) is missing: run demo had"):
        stage_config(poisoned | given, {})


# Manifests


@pytest.fixture
def made(tmp_path):
    """A store with one artifact, and its manifest."""
    store = open_store(tmp_path / "store")
    return store, make(store, tmp_path)


def test_no_manifest_ends_a_look_otherwise_than_by_a_state(made, tally):
    store, manifest = made
    raw = json.loads(manifest.to_json())
    bodies = [*DAMAGED, *(json.dumps(variant).encode() for variant in variants(raw))]
    for body in bodies:
        store.write(f"{KEY.prefix}manifest.json", body)
        try:
            state = inspect(store, KEY)
        except DataError as error:
            assert "upgrade moe-asr" in str(error)
            continue
        assert state.status in ("done", "damaged")
        if state.status == "done":
            assert state.manifest.files.keys() | {"plot.png"} == manifest.files.keys()  # that one is volatile
            assert "\n" not in state.manifest.host + state.manifest.version
    tally(len(bodies))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "../x", "/etc/x", "a/../b", "x\u2028y", "\x9b2J", "a" * 2000])
@pytest.mark.parametrize("field", ["stage", "key", "attempt", "file", "host", "version"])
def test_a_manifest_holds_names_alone(made, name, field):
    if field in ("host", "version") and name.isprintable() and len(name) < 2000:
        return  # these are only shown
    _, manifest = made
    files = manifest.files | {name: FileRecord(1, "0" * 64)}
    bad = replace(manifest, **({"files": files} if field == "file" else {field: name}))
    with pytest.raises(Malformed) as told:
        Manifest.from_json(bad.to_json(), "here")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("files", [{}, {"weights.safetensors": FileRecord(5000, "0" * 64)}])
def test_a_manifest_that_lost_files_is_not_whole(made, files):
    store, manifest = made
    store.write(f"{KEY.prefix}manifest.json", replace(manifest, files=files).to_json())
    state = inspect(store, KEY, deep=True)
    assert state.status == "damaged" and "digest" in state.reason
    assert content_digest(manifest.files, manifest.volatile) == manifest.digest


def test_damage_that_a_second_look_does_not_find_is_none(made, monkeypatch):
    store, _ = made
    looks = iter([[], list(store.list(KEY.prefix))])
    monkeypatch.setattr(type(store), "list", lambda self, prefix, **_: iter(next(looks)))
    with pytest.raises(StopIteration):  # what follows the two listings
        assert inspect(store, KEY).status == "done"
        next(looks)


def test_names_of_runs_that_no_run_has_are_not_shown(tmp_path):
    store = open_store(tmp_path)
    for name in ("good", "a\nb", "\x1b[2J", "-rf", "é"):
        store.write(f"{name}/run.json", json.dumps(run_record()).encode())
    assert run_names(store) == ["good"]
