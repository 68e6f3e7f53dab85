"""Live metrics for Prometheus: every name in one table, one registry per process, a small server.

There is no global state: a `Telemetry` belongs to its creator, and a stage uses a view with the stage's name.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from common import __version__
from common.errors import Preempted

log = logging.getLogger(__name__)

STAGE = ("stage", "shard")  # on every metric of a stage; shard is empty where a stage has one task
STEP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Units are in the name; labels take few values, never the name of a run or a workflow."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = STAGE

    def __str__(self) -> str:
        return self.name


BUILD_INFO = Metric("gauge", "moe_asr_build_info", "1; the versions are in the labels.", ("version", "python", "torch"))
PLAN_TASKS = Metric("gauge", "moe_asr_plan_tasks", "Tasks of the plan: done, todo or stale.", ("status",))
TASKS = Metric(
    "counter", "moe_asr_tasks_total", "Tasks that ended: run, skipped, failed, preempted.", (*STAGE, "result")
)

RUNNING = Metric("gauge", "moe_asr_stage_running", "1 while the stage runs.")
EVALUATING = Metric("gauge", "moe_asr_stage_evaluating", "1 while the stage evaluates on dev or test data.")
STARTED = Metric("gauge", "moe_asr_stage_start_time_seconds", "Start of the stage, in seconds since 1970.")
DONE = Metric("gauge", "moe_asr_progress_units", "Optimiser steps (extract: utterances, cluster: points) done.")
EXPECTED = Metric("gauge", "moe_asr_progress_expected_units", "Expected number of these units in the whole stage.")

SAMPLES = Metric("counter", "moe_asr_samples_total", "Utterances that went through the model.")
AUDIO = Metric("counter", "moe_asr_audio_seconds_total", "Speech in these utterances, without padding.")
PADDED = Metric("counter", "moe_asr_padded_audio_seconds_total", "The same with padding: the input of the encoder.")
TOKENS = Metric("counter", "moe_asr_tokens_total", "Target tokens that carried loss (gating: weighted utterances).")
STEP = Metric("histogram", "moe_asr_step_seconds", "Wall time of an optimiser step, waiting for data included.")
DATA_WAIT = Metric("counter", "moe_asr_data_wait_seconds_total", "Time in which the loop waited for the loader.")
NONFINITE = Metric("counter", "moe_asr_nonfinite_steps_total", "Steps skipped because their gradient was not finite.")

LOSS = Metric("gauge", "moe_asr_loss", "Loss per token, by split.", (*STAGE, "split"))
LEARNING_RATE = Metric("gauge", "moe_asr_learning_rate", "Learning rate of the first parameter group.")
GRADIENT_NORM = Metric("gauge", "moe_asr_gradient_norm", "Norm of the gradient before clipping.")
ENTROPY = Metric("gauge", "moe_asr_router_entropy_nats", "Mean entropy of the router.", (*STAGE, "split"))
BALANCE = Metric("gauge", "moe_asr_router_balance", "Load-balance loss: 1 balanced, the number of experts collapsed.")
LOAD = Metric("gauge", "moe_asr_expert_load_ratio", "Share of the routing weight, on dev.", (*STAGE, "expert"))
WER = Metric(
    "gauge",
    "moe_asr_word_error_ratio",
    "Word error rate, by split, etiology (all: everyone) and model (before, after).",
    (*STAGE, "split", "etiology", "model"),
)
CER = Metric("gauge", "moe_asr_character_error_ratio", "Character error rate, likewise.", WER.labels)

CHECKPOINTS = Metric("counter", "moe_asr_checkpoints_total", "Checkpoints written.")
CHECKPOINT_SECONDS = Metric("counter", "moe_asr_checkpoint_seconds_total", "Time spent on writing them.")
CHECKPOINT_ERRORS = Metric("counter", "moe_asr_checkpoint_errors_total", "Checkpoints that could not be written.")
STORE_REQUESTS = Metric("counter", "moe_asr_store_operations_total", "Calls to the store.", (*STAGE, "operation"))
STORE_SECONDS = Metric("counter", "moe_asr_store_seconds_total", "Time in these calls.", (*STAGE, "operation"))
STORE_BYTES = Metric("counter", "moe_asr_store_bytes_total", "Bytes that these calls moved.", (*STAGE, "operation"))
STORE_ERRORS = Metric("counter", "moe_asr_store_errors_total", "Calls that failed.", (*STAGE, "operation"))

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
MEMORY = Metric(  # collected on request, so not among the instruments
    "gauge",
    "moe_asr_device_memory_bytes",
    "Memory: allocated, peak, reserved by this process; used, total of the device; cpu: resident memory.",
    ("device", "kind"),
)


class Telemetry:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.begun, self.finished = _Tally(), _Tally()  # of scrapes: a registry calls its collectors in this order
        self.registry.register(self.begun)
        self._instruments = {metric.name: _instrument(metric, self.registry) for metric in METRICS}
        ProcessCollector(registry=self.registry)
        self.registry.register(_DeviceMemory())
        self.registry.register(self.finished)
        self.set(BUILD_INFO, 1, version=__version__, python=platform.python_version(), torch=version("torch"))

    def stage(self, name: str, shard: int | None = None) -> StageTelemetry:
        """The view of one stage."""
        return StageTelemetry(self, name, "" if shard is None else str(shard))

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets a gauge."""
        instrument = self._instruments[metric.name]
        assert isinstance(instrument, Gauge)
        (instrument.labels(**labels) if labels else instrument).set(value)

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Adds to a counter; adding nothing makes it appear with 0."""
        instrument = self._instruments[metric.name]
        assert isinstance(instrument, Counter)
        (instrument.labels(**labels) if labels else instrument).inc(amount)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Puts a value into a histogram."""
        instrument = self._instruments[metric.name]
        assert isinstance(instrument, Histogram)
        (instrument.labels(**labels) if labels else instrument).observe(value)

    def begin(self, metric: Metric, **labels: str) -> None:
        """Makes a series appear before it has a value."""
        self._instruments[metric.name].labels(**labels)

    def values(self, **labels: str) -> dict[str, float]:
        """`name{label="value"}` → value of all series with these labels, without these labels and without buckets."""
        values = {}
        for instrument in self._instruments.values():
            for sample in (sample for family in instrument.collect() for sample in family.samples):
                if labels.items() <= sample.labels.items() and not sample.name.endswith(("_bucket", "_created")):
                    rest = [f'{k}="{v}"' for k, v in sorted(sample.labels.items()) if k not in labels]
                    values[sample.name + (f"{{{','.join(rest)}}}" if rest else "")] = sample.value
        return values


