"""Builds all images with docker, podman or buildah: dependencies, base, and one for each stage.

    python docker/build.py --engine podman --prefix registry.example.org/team/moe-asr

Each image is tagged with the version and with the commit. Flags after `--` go to every build as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = tuple(sorted(file.parent.name for file in ROOT.glob("stages/*/Dockerfile")))
INDEX_SETTINGS = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL")
# What decides the content of the heavy layers.
LOCKED = ("docker/requirements.txt", "requirements-uv.txt", "docker/dependencies")


def main() -> None:
    """Builds, and describes what was built where asked to."""
    arguments = parse()
    version, commit = project_version(), arguments.commit or current_commit()
    tags = (version, commit)
    with secrets() as secret_flags:
        builder = [arguments.engine, "build", *secret_flags, *arguments.flags]
        dependencies = f"{arguments.prefix}/dependencies:{locked_digest(arguments.base_image)}"
        if not (arguments.reuse and exists(arguments.engine, dependencies)):
            build(builder, "docker/dependencies", [dependencies], {"BASE_IMAGE": arguments.base_image})
        labels = {"VERSION": version, "COMMIT": commit}
        base = [f"{arguments.prefix}/base:{tag}" for tag in tags]
        build(builder, "docker/base", base, labels | {"DEPENDENCIES": dependencies})
        for stage in arguments.stages:
            names = [f"{arguments.prefix}/{stage}:{tag}" for tag in tags]
            build(builder, f"stages/{stage}", names, {"BASE": base[0]})
    if arguments.sbom:
        from sbom import write  # needs the developer's dependencies, building does not

        images = [f"{arguments.prefix}/{name}:{version}" for name in ("base", *arguments.stages)]
        write(arguments.engine, images, arguments.sbom)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), default="docker")
    parser.add_argument("--prefix", default="moe-asr", help="registry and folder of the images' names")
    parser.add_argument("--base-image", default="python:3.11-slim-bookworm", help="Debian 12 or like it, Python 3.11")
    parser.add_argument("--commit", help="tag and label instead of git's commit")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES, help="only these (default: all)")
    parser.add_argument("--reuse", action="store_true", help="leave the dependencies alone if their lock is unchanged")
    parser.add_argument("--sbom", type=Path, help="folder for a bill of materials of each image")
    parser.add_argument("flags", nargs="*", help="after `--`: flags for every build")
    return parser.parse_args()


def build(builder: Sequence[str], folder: str, tags: Sequence[str], arguments: dict[str, str]) -> None:
    """One image.

    Raises:
        SystemExit: the engine failed; it has said why.
    """
    command = [*builder, "--file", f"{folder}/Dockerfile"]
    command += [word for tag in tags for word in ("--tag", tag)]
    command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    started = time.monotonic()
    done = subprocess.run([*command, "."], cwd=ROOT, env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=False)
    if done.returncode:
        sys.exit(f"{tags[0]}: {builder[0]} ended with exit code {done.returncode}; its own message is above")
    print(f"{tags[0]}: built in {time.monotonic() - started:.0f} s", flush=True)


def project_version() -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def current_commit() -> str:
    """Twelve digits of git's commit, with `-dirty` after changes; `unknown` outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def locked_digest(base_image: str) -> str:
    """A tag for the dependencies: the same as long as base image, lock and installer are."""
    digest = hashlib.sha256(base_image.encode())
    for name in LOCKED:
        path = ROOT / name
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def exists(engine: str, image: str) -> bool:
    """Whether the engine has an image."""
    command = [engine, "inspect", "--type", "image", image]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def secrets() -> Iterator[list[str]]:
    """Flags that pass this machine's package index and certificates to a build, without leaving them in it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {name: os.environ[name] for name in INDEX_SETTINGS if name in os.environ}
        index = Path(folder) / "index"
        index.write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()), encoding="utf-8")
        flags = [f"--secret=id=index,src={index}"]
        if bundle := os.environ.get("SSL_CERT_FILE"):
            flags.append(f"--secret=id=ca,src={bundle}")
        yield flags


if __name__ == "__main__":
    main()
