"""The Dockerfiles agree with the stages' contracts, the packages and each other. `make test-images` builds them."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
WITH_IMAGES = [contract for contract in STAGES if not contract.part_of]
NAMES = [contract.name for contract in WITH_IMAGES]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def locked(name):
    return dict(re.findall(r"^([\w.-]+)==([^ ;\\]+)", read(name), re.MULTILINE))


@pytest.mark.parametrize("contract", WITH_IMAGES, ids=NAMES)
def test_each_stage_has_a_thin_image_that_starts_it_under_tini(contract):
    text = read(f"stages/{contract.name}/Dockerfile")
    assert f'ENTRYPOINT ["tini", "--", "python", "-m", "stages", "{contract.name}"]' in text
    assert contract.summary in text
    assert not re.search(r"^(RUN|COPY|ADD|USER)\b", text, re.MULTILINE)


def test_the_base_holds_every_package_but_the_recipes():
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.rstrip("*") for pattern in patterns} - {"recipes"}
    copied = re.findall(r"^COPY (\w+) /opt/moe-asr/\1$", read("docker/base/Dockerfile"), re.MULTILINE)
    assert set(copied) == packages
    assert packages <= set(re.findall(r"^!(\w+)$", read(".dockerignore"), re.MULTILINE))


def test_the_builder_sees_nothing_but_what_is_copied_or_mounted():
    lines = [line for line in read(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    used = read("docker/base/Dockerfile") + read("docker/dependencies/Dockerfile")
    for line in lines:
        if line.startswith("!"):
            assert line[1:].split("*")[0].rstrip("/") in used


def test_the_images_lock_holds_hashes_and_the_versions_of_the_whole_lock():
    lock, whole = locked("docker/requirements.txt"), locked("requirements.txt")
    assert lock.items() <= whole.items()
    text = read("docker/requirements.txt")
    assert text.count(" \\\n    --hash=sha256:") >= len(lock)
    missing = [name for name in PYPROJECT["project"]["dependencies"] if re.split("[>=<]", name)[0] not in lock]
    assert missing == []


def test_demo_and_developer_tools_are_not_in_the_images_lock():
    lock = locked("docker/requirements.txt")
    extras = PYPROJECT["project"]["optional-dependencies"]
    names = {re.split(r"[\[>=<]", line)[0] for extra in ("demo", "dev") for line in extras[extra]}
    assert not names & lock.keys()


def test_make_images_builds_each_image_on_the_one_before_with_secrets_that_go(tmp_path):
    """`make images` with an engine that writes down what it is asked for; `make test-images` has a real one."""
    engine, log, index = tmp_path / "engine", tmp_path / "log", ROOT / "build" / "index"
    engine.write_text(f'#!/bin/sh\n[ "$1" = build ] || exit 1\necho "$@" >>{log}\ncat build/index >>{log}\n')
    engine.chmod(0o755)
    environment = os.environ | {"PIP_INDEX_URL": "https://name:word@mirror.example.org/?a=1&b", "SSL_CERT_FILE": "/ca"}
    words = [f"ENGINE={engine}", "PREFIX=registry/team", "COMMIT=abc", "FLAGS=--pull"]
    done = subprocess.run(["make", "images", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not index.exists()
    text = log.read_text()
    builds = [line for line in text.splitlines() if line.startswith("build ")]
    assert text.count("PIP_INDEX_URL='https://name:word@mirror.example.org/?a=1&b'\n") == len(builds)
    assert all(f"--secret=id=index,src={index} --secret=id=ca,src=/ca --pull" in line for line in builds)
    version = PYPROJECT["project"]["version"]
    tagged = [re.findall(r"--tag registry/team/(\S+)", line) for line in builds]
    assert tagged[1:] == [[f"{name}:{version}", f"{name}:abc"] for name in ("base", *NAMES)]
    assert f"--build-arg DEPENDENCIES=registry/team/{tagged[0][0]} " in builds[1]
    assert f"--build-arg VERSION={version} --build-arg COMMIT=abc ." in builds[1]
    assert all(f"--file stages/{name}/Dockerfile" in line for name, line in zip(NAMES, builds[2:], strict=True))
    assert all(f"--build-arg BASE=registry/team/base:{version} ." in line for line in builds[2:])
    default = re.search(r"^ARG BASE_IMAGE=(.*)$", read("docker/dependencies/Dockerfile"), re.MULTILINE)[1]
    assert f"BASE_IMAGE={default} ." in builds[0]
