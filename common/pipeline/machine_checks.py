"""Checks of this machine: versions, device, memory, cores, disk, decoding, compiler."""

import io
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from common.errors import MoeAsrError
from common.storage.doctor import Check

GIB = 2**30
LOW_DISK, LITTLE_DISK = 1 * GIB, 10 * GIB  # a run of tiny.en; one of a large model with its checkpoints
LOW_MEMORY = 4 * GIB  # torch, tiny.en and loader processes
SMALL_SHM = 1 * GIB  # what loader processes pass batches through; containers have 64 MiB by default
SHOWN = ("torch", "transformers", "peft", "accelerate", "soundfile", "av", "numpy")


def check_machine(folder: Path) -> Iterator[Check]:
    """Checks everything that runs on this machine rely on.

    Args:
        folder: folder for unfinished work; it need not exist.

    Yields:
        One result per check, in the order of display.
    """
    for check in (_python, _packages, _device, _arithmetic, _memory, _shared_memory, _cores):
        yield check()
    yield _disk(folder)
    for format_, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", None)):
        yield _decoding(format_, subtype)
    yield _compiler()


def _python() -> Check:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok" if sys.version_info >= (3, 11) else "fail", text)


def _packages() -> Check:
    """Compares installed versions with the ranges required by this distribution."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("moe-asr") or ()]
    except PackageNotFoundError:
        return Check("packages", "note", "moe-asr is not installed as a package, so no versions are required")
    wrong = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                wrong.append(f"{requirement.name} {version(requirement.name)} is not {requirement.specifier}")
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN) if not wrong else "; ".join(wrong)
    return Check("packages", "fail" if wrong else "ok", shown + ("; install moe-asr again" if wrong else ""))


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        seen = shutil.which("nvidia-smi") is not None
        more = "; nvidia-smi exists, but torch sees no GPU: driver older than its CUDA, or none visible" * seen
        return Check("device", "note" if seen else "ok", f"cpu{more}")
    gpus = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        gpus.append(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}")
    precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Check("device", "ok", f"{'; '.join(gpus)}; trains in {precision}; CUDA {torch.version.cuda}")


def _arithmetic() -> Check:
    """Compares a matrix product on the device with one on the CPU in double precision, to detect a broken driver."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a_NN = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    try:
        got_NN = (a_NN.to(device) @ a_NN.to(device)).cpu().double()
    except RuntimeError as error:
        return Check("arithmetic", "fail", f"a product of matrices fails on {device}: {str(error).splitlines()[0]}")
    off = float((got_NN - a_NN.double() @ a_NN.double()).abs().max())
    return Check("arithmetic", "ok" if off < 0.5 else "fail", f"a product on {device} is off by {off:.1e} at most")


def _memory() -> Check:
    """Memory of the machine, or the limit of the container."""
    info = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, amount = line.partition(":")
        info[name] = int(amount.split()[0]) * 1024
    total, free = info["MemTotal"], info["MemAvailable"]
    limit = _control_group("memory.max")
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit) - int(_control_group("memory.current") or 0))
    text = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free"
    low = free < LOW_MEMORY
    return Check("memory", "note" if low else "ok", text + "; a small model and few --num-workers" * low)


def _control_group(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _shared_memory() -> Check:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Check("shared memory", "note", "no /dev/shm: use --num-workers 0")
    small = size < SMALL_SHM
    advice = "; loader processes need more: --shm-size of the container, or --num-workers 0" * small
    return Check("shared memory", "note" if small else "ok", f"/dev/shm has {size / GIB:.2f} GiB{advice}")


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0))
    quota = re.fullmatch(r"(\d+) (\d+)", _control_group("cpu.max"))
    share = int(quota[1]) / int(quota[2]) if quota else float(usable)
    limited = f", of which a container may use {share:g}" if share < usable else ""
    return Check("cores", "ok", f"{usable}{limited}")


def _disk(folder: Path) -> Check:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free at {folder}"
    if not os.access(there, os.W_OK):
        return Check("disk", "fail", f"{there} cannot be written: set MOE_ASR_CACHE to a writable folder")
    if free < LOW_DISK:
        return Check("disk", "fail", f"{text}: too little; set MOE_ASR_CACHE to a larger disk")
    return Check("disk", "note" if free < LITTLE_DISK else "ok", text)


def _decoding(format_: str, subtype: str | None) -> Check:
    """Encodes and decodes a tone in this process, without ffmpeg or other programs of the system."""
    import numpy as np
    import soundfile

    from common.data.audio import read_audio

    rate, pitch = 22_050, 440.0
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(rate) / rate)
    file = io.BytesIO()
    try:
        soundfile.write(file, tone, rate, format=format_, subtype=subtype)
        samples = read_audio(file.getvalue(), name=f"a tone as {format_}")
    except (MoeAsrError, RuntimeError) as error:
        return Check(f"decoding {format_}", "fail", f"{error}; install soundfile again")
    loudest = float(np.argmax(np.abs(np.fft.rfft(samples)))) * 16_000 / len(samples)
    held = abs(loudest - pitch) < 5 and abs(len(samples) - 16_000) < 2_000
    return Check(f"decoding {format_}", "ok" if held else "fail", f"a tone of 440 Hz comes back at {loudest:.0f} Hz")


def _compiler() -> Check:
    compiler = next(
        (path for name in (os.environ.get("CXX") or "c++", "g++", "clang++") if (path := shutil.which(name))), ""
    )
    return Check("compiler", "ok" if compiler else "note", compiler or "no C++ compiler: asr.compile cannot be used")
