"""promtool reads the rules and runs their unit tests (rules_test.yaml)."""

import re
import subprocess
from pathlib import Path

import yaml

from dashboards.rules import rule_files
from tests.dashboards.prometheus import RULES, program

CASES = Path(__file__).with_name("rules_test.yaml")


def promtool(*arguments):
    return subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)


def test_promtool_accepts_the_rules():
    done = promtool("check", "rules", *sorted(RULES.glob("*.yaml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_when_they_should_and_not_otherwise():
    done = promtool("test", "rules", CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires():
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fired = {c["alertname"] for case in cases for c in case.get("alert_rule_test", []) if c["exp_alerts"]}
    alerts = [rule for group in rule_files()["alerts.yaml"]["groups"] for rule in group["rules"]]
    assert fired == {rule["alert"] for rule in alerts}
    assert all(rule["labels"]["severity"] and set(rule["annotations"]) == {"summary", "description"} for rule in alerts)


def test_the_configuration_in_the_docs_is_valid_and_finds_the_rules(tmp_path):
    root = RULES.parents[2]
    text = (root / "docs" / "monitoring.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "prometheus.yml").write_text(block, encoding="utf-8")
    (tmp_path / "helm").symlink_to(root / "helm")
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout
