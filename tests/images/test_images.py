"""The images run where a careful administrator lets them: no network, read-only root, no capability, no root user."""

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from common.files import let_others_read
from common.storage import open_store
from common.storage.artifacts import Key, inspect
from tests.images.build import DEBIAN, ROOT, STAGES, image
from tests.stages.test_local_runner import micro_config

PODMAN = ("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs")
CONFINED = (
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
    *("--network", "none", "--read-only", "--read-only-tmpfs=false", "--tmpfs", "/scratch:rw,size=1g,mode=1777"),
    *("--cap-drop", "all", "--security-opt", "no-new-privileges", "--env", "OMP_NUM_THREADS=2"),
)
COMPILERS = {"gcc", "cc", "c++", "g++", "clang", "ld", "as", "make", "nvcc", "rustc", "go"}
INSTALLERS = {"pip", "pip3", "uv"}
ALL = ("base", *STAGES)
TIMEOUT = 240


def run(engine, *words):
    """What a confined container prints; podman's flags come before the image."""
    command = (*PODMAN, "run", "--rm", *CONFINED, *words)
    done = engine.run(*command, check=False, capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def described(engine, name):
    return json.loads(engine.output("podman", "image", "inspect", image(name)))[0]


@contextmanager
def mounted(engine, name):
    """The root folder of an image."""
    path = engine.output("podman", "image", "mount", name).strip()
    try:
        yield Path(path)
    finally:
        engine.output("podman", "image", "umount", name)


@pytest.fixture(scope="module")
def work(tmp_path_factory, micro_model, tones):
    """A folder for the container's /data: corpus, model, configuration and an empty store, writable for anybody."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(micro_model, folder / "model")
    shutil.copytree(tones, folder / "corpus")
    let_others_read(folder)
    config = micro_config(
        "/data/store", "/data/model", "/data/corpus", cluster={"algorithm": "spectral", "plot": "umap"}
    )
    tree = config.model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    tree["gating"] |= {"epochs": 1_000_000, "patience": 1_000_000}
    tree["runtime"] |= {"save_every_n_epochs": 1_000_000, "quiet": False}
    (folder / "endless.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "store").mkdir()
    (folder / "store").chmod(0o777)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_image_says_what_it_does_and_its_version(engine, stage):
    assert f"{stage}:" in run(engine, image(stage), "--help")
    version = described(engine, stage)["Labels"]["org.opencontainers.image.version"]
    assert version in run(engine, "--entrypoint", "python", image(stage), "-m", "stages", "--version")


def test_the_base_runs_the_command_line(engine):
    assert "transcribe" in run(engine, image("base")) or "Commands" in run(engine, image("base"))
    version = described(engine, "base")["Labels"]["org.opencontainers.image.version"]
    assert version in run(engine, image("base"), "moe-asr", "--version")


@pytest.mark.timeout(5 * TIMEOUT)
def test_five_images_run_the_pipeline_on_a_mounted_corpus(engine, work):
    for stage in STAGES:
        run(engine, "--volume", f"{work}:/data", image(stage), "--config", "/data/config.yaml")
    store = open_store(str(work / "store"))
    made = sorted(folder.parent.name for folder in (work / "store" / "artifacts").glob("*/*"))
    assert set(made) == {*STAGES, "base"}  # the base model's transcripts, for other runs
    for folder in (work / "store" / "artifacts").glob("*/*"):
        assert inspect(store, Key(folder.parent.name, folder.name), deep=True).status == "done"


@pytest.mark.timeout(5 * TIMEOUT)
def test_sigterm_leaves_a_checkpoint_and_ends_with_143(engine, work):
    run(engine, "--volume", f"{work}:/data", image("extract"), "--config", "/data/config.yaml")
    run(engine, "--volume", f"{work}:/data", image("cluster"), "--config", "/data/config.yaml")
    name = f"moe-asr-{uuid.uuid4().hex[:12]}"
    command = (*PODMAN, "run", "--detach", "--name", name, *CONFINED, "--volume", f"{work}:/data", image("gating"))
    engine.output(*command, "--config", "/data/endless.yaml")
    try:
        before = checkpoints(work)
        wait_for(lambda: " steps (" in logs(engine, name), lambda: logs(engine, name))
        engine.output("podman", "kill", "--signal", "TERM", name)
        assert engine.output("podman", "wait", name).strip() == "143", logs(engine, name)
        assert checkpoints(work) - before
    finally:
        engine.run("podman", "rm", "--force", name, check=False, stdout=subprocess.DEVNULL)


def checkpoints(work):
    return {path for path in (work / "store" / "artifacts" / "gating").glob("*/checkpoints/*/*") if path.is_file()}


def logs(engine, name):
    done = engine.run("podman", "logs", name, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def wait_for(condition, explain, seconds=120):
    for _ in range(seconds * 2):
        if condition():
            return
        time.sleep(0.5)
    raise AssertionError(explain())


@pytest.mark.parametrize("name", ALL)
def test_labels_user_and_start(engine, name):
    description = described(engine, name)
    labels, config = description["Labels"], description["Config"]
    assert labels["org.opencontainers.image.title"] == ("moe-asr" if name == "base" else f"moe-asr {name}")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", labels["org.opencontainers.image.version"])
    assert labels["org.opencontainers.image.revision"] not in ("", "unknown")
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["User"] == "65532:65532"
    start = ["python", "-m", "stages", name] if name != "base" else []
    assert config["Entrypoint"] == ["tini", "--", *start]
    assert ("Cmd" in config and bool(config["Cmd"])) == (name == "base")
    assert {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"} <= {v.split("=")[0] for v in config["Env"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_adds_nothing_heavy_to_the_base(engine, stage):
    base, thin = described(engine, "base"), described(engine, stage)
    layers = base["RootFS"]["Layers"]
    assert thin["RootFS"]["Layers"][: len(layers)] == layers
    assert thin["Size"] - base["Size"] < 1_000_000


def test_no_compiler_installer_cache_or_test_is_in_the_image(engine):
    with mounted(engine, image("base")) as root:
        programs = {
            path.name for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in (root / folder).iterdir()
        }
        assert not {re.sub(r"-?[\d.]+$", "", name) for name in programs} & COMPILERS
        assert not {path.name for path in (root / "opt/venv/bin").iterdir()} & INSTALLERS
        assert not list((root / "root").glob(".cache/*"))
        assert not [path for path in (root / "opt").rglob("*") if path.name in ("tests", "test") and path.is_dir()]
        assert not list((root / "opt").rglob("*.whl")) and not list((root / "opt").rglob("*.a"))
        files = [path for path in (root / "usr").rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [path for path in files if path.stat().st_mode & 0o6000]
        assert not list((root / "var/lib/apt/lists").glob("*")) and not list((root / "var/cache/apt").glob("*"))


def test_nothing_of_the_building_machine_is_in_the_image(engine):
    with mounted(engine, image("base")) as root, mounted(engine, DEBIAN) as debian:
        bundle = "etc/ssl/certs/ca-certificates.crt"
        assert (root / bundle).read_bytes() == (debian / bundle).read_bytes()
        assert not [path for path in (root / "run").rglob("*") if path.is_file() and path.stat().st_size]
        assert not list(root.glob("mnt/*"))
        left = [root / "etc" / name for name in ("hostname", "resolv.conf")]  # places where engines mount their own
        assert not [path for path in left if path.exists() and path.stat().st_size]
        mine = [*root.glob("etc/*"), *root.glob("opt/venv/bin/*"), *root.glob("opt/venv/pyvenv.cfg")]
        mine += [*root.glob("opt/venv/lib/*/site-packages/*.dist-info/*"), *(root / "opt/moe-asr").rglob("*")]
        mine += root.glob("opt/venv/lib/*/site-packages/*.pth")
        text = "\n".join(path.read_text(errors="replace") for path in mine if path.is_file() and not path.is_symlink())
    for name in ALL:
        text += json.dumps(described(engine, name) | {"GraphDriver": None})  # where this machine keeps its layers
    text += "".join(engine.output("podman", "history", "--no-trunc", image(name)) for name in ALL)
    for setting in re.search(r"^INDEX := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split("|"):
        assert setting not in os.environ or os.environ[setting] not in text
    assert not [place for place in (f"{ROOT}/", str(engine.folder)) if place in text]


def test_modules_that_stages_import_are_compiled_and_the_rest_is_not(engine):
    with mounted(engine, image("base")) as root:
        (packages,) = root.glob("opt/venv/lib/*/site-packages")
        assert list(packages.glob("torch/__pycache__/__init__.*.pyc"))
        assert list(packages.glob("transformers/models/whisper/__pycache__/modeling_whisper.*.pyc"))
        assert not list(packages.glob("transformers/models/llama/__pycache__/modeling_llama.*.pyc"))
