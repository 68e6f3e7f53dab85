"""Search for the largest batch that fits into a machine's memory, by trial steps.

Shape letters: B utterances, S samples, U text tokens.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from common.data.batches import Batch
from common.data.features import POSITIONS_PER_SECOND, SAMPLES_PER_POSITION
from common.whisper_limits import MAX_SECONDS

RESERVE = 0.9  # of the memory is used at most: buckets of other shapes leave holes between their blocks


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size in 1…limit that fits, to within an eighth; 0 if 1 does not fit.

    Args:
        fits: called with growing sizes first; must release its memory.
        limit: maximum size to try.
    """
    good, bad = 0, limit + 1
    while good < limit and bad > limit:
        size = min(limit, max(1, 2 * good))
        if fits(size):
            good = size
        else:
            bad = size
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def hardest_batch(rows: int, *, seconds: float, tokens: int, device: torch.device) -> Batch:
    """A batch with the highest memory use: noise of the maximum length with texts of the maximum length."""
    samples = round(seconds * POSITIONS_PER_SECOND) * SAMPLES_PER_POSITION
    audio_BS = 0.1 * torch.randn(rows, samples)
    tokens_BU = torch.randint(0, 200, (rows, tokens))
    batch = Batch(
        ids=tuple(str(row) for row in range(rows)),
        audio_BS=audio_BS,
        valid_B=torch.full((rows,), samples // SAMPLES_PER_POSITION),
        inputs_BU=tokens_BU,
        labels_BU=tokens_BU.clone(),
        row_B=torch.zeros(rows, dtype=torch.int64),
        seconds=rows * seconds,
    )
    return batch.to(device)


def memory_limit(device: torch.device) -> int:
    """Bytes that a training may use: of the GPU's memory, or of the machine's (or container's)."""
    if device.type == "cuda":
        return int(RESERVE * torch.cuda.get_device_properties(device).total_memory)
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            available = min(available, int(text))
    return int(RESERVE * available)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the process in bytes while `work` ran.

    Raises:
        torch.OutOfMemoryError: the GPU did not have enough memory.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: else what earlier trials freed counts as used
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark (proc(5))
    work()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def training_rows(
    step: Callable[[Batch], object], device: torch.device, *, tokens: int, memory: int, limit: int
) -> int:
    """Maximum number of utterances of 30 s in a training step.

    Args:
        step: forward, backward and optimiser step of one batch.
        device: device of the model.
        tokens: text tokens of each utterance.
        memory: maximum number of bytes to use.
        limit: maximum number of utterances to try.
    """
    held: list[tuple[int, int]] = []  # (rows, bytes)

    def fits(rows: int) -> bool:
        if len(held) >= 2 and device.type == "cpu":  # a machine that runs out of memory ends processes: do not try
            (r0, m0), (r1, m1) = held[-2:]
            if m1 + (m1 - m0) / max(1, r1 - r0) * (rows - r1) > memory:
                return False
        batch = hardest_batch(rows, seconds=MAX_SECONDS, tokens=tokens, device=device)
        try:
            peak = peak_memory(lambda: step(batch), device)
        except torch.OutOfMemoryError:
            return False
        if not held or rows > held[-1][0]:
            held.append((rows, peak))
        return peak <= memory

    return largest(fits, limit)
