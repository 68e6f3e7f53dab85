"""Finds Debian's Prometheus, or unpacks it into the user's cache: nothing is installed and no service starts."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "moe-asr" / "prometheus"


def find_program(name: str) -> Path | str:
    """The path of `prometheus` or `promtool`; a reason in words where it cannot be had."""
    installed = shutil.which(name)
    if installed:
        return Path(installed)
    unpacked = CACHE / "usr" / "bin" / name
    if unpacked.is_file():
        return unpacked
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        return f"{name} is not installed, and this is no Debian to take it from"
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE.parent / "prometheus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem = "" if unpacked.is_file() else _unpack()
    return problem or unpacked


def _unpack() -> str:
    """Downloads and unpacks the package; returns what went wrong, if anything."""
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        if not _run(folder, "apt-get", "download", "prometheus"):
            _run(folder, "apt-get", "update")  # there may be no package lists yet
            _run(folder, "apt-get", "download", "prometheus")
        packages = list(Path(folder).glob("*.deb"))
        if not packages:
            return "prometheus is not installed and apt-get cannot download it: apt-get install prometheus"
        tree = Path(folder) / "tree"
        if not _run(folder, "dpkg", "-x", str(packages[0]), str(tree)):
            return f"{packages[0].name} cannot be unpacked"
        shutil.rmtree(CACHE, ignore_errors=True)
        tree.rename(CACHE)
    return ""


def _run(folder: str, *command: str) -> bool:
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
