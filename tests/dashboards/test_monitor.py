"""`make monitor`: its configuration is valid, and shows local runs and GPUs as pods of the workflow `none`."""

import subprocess

import yaml

from monitor.__main__ import CONFIG
from tests.dashboards.prometheus import program


def test_promtool_accepts_the_configuration_and_finds_its_rules():
    done = subprocess.run([program("promtool"), "check", "config", CONFIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


def test_runs_have_the_labels_that_the_dashboards_join_by():
    jobs = {job["job_name"]: job for job in yaml.safe_load(CONFIG.read_text())["scrape_configs"]}
    assert all(job["static_configs"][0]["labels"]["namespace"] == "local" for job in jobs.values())
    relabel = jobs["moe-asr"]["relabel_configs"][0]
    assert relabel["target_label"] == "pod" and relabel["replacement"] == "port-$1"
    assert jobs["dcgm-exporter"]["static_configs"][0]["labels"]["pod"] == "port-9470"


def test_the_command_starts_prometheus_on_its_configuration(tmp_path):
    import sys
    import time

    from dashboards.client import ask
    from tests.servers import free_port

    program("prometheus")
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "monitor", "--listen", address, "--data", str(tmp_path / "data")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=CONFIG.parents[1])
    try:
        groups = []
        while not groups:
            assert process.poll() is None
            try:
                groups = ask(f"http://{address}", "rules")["groups"]
            except OSError:
                time.sleep(0.1)
        assert {group["name"] for group in groups} >= {"moe-asr-pods-and-gpus", "moe-asr-gpu-alerts"}
    finally:
        process.terminate()
        process.wait(20)
