"""The dashboards and rules that the chart ships, as files."""

import json
from pathlib import Path

import yaml

from dashboards.gpu import GPU
from dashboards.panels import to_json
from dashboards.pipeline import PIPELINE
from dashboards.rules import rule_files
from dashboards.training import TRAINING

DASHBOARDS = {"pipeline.json": PIPELINE, "gpu.json": GPU, "training.json": TRAINING}
CHART = Path("helm/moe-asr")
HEADER = "# Written by `make generate` from dashboards/rules.py: change that.\n"


def generated() -> dict[Path, str]:
    """Path → text of every file."""
    texts = {
        CHART / "dashboards" / name: json.dumps(to_json(dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }
    for name, content in rule_files().items():
        texts[CHART / "rules" / name] = HEADER + yaml.safe_dump(content, sort_keys=False, width=1000)
    return texts
