"""`python -m dashboards`: writes the dashboards and rules that the chart ships, and two tables of the docs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import yaml

from common.telemetry import MEMORY, METRICS, STAGE
from dashboards.gpu import GPU
from dashboards.panels import to_json
from dashboards.pipeline import PIPELINE
from dashboards.rules import rule_files
from dashboards.training import TRAINING

DASHBOARDS = {"pipeline.json": PIPELINE, "gpu.json": GPU, "training.json": TRAINING}
ROOT = Path(__file__).resolve().parent.parent
CHART, DOCUMENT = Path("helm/moe-asr"), Path("docs/monitoring.md")
HEADER = "# Written by `make dashboards` from dashboards/rules.py: change that.\n"


def generated() -> dict[Path, str]:
    """Path → text of every generated file."""
    texts = {
        CHART / "dashboards" / name: json.dumps(to_json(dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }
    for name, content in rule_files().items():
        texts[CHART / "rules" / name] = HEADER + yaml.safe_dump(content, sort_keys=False, width=1000)
    document = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    for name, rows in (("metrics", metric_rows()), ("alerts", alert_rows())):
        before, rest = document.split(f"<!-- {name} -->\n")
        document = "\n".join([f"{before}<!-- {name} -->", *rows, f"<!-- /{name} -->"])
        document += rest.partition(f"<!-- /{name} -->")[2]
    return texts | {DOCUMENT: document}


def metric_rows() -> list[str]:
    """The table of all metrics, in Markdown."""
    rows = ["| metric | kind | further labels | |", "|---|---|---|---|"]
    for metric in (*METRICS, MEMORY):
        labels = ", ".join(label for label in metric.labels if label not in STAGE)
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return rows


def alert_rows() -> list[str]:
    """The table of all alerts, in Markdown."""
    rows = ["| alert | severity | after | |", "|---|---|---|---|"]
    for rule in (rule for group in rule_files()["alerts.yaml"]["groups"] for rule in group["rules"]):
        summary = rule["annotations"]["summary"]
        rows.append(f"| `{rule['alert']}` | {rule['labels']['severity']} | {rule['for']} | {summary}. |")
    return rows


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail where a file is not as it would be written.")
def main(check: bool) -> None:
    """Writes dashboards and rules into the chart, and the tables of docs/monitoring.md."""
    stale = []
    for name, text in generated().items():
        path = ROOT / name
        if check:
            stale += [str(name)] if not path.is_file() or path.read_text(encoding="utf-8") != text else []
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"not as `make dashboards` writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
