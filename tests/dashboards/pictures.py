"""`python -m tests.dashboards.pictures`: the pictures of docs/monitoring.md, from a run of the demo (some minutes).

The stages' series come from the run. Those of GPUs, Kubernetes and Argo are the texts beside this file, with GPU
activity that moves about: on a machine without GPU and cluster there is nothing else to show.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from dashboards.__main__ import DASHBOARDS, ROOT
from dashboards.draw import draw
from tests.dashboards.prometheus import exporters, job, prometheus
from tests.dashboards.test_queries import WORKFLOW, exporter_texts
from tests.servers import free_port

NOTE = "Stage series: a real run. Series of GPUs, Kubernetes and Argo: made up, in their exporters' form."
SMALLER = ("asr.epochs=3", "subsets.asr_samples=120", "subsets.dev_samples=32", "subsets.test_samples=32")


def move_about(texts: dict[str, str], stop: threading.Event) -> None:
    """Changes the GPUs' activity every two seconds; the second one idles for a while."""
    plain, generator, started = dict(texts), random.Random(0), time.monotonic()
    while not stop.wait(2):
        for path in ("/dcgm", "/dcgm-exported"):
            idle = path == "/dcgm-exported" and 60 < time.monotonic() - started < 150
            busy = 0.01 if idle else generator.uniform(0.84, 0.97)
            values = {"0.914": busy, "0.382": 0.42 * busy, "0.417": 0.46 * busy, "512.7": 110 + 430 * busy}
            for old, new in values.items():
                texts[path] = (texts if old != "0.914" else plain)[path].replace(old, f"{new:.3f}")


def main() -> None:
    """Runs the demo beside a Prometheus, and draws."""
    texts, stop, port = exporter_texts(), threading.Event(), free_port()
    mover = threading.Thread(target=move_about, args=(texts, stop))
    mover.start()
    with tempfile.TemporaryDirectory() as name, exporters(texts) as served:
        jobs = [
            job("moe-asr", port, namespace="speech", pod="demo-asr-1"),
            job("dcgm", served, "/dcgm", honor_labels=True),
            job("dcgm-by-default", served, "/dcgm-exported", namespace="gpu-operator", pod="dcgm-exporter-abcde"),
            job("kube-state-metrics", served, "/pods", honor_labels=True),
            job("argo", served, "/argo", namespace="argo", pod="workflow-controller-0"),
        ]
        with prometheus(Path(name), jobs, every="2s") as url:
            time.sleep(8)
            start = time.time()
            command = ["run", "--mode", "demo", "--store", f"{name}/runs", "--metrics-port", str(port), "--quiet"]
            settings = [word for one in SMALLER for word in ("--set", one)]
            subprocess.run(
                [sys.executable, "-c", "from cli.main import main; main()", *command, *settings], check=True, cwd=ROOT
            )
            end = time.time()
            for file, dashboard in DASHBOARDS.items():
                figure = draw(url, dashboard, start, end, workflow=WORKFLOW, note=NOTE)
                figure.savefig(ROOT / "docs" / "images" / f"dashboard-{Path(file).stem}.png", dpi=75)
    stop.set()
    mover.join()


if __name__ == "__main__":
    main()
