"""Fixtures around the real helm; what is not in the cache yet is made before any test's clock runs."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm import tools

NEEDS = {
    "helm": tools.helm_program,
    "pod_security": tools.pod_security_program,
    "problems": tools.schemas_file,
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds what the collected tests want."""
    if session.config.option.collectonly:
        return
    wanted = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    for name, make in NEEDS.items():
        if name in wanted:
            make()


def have(name: str) -> Path:
    """The program or file behind a fixture; skips where it cannot be had."""
    tool = NEEDS[name]()
    if isinstance(tool, str):
        pytest.skip(tool)
    return tool


Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> Helm:
    """helm(argument, …, ok=True): runs it; a failure fails the test unless it is expected."""
    program = have("helm")

    def run(*arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """render(argument, …): the chart's objects as release `speech` in namespace `team`."""

    @functools.cache
    def once(*arguments: str | Path) -> list[dict[str, Any]]:
        version = ("--kube-version", tools.KUBERNETES.removeprefix("v"))
        done = helm("template", "speech", tools.CHART, "--namespace", "team", *version, *arguments)
        return [document for document in yaml.load_all(done.stdout, yaml.CSafeLoader) if document]

    return lambda *arguments: copy.deepcopy(once(*arguments))


@pytest.fixture(scope="session")
def problems() -> Callable[[dict[str, Any]], list[str]]:
    """object → what the schema of its kind says against it."""
    schemas = json.loads(have("problems").read_text(encoding="utf-8"))

    @functools.cache
    def validator(kind: str) -> jsonschema.Draft4Validator:
        name = schemas["kinds"][kind]
        return jsonschema.Draft4Validator({"$ref": f"#/definitions/{name}", "definitions": schemas["definitions"]})

    def judge(thing: dict[str, Any]) -> list[str]:
        who = f"{thing['kind']} {thing['metadata']['name']}"
        errors = validator(f"{thing['apiVersion']}/{thing['kind']}").iter_errors(thing)
        return [f"{who}: {error.json_path}: {error.message}"[:300] for error in errors]

    return judge


@pytest.fixture(scope="session")
def pod_security() -> Callable[[list[dict[str, Any]]], list[list[str]]]:
    """pods → for each, what Kubernetes' level "restricted" objects to."""
    program = have("pod_security")

    def judge(pods: list[dict[str, Any]]) -> list[list[str]]:
        done = subprocess.run([program], input=json.dumps(pods), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        objections: list[list[str]] = json.loads(done.stdout)
        return objections

    return judge
