"""Alternating time measurements, rows of the table, and the description of the machine."""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from bench.setting import Setting

Measurement = dict[str, Any]
# Of a row where ours trains with the dynamic audio context and the peer with 30 s: tables state what both lead to.
TRAINS_SHORT = {"trains_short": True}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn")


def rounds(
    steps: Mapping[str, Callable[[], object]], setting: Setting, *, cold: Collection[str] = ()
) -> dict[str, float]:
    """Median seconds of each step; all are run in turn (A B C, A B C, …), so that a busy machine slows all equally.

    Args:
        steps: name → function to time.
        cold: steps that are too long for a run for warming up.
    """
    for name, step in steps.items():
        if name not in cold:
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(setting.repetitions):
        for name, step in steps.items():
            setting.synchronize()
            started = time.perf_counter()
            step()
            setting.synchronize()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def row(
    name: str,
    ours: float,
    peer: float,
    *,
    unit: str,
    target: float | None,
    note: str,
    better: Literal["less", "more"] = "less",
) -> Measurement:
    """One row: `ratio` above 1 says that ours is better."""
    ratio = peer / ours if better == "less" else ours / peer
    return {"row": name, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target, "note": note}


def device_name(setting: Setting) -> str:
    """The processor's or the GPU's own name."""
    if setting.on_gpu:
        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """What ran: Python, the packages of both sides, CUDA."""
    installed = {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
    return installed | ({"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {})
