"""The wheel holds all that a user needs: installed into an environment of its own, it runs the pipeline.

torch is gigabytes. So the new environment gets the wheel alone, and sees the other packages of this one by a path file,
after its own: this project's sources, which are installed here for editing, are not visible there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from tests.stages.test_local_runner import micro_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of a fresh environment with the wheel in it."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    command = ["uv", "pip", "install", "--offline", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python.parent


def run(installed, cwd, *words):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [str(installed / words[0]), *words[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_has_code_configurations_and_templates_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        "conf/demo.yaml",
        "conf/gpu/h100-80.yaml",
        "common/report/templates/report.html",
        "common/report/templates/model_card.md",
    }
    assert wanted | {"stages/asr/run.py", "recipes/text_to_sql/flights.yaml"} <= names
    assert {name.split("/")[0] for name in names} == {
        *("common", "demo", "stages", "cli", "argo", "conf", "recipes"),
        f"moe_asr-{version('moe-asr')}.dist-info",
    }


def test_the_installed_command_runs_the_pipeline_without_the_sources(installed, tmp_path, micro_model, tones):
    where = run(installed, tmp_path, "python", "-c", "import common; print(common.__file__, common.__version__)")
    assert where.stdout.split() == [
        str(next(installed.parent.glob("lib/*/site-packages/common/__init__.py"))),
        version("moe-asr"),
    ]
    assert run(installed, tmp_path, "moe-asr", "--version").stdout.split()[-1] == version("moe-asr")
    config = micro_config(tmp_path / "runs", micro_model, tones, asr__epochs=1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    done = run(installed, tmp_path, "moe-asr", "run", "--config", "c.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "micro"
    assert (tmp_path / "runs" / "micro" / "report.html").is_file()
