"""Fixtures that many tests share."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.figures import pytest_terminal_summary  # noqa: F401 - a hook
from tests.servers import (  # noqa: F401 - fixtures and a hook
    any_store,
    bucket,
    impatient,
    proxy,
    pytest_collection_finish,
    s3_environment,
    s3_server,
    small_disk,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory) -> Path:
    """A random Whisper checkpoint of two layers."""
    from tests.factories import micro_whisper

    return micro_whisper(tmp_path_factory.mktemp("micro") / "model")


@pytest.fixture(scope="session")
def tiny_en(tmp_path_factory) -> Path:
    """The real Whisper tiny.en."""
    from demo.ct2 import bundled_tiny_en, import_ct2

    folder = tmp_path_factory.mktemp("tiny") / "tiny.en"
    import_ct2(bundled_tiny_en(), folder)
    return folder


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """A corpus of tones: 18 speakers in three etiologies, 108 utterances."""
    from tests.factories import micro_corpus

    return micro_corpus(tmp_path_factory.mktemp("tones") / "corpus")


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """An SQLite database of one table with 3000 rows. Not to be changed."""
    path = tmp_path_factory.mktemp("table") / "t.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x INTEGER, y TEXT)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(i, f"n{i}") for i in range(3000)])
    connection.commit()
    connection.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("MOE_ASR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """The last bits of a training depend on the number of threads: no test changes it for those after it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory, micro_model, tones) -> tuple[Path, Path]:
    """A finished run called `micro`: its store, and the folder of its model. Not to be changed."""
    from common.pipeline.runs import run_record, stage_folders
    from common.storage import open_store
    from stages.local_runner import run_pipeline
    from tests.stages.test_local_runner import micro_config

    folder = tmp_path_factory.mktemp("finished") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ASR_CACHE", str(folder.parent / "cache"))
        run_pipeline(micro_config(folder, micro_model, tones))
    store = open_store(folder)
    return folder, stage_folders(store, run_record(store, "micro"), "asr", folder)[0]


@pytest.fixture(scope="session")
def argo_lint(tmp_path_factory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """text of YAML → what Argo's own linter makes of it, without a cluster."""
    kept = Path.home() / ".cache" / "kubelab" / "bin" / "argo"
    program = shutil.which("argo") or (kept if kept.exists() else None)
    if program is None:
        pytest.skip("there is no argo program")

    def lint(text: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path_factory.mktemp("lint") / "objects.yaml"
        file.write_text(text, encoding="utf-8")
        kinds = "--kinds=workflowtemplates,cronworkflows"
        return subprocess.run([program, "lint", "--offline", kinds, file], capture_output=True, text=True)

    return lint