class StageTelemetry:
    """The metrics of one stage; its name and shard are added as labels to metrics that have these labels."""

    def __init__(self, telemetry: Telemetry, name: str, shard: str) -> None:
        self.telemetry, self.name, self.shard = telemetry, name, shard

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self.telemetry.set(metric, value, **self._labels(metric), **labels)

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        self.telemetry.add(metric, amount, **self._labels(metric), **labels)

    def observe(self, metric: Metric, value: float) -> None:
        """Puts a value into a histogram."""
        self.telemetry.observe(metric, value, **self._labels(metric))

    def progress(self, done: int, total: int) -> None:
        """Sets the finished and the expected units."""
        self.set(DONE, done)
        self.set(EXPECTED, total)

    def routing(self, load: tuple[float, ...], entropy: float) -> None:
        """Sets the share of each expert and the router's entropy (nats), both on dev."""
        for expert, share in enumerate(load):
            self.set(LOAD, share, expert=str(expert))
        self.set(ENTROPY, entropy, split="dev")

    def error_rates(self, summary: Mapping[str, Any], *, split: str) -> None:
        """Sets WER and CER before and after, overall and by etiology, from a summary (`common.evaluation.score`)."""
        for etiology, rates in {"all": summary, **summary["by_etiology"]}.items():
            for model in ("before", "after"):
                self.set(WER, rates[f"wer_{model}"], split=split, etiology=etiology, model=model)
                self.set(CER, rates[f"cer_{model}"], split=split, etiology=etiology, model=model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Marks the stage as running while the block runs, and counts its result."""
        self.telemetry.begin(STEP, **self._labels(STEP))
        for metric in METRICS:
            if metric.kind == "counter" and metric.labels == STAGE:
                self.add(metric, 0)  # a rate needs to have seen the zero
        for result in ("run", "failed", "preempted"):
            self.add(TASKS, 0, result=result)
        self.set(STARTED, time.time())
        self.set(EVALUATING, 0)
        result = "failed"
        try:
            with self.marked(RUNNING):
                yield
            result = "run"
        except Preempted:
            result = "preempted"
            raise
        finally:
            self.add(TASKS, result=result)
            self.set(EVALUATING, 0)

    @contextmanager
    def marked(self, metric: Metric) -> Iterator[None]:
        """Sets a gauge to 1 while the block runs, and to 0 after it."""
        self.set(metric, 1)
        try:
            yield
        finally:
            self.set(metric, 0)

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Times the writing of a checkpoint, and counts it or its failure."""
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self.add(CHECKPOINT_ERRORS)
            raise
        finally:
            self.add(CHECKPOINT_SECONDS, time.monotonic() - started)
        self.add(CHECKPOINTS)

    def values(self) -> dict[str, float]:
        """Current values of the stage's metrics."""
        return self.telemetry.values(stage=self.name, shard=self.shard)

    def _labels(self, metric: Metric) -> dict[str, str]:
        return {name: value for name, value in (("stage", self.name), ("shard", self.shard)) if name in metric.labels}


@contextmanager
def serving(telemetry: Telemetry, port: int | None, host: str | None, linger: float) -> Iterator[int | None]:
    """Serves the metrics over HTTP while the block runs; a port that is in use is logged and does not stop the run.

    Args:
        port: 0 selects any free port; None serves nothing. Of several processes of one training, only the first serves.
        host: the interface; by default loopback, and all of them inside Kubernetes.
        linger: maximum seconds to wait for one more scrape after the block, if there was a scrape before: otherwise the
            last values would be lost. Not used after an error.

    Yields:
        The port; None if nothing is served.
    """
    if port is None or os.environ.get("RANK", "0") != "0":
        yield None
        return
    host = host or ("0.0.0.0" if "KUBERNETES_SERVICE_HOST" in os.environ else "127.0.0.1")
    try:
        server, thread = start_http_server(port, host, telemetry.registry)
    except OSError as error:
        log.warning(
            "metrics port %s:%d cannot be served (%s): the command goes on without metrics", host, port, error.strerror
        )
        yield None
        return
    log.info("metrics: http://%s:%d/metrics", host, server.server_port)
    try:
        yield server.server_port
        _await_scrape(telemetry, linger)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _await_scrape(telemetry: Telemetry, seconds: float) -> None:
    """Waits for a scrape that begins after this call, if there was a scrape before."""
    begun, until = telemetry.begun.count, time.monotonic() + seconds
    while begun and telemetry.finished.count <= begun and time.monotonic() < until:
        time.sleep(0.1)


class _Tally(Collector):
    """Counts the scrapes."""

    def __init__(self) -> None:
        self.count = 0

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self.count += 1
        yield from ()


class _DeviceMemory(Collector):
    """Collector of device memory, which is read at each scrape."""

    def describe(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily(MEMORY.name, MEMORY.help, labels=MEMORY.labels)]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        (family,) = self.describe()
        for (device, kind), value in device_memory().items():
            family.add_metric([device, kind], value)
        yield family


def device_memory() -> dict[tuple[str, str], float]:
    """(device, kind) → bytes, of the GPUs that this process uses; device `cpu` has the resident memory."""
    memory = {("cpu", "used"): _resident_bytes()}
    torch = sys.modules.get("torch")  # not imported for this: without it no GPU is in use
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():  # or half imported so far
        return memory
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        memory |= {
            (str(number), "allocated"): torch.cuda.memory_allocated(number),
            (str(number), "peak"): torch.cuda.max_memory_allocated(number),
            (str(number), "reserved"): torch.cuda.memory_reserved(number),
            (str(number), "used"): total - free,
            (str(number), "total"): total,
        }
    return memory


def _resident_bytes() -> float:
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - read at each scrape
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0.0


def _instrument(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=STEP_BUCKETS)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, metric.labels, registry=registry)
