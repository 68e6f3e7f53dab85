"""The Dockerfiles agree with the stages' contracts, the packages and each other. `make test-images` builds them."""

import re
import tomllib
from pathlib import Path

import pytest

from stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
NAMES = [contract.name for contract in STAGES]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def locked(name):
    return dict(re.findall(r"^([\w.-]+)==([^ ;\\]+)", read(name), re.MULTILINE))


@pytest.mark.parametrize("contract", STAGES, ids=NAMES)
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


def test_bake_builds_the_same_images_as_the_script():
    text = read("docker-bake.hcl")
    listed = re.search(r"stage = \[([^]]*)\]", text)
    assert sorted(re.findall(r'"(\w+)"', listed.group(1))) == sorted(NAMES)
    assert set(re.findall(r'dockerfile = "([^"$]+)"', text)) == {
        "docker/dependencies/Dockerfile",
        "docker/base/Dockerfile",
    }
    for file, name in (("docker/dependencies", "BASE_IMAGE"), ("docker/base", "VERSION"), ("docker/base", "COMMIT")):
        assert re.search(rf"^ARG {name}=", read(f"{file}/Dockerfile"), re.MULTILINE)
        assert re.search(rf"^ *{name} = {name}$", text, re.MULTILINE)
    default = re.search(r"^ARG BASE_IMAGE=(.*)$", read("docker/dependencies/Dockerfile"), re.MULTILINE).group(1)
    assert f'default = "{default}"' in text
    assert f'"{default}"' in read("docker/build.py")
