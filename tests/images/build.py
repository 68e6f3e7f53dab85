"""Builds the images with Debian's own tools, where no registry and no container daemon can be reached.

Everything is kept in ~/.cache/moe-asr/images (or $MOE_ASR_IMAGES): the second time only layers of changed sources are
made. Images are named localhost/moe-asr/<base or stage>:test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PREFIX = "localhost/moe-asr"
TAG = "test"
DEBIAN = "localhost/debian-python:3.11"
SUITE = "bookworm"  # Debian 12, whose Python is the one that the lock is made for
PACKAGES = "ca-certificates,python3-venv"
TOOLS = {"buildah": "buildah", "podman": "podman", "runc": "runc", "debootstrap": "debootstrap"}
MAKE = ("make", "--no-print-directory", "-C", str(ROOT), f"PREFIX={PREFIX}", f"BASE_IMAGE={DEBIAN}")
STAGES = ("extract", "cluster", "gating", "experts", "asr")


class CannotBuildError(Exception):
    """This machine cannot build images; the message says why."""


@dataclass(frozen=True, slots=True)
class Engine:
    """podman and buildah on a storage of their own.

    Attributes:
        folder: holds the storage and its configuration.
    """

    folder: Path

    def run(self, *command: str | Path, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
        """Runs a tool; its output is text."""
        environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"), "LC_ALL": "C.UTF-8"}
        words = [str(word) for word in command]
        return subprocess.run(words, env=environment, check=check, text=True, **options)  # type: ignore[call-overload,no-any-return]

    def output(self, *command: str | Path) -> str:
        """Standard output of a tool."""
        return self.run(*command, stdout=subprocess.PIPE).stdout

    def has(self, image: str) -> bool:
        """Whether an image is in the storage."""
        return self.run("podman", "image", "exists", image, check=False).returncode == 0


def build() -> Engine:
    """Builds base and stages, reusing what is there and up to date.

    Raises:
        CannotBuildError: a tool or a right is missing.
        CalledProcessError: a Dockerfile does not build; the builder has said why.
    """
    require_tools()
    engine = open_storage(storage_folder())
    if not engine.has(DEBIAN):
        make_debian(engine)
    flags = " ".join(["--isolation=chroot", "--layers=false", "--quiet", *cached_wheels()])
    engine.run(*MAKE, "images", "ENGINE=buildah", f"COMMIT={TAG}", f"FLAGS={flags}")
    remove_unused(engine)
    return engine


def image(name: str) -> str:
    """Full name of an image by its short one: `base` or a stage."""
    return f"{PREFIX}/{name}:{TAG}"


def storage_folder() -> Path:
    """Where images are kept between calls."""
    return Path(os.environ.get("MOE_ASR_IMAGES") or Path.home() / ".cache" / "moe-asr" / "images")


def require_tools() -> None:
    """Sees to it that the tools are there, installing Debian's where we may.

    Raises:
        CannotBuildError: they are not, and cannot be installed here.
    """
    if os.geteuid() != 0:
        raise CannotBuildError("building without a daemon needs root here")
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise CannotBuildError(f"{', '.join(missing)} missing, and no apt-get to install them with")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-qq", *words], env=environment, check=False, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise CannotBuildError(f"`apt-get {' '.join(words)}` failed; its own message is above")


def open_storage(folder: Path) -> Engine:
    """A storage for images below a folder; layers by overlay mounts of the kernel."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    (folder / "storage.conf").write_text(text, encoding="utf-8")
    return Engine(folder)


def make_debian(engine: Engine) -> None:
    """Debian 12 with its Python, from this machine's package mirror: stands in for python:3.11-slim-bookworm."""
    with tempfile.TemporaryDirectory(dir=engine.folder) as folder:
        root = Path(folder) / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), mirror()]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise CannotBuildError(f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
        for waste in ("var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*", "etc/hostname", "etc/resolv.conf"):
            for path in root.glob(waste):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        archive = Path(folder) / "root.tar"
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
        engine.output("podman", "import", "--quiet", archive, DEBIAN)


def mirror() -> str:
    """The first Debian mirror that this machine's apt uses."""
    for file in sorted(Path("/etc/apt").glob("sources.list*")):
        for source in sorted(file.iterdir()) if file.is_dir() else [file]:
            for url in re.findall(r"^(?:URIs:|deb(?: \[[^]]*\])?) *(\S+/debian/?)\s", source.read_text(), re.MULTILINE):
                return str(url)
    raise CannotBuildError("apt's sources name no Debian mirror")


def cached_wheels() -> list[str]:
    """A mount of uv's cache, whose changes are thrown away, where this machine has one: saves the downloads."""
    cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    return [f"--volume={cache}:/var/cache/uv:O"] if cache.is_dir() else []


def remove_unused(engine: Engine) -> None:
    """Removes images that newer ones of the same name have replaced, and dependencies of other locks."""
    dependencies = f"{PREFIX}/dependencies"
    locked = engine.output(*MAKE, "--eval", "locked: ; @echo $(LOCKED)", "locked").strip()
    for name in engine.output("podman", "images", "--format", "{{.Repository}}:{{.Tag}}", dependencies).split():
        if name != f"{dependencies}:{locked}":
            engine.run("podman", "rmi", name, check=False, stdout=subprocess.DEVNULL)
    engine.run("podman", "image", "prune", "--force", stdout=subprocess.DEVNULL)
