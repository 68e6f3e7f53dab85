"""Programs and files that Go's toolchain makes from modules: once, kept in the user's cache.

A string instead of a path is the reason why something cannot be had.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

CACHE = Path.home() / ".cache" / "moe-asr" / "bin"


def go(arguments: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `go` in a folder."""
    flags = {"CGO_ENABLED": "0", "GOFLAGS": "-p=2 -buildvcs=false"}
    return subprocess.run(
        ["go", *arguments], cwd=folder, env=os.environ | flags | environment, capture_output=True, text=True
    )


def cached(name: str, make: Callable[[Path], str]) -> Path | str:
    """A file of the cache; `make` writes it to the path it gets and returns what went wrong, if anything."""
    path = CACHE / name
    if path.exists():
        return path
    if not shutil.which("go"):
        return f"{name} is not in {CACHE} and there is no Go toolchain"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            draft = path.with_name(f".{name}.{os.getpid()}")
            if problem := make(draft):
                return f"{name} cannot be made: {problem[-300:]}"
            draft.rename(path)
    return path


def installed(name: str, package: str, *flags: str) -> Path | str:
    """The program of a package, built by `go install` (minutes, once)."""

    def make(path: Path) -> str:
        folder = path.with_name(f"{path.name}.d")
        folder.mkdir(exist_ok=True)
        done = go(["install", *flags, package], CACHE, GOBIN=str(folder))
        if not done.returncode:
            next(folder.iterdir()).rename(path)
        shutil.rmtree(folder)
        return done.stderr if done.returncode else ""

    return cached(name, make)
