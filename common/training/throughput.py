"""Throughput of a training loop, and the time in which the device waited for data."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from common import telemetry
from common.telemetry import StageTelemetry


class TrainBatch(Protocol):
    """Interface of batches for the training loop."""

    @property
    def seconds(self) -> float: ...
    @property
    def weight(self) -> Tensor: ...  # scalar; what the batch's summed loss is divided by
    @property
    def padding(self) -> float: ...
    def __len__(self) -> int: ...
    def part(self, start: int, stop: int) -> Any: ...  # its own type


# What `Throughput.totals` counts.
TOTALS = (
    "samples",
    "audio_seconds",
    "padded_audio_seconds",
    "data_wait_seconds",
    "training_seconds",
    "peak_memory_bytes",
)


class Throughput:
    """Counts the data that passed through the loop and the time of waiting for data, over all attempts of a training.

    An interrupted training continues counting from its checkpoint (`totals`, `restore`). Evaluation is not counted.

    Args:
        processes: number of processes that train together; their throughput is assumed to equal that of this process.
    """

    def __init__(self, device: torch.device, live: StageTelemetry | None = None, processes: int = 1) -> None:
        self.device, self.live, self.processes = device, live, processes
        self.samples = 0
        self.audio = self.slots = self.waited = self.paused = 0.0
        self.earlier = self.peak_memory = 0.0  # seconds and bytes of attempts before this one
        self.started = self._since = self._stepped = time.monotonic()
        self._is_paused = False
        self._waited = 0.0  # within this step: shown when it ends, so that waiting is never more than the steps
        self._tokens = torch.zeros((), device=device)  # read by `publish`, since that waits for the device

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        since = time.monotonic()
        yield
        seconds = time.monotonic() - since
        self.waited, self._waited = self.waited + seconds, self._waited + seconds

    def add(self, batches: Sequence[TrainBatch]) -> None:
        """Counts the batches of one step."""
        samples = self.processes * sum(len(batch) for batch in batches)
        audio = self.processes * sum(batch.seconds for batch in batches)
        slots = self.processes * sum(batch.seconds / max(1e-9, 1 - batch.padding) for batch in batches)
        self.samples, self.audio, self.slots = self.samples + samples, self.audio + audio, self.slots + slots
        if self.live is None:
            return
        for batch in batches:
            self._tokens += self.processes * batch.weight
        now = time.monotonic()
        self.live.observe(telemetry.STEP, now - self._stepped)
        self._stepped = now
        self.live.add(telemetry.DATA_WAIT, self._waited)
        self._waited = 0.0
        for metric, amount in ((telemetry.SAMPLES, samples), (telemetry.AUDIO, audio), (telemetry.PADDED, slots)):
            self.live.add(metric, amount)

    def pause(self) -> None:
        """Stops the clock (evaluation)."""
        self._since, self._is_paused = time.monotonic(), True
        if self.live is not None:
            self.live.set(telemetry.EVALUATING, 1)

    def resume(self) -> None:
        """Starts it again."""
        self._stepped, self._is_paused = time.monotonic(), False
        self.paused += self._stepped - self._since
        if self.live is not None:
            self.live.set(telemetry.EVALUATING, 0)

    @property
    def seconds(self) -> float:
        """Seconds of training in this and earlier attempts, without evaluations."""
        paused = self.paused + (time.monotonic() - self._since if self._is_paused else 0.0)
        return self.earlier + max(1e-9, time.monotonic() - self.started - paused)

    def totals(self) -> dict[str, float]:
        """The counts so far, as JSON, for checkpoints."""
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        peak = max(self.peak_memory, float(memory))
        counts = (self.samples, self.audio, self.slots, self.waited, self.seconds, peak)
        return dict(zip(TOTALS, counts, strict=True))

    def restore(self, totals: Mapping[str, float]) -> None:
        """Restores the counts of a checkpoint; earlier counts of this process are discarded."""
        self.samples, self.audio = int(totals["samples"]), totals["audio_seconds"]
        self.slots, self.waited = totals["padded_audio_seconds"], totals["data_wait_seconds"]
        self.earlier, self.peak_memory = totals["training_seconds"], totals["peak_memory_bytes"]

    def publish(self) -> None:
        """Adds the tokens since the last call to the live metrics; they are counted on the device until then."""
        if self.live is not None:
            self.live.add(telemetry.TOKENS, float(self._tokens))
            self._tokens.zero_()

    def rates(self) -> dict[str, float]:
        """The figures so far.

        Returns:
            samples, audio_seconds and training_seconds, totals over all attempts; samples_per_second and
            audio_seconds_per_second, of training; padding_percent, of the encoder's work; data_wait_percent, of the
            training time; peak_memory_bytes; processes.
        """
        self.publish()
        totals = self.totals()
        seconds = totals["training_seconds"]
        return {
            "samples": float(self.samples),
            "audio_seconds": self.audio,
            "training_seconds": seconds,
            "samples_per_second": self.samples / seconds,
            "audio_seconds_per_second": self.audio / seconds,
            "padding_percent": 100 * (1 - self.audio / self.slots) if self.slots else 0.0,
            "processes": float(self.processes),
            "data_wait_percent": 100 * self.waited / seconds,
            "peak_memory_bytes": totals["peak_memory_bytes"],
        }
