"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
def tones(tmp_path_factory) -> Path:
    """A corpus of tones: 18 speakers in three etiologies, 108 utterances."""
    from tests.factories import micro_corpus

    return micro_corpus(tmp_path_factory.mktemp("tones") / "corpus")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("MOE_ASR_CACHE", str(tmp_path / "cache"))
