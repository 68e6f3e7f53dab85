"""A real Prometheus on loopback, and a server of texts in the exporters' form."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_port

RULES = Path(__file__).resolve().parents[2] / "helm" / "moe-asr" / "rules"
CACHE = Path.home() / ".cache" / "moe-asr" / "prometheus"
EVERYTHING = {  # what stands for Grafana's variables
    "namespace": ".*",
    "workflow": ".*",
    "stage": ".*",
    "datasource": "prometheus",
    "gpu_hour_price": "2.5",
    "__range": "10m",
    "__rate_interval": "1m",
    "__interval": "15s",
}


def expand(expr: str, values: Mapping[str, str] = EVERYTHING) -> str:
    """The query with Grafana's variables replaced."""
    for name in sorted(values, key=len, reverse=True):
        expr = expr.replace(f"${{{name}}}", values[name]).replace(f"${name}", values[name])
    return expr


def ask(url: str, path: str, **parameters: str | float) -> Any:
    """The `data` of an answer of the API, at a path below /api/v1/."""
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as answer:
        return json.load(answer)["data"]


def query_range(url: str, expr: str, start: float, end: float, step: float) -> list[tuple[dict, list]]:
    """(labels, points in seconds and values) of every series that has a value that is a number."""
    data = ask(url, "query_range", query=expr, start=start, end=end, step=step)
    series = [
        (result["metric"], [(float(at), float(value)) for at, value in result["values"]]) for result in data["result"]
    ]
    return [(labels, points) for labels, points in series if any(math.isfinite(value) for _, value in points)]


def program(name: str) -> Path:
    """`prometheus` or `promtool`: installed, or unpacked from Debian's package; skips the test where neither can be."""
    if installed := shutil.which(name):
        return Path(installed)
    unpacked = CACHE / "usr" / "bin" / name
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE.parent / "prometheus.lock").open("w") as lock:  # one of pytest's workers unpacks
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not unpacked.is_file():
            unpack()
    return unpacked


def unpack() -> None:
    """Downloads Debian's package into the cache: nothing is installed and no service starts."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        pytest.skip("prometheus is not installed, and this is no Debian to take it from")
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as name:
        folder = Path(name)
        for words in (["download", "prometheus"], ["update"], ["download", "prometheus"]):  # there may be no lists yet
            if not list(folder.glob("*.deb")):
                subprocess.run(["apt-get", *words], cwd=folder, capture_output=True, check=False)
        packages = list(folder.glob("*.deb"))
        if not packages:
            pytest.skip("prometheus is not installed, and apt-get cannot download it")
        subprocess.run(["dpkg", "-x", packages[0], folder / "tree"], check=True)
        shutil.rmtree(CACHE, ignore_errors=True)
        (folder / "tree").rename(CACHE)


@contextmanager
def exporters(texts: Mapping[str, str]) -> Iterator[int]:
    """Serves texts by path (`/dcgm` …); yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = texts[self.path].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def job(name: str, port: int, path: str = "/metrics", *, honor_labels: bool = False, **labels: str) -> dict:
    """A scrape job of one target with these target labels."""
    target = {"targets": [f"127.0.0.1:{port}"], "labels": labels}
    return {"job_name": name, "metrics_path": path, "honor_labels": honor_labels, "static_configs": [target]}


@contextmanager
def prometheus(folder: Path, jobs: list[dict], *, every: str = "500ms") -> Iterator[str]:
    """A Prometheus with this project's rules that scrapes and evaluates so often; yields its URL."""
    binary, port = program("prometheus"), free_port()
    quick = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    config = {"global": quick, "rule_files": [str(RULES / "*.yaml")], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    """Returns once it answers; fails when it ended or a minute has passed."""
    until = time.monotonic() + 60
    while True:
        assert process.poll() is None, "Prometheus ended; see its log"
        try:
            ask(url, "query", query="1")
            return
        except OSError:
            assert time.monotonic() < until, "Prometheus does not answer"
            time.sleep(0.1)
