"""Values of parameters and names that would change a pod, or reach kubectl as an option."""

import json
import os
import re
import stat

import pytest
import yaml
from click.testing import CliRunner

from argo.parameters import FLAGS, NUMBERS, PARAMETERS, QUANTITIES, find_problem, quantity
from argo.workflow import to_text
from cli.main import cli
from common.errors import UsageError

SPEC = yaml.safe_load(to_text())["spec"]
PATCHES = {t["name"]: t["podSpecPatch"] for t in SPEC["templates"] if "podSpecPatch" in t}
CRAFTED = [
    '1Gi"}}], "hostPID": true, "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi',
    '1", "limits": {"memory": "1Gi"}}, "securityContext": {"privileged": true}, "x": {"y": "',
    '1"',
    "1\\",
    "1\n",
    "\n1",
    " 1",
    "1 ",
    "1Gi Gi",
    "1gi",
    "1e3",
    "-1",
    "+1",
    "0x10",
    "1.",
    ".5",
    "1..5",
    "1,5",
    "",
    "NaN",
    "١",
    "{{workflow.uid}}",
    "{{=1}}",
    "' + '",
    "true",
    "9" * 5000 + "x",
]


def test_no_crafted_value_reaches_the_patch_of_a_pod(tally):
    values = [value for value in CRAFTED if value != "1"]
    lost = [(name, value) for name in QUANTITIES for value in values if re.search(pattern(name), value)]
    lost += [(n, v) for n in (*QUANTITIES, *NUMBERS) for v in values if v != "0x10" and not find_problem(n, v)]
    lost += [(n, v) for n in FLAGS for v in values if v != "true" and not find_problem(n, v)]
    assert not lost
    tally(len(values) * (2 * len(QUANTITIES) + len(NUMBERS) + len(FLAGS)), len(lost))


def pattern(name):
    """Go's reading of the pattern in a tag, in Python: `$` is the end of the text there, not also a newline's."""
    (expression,) = re.findall(r"matches '(.*?)\$'", quantity(name))
    return rf"{expression}\Z".replace("^", r"\A")


def test_a_parameter_is_in_a_patch_only_where_it_is_checked():
    checked = {quantity(name)[3:-2] for name in QUANTITIES}
    for name, patch in PATCHES.items():
        tags = re.findall(r"\{\{(.*?)\}\}(?!\})", patch)
        assert tags and all(tag.startswith("=") for tag in tags), name
        for tag in tags:
            bare = re.sub(r"asInt\(workflow\.parameters[^)]*\)|workflow\.parameters\.gpu == 'cpu'", "", tag[1:])
            assert tag[1:] in checked or "parameters" not in bare, (name, tag)


def test_defaults_and_plain_values_are_taken():
    for name, (value, _) in PARAMETERS.items():
        assert not find_problem(name, value), name
    for value in ("1", "250m", "1.5", "200Gi", "1Ti", "0"):
        assert not find_problem("scratch-size", value) and re.search(pattern("scratch-size"), value)


def test_who_may_only_refer_to_the_template_chooses_neither_image_nor_account_nor_secret_nor_priority():
    said = json.dumps([SPEC["serviceAccountName"], *(t.get("priorityClassName") for t in SPEC["templates"])])
    for template in SPEC["templates"]:
        container = template.get("container", {})
        said += json.dumps([container.get("image"), container.get("envFrom"), container.get("command")])
    assert "{{" not in said


NAMES = [
    "--kubeconfig=/tmp/mine",
    "-f",
    "--server=https://example.org",
    "-",
    "",
    " ",
    "a b",
    "a,b",
    "a=b",
    "../x",
    "a/b",
]
NAMES += ["run,app=other", "a\n--token=x", "!x", "$(id)", "x;y", "\x00", "é", ".hidden", "a" * 300 + "/"]


@pytest.mark.parametrize("words", [("status", "--cluster"), ("logs", "--cluster")])
def test_no_name_reaches_kubectl_as_an_option(tmp_path, monkeypatch, words, tally):
    seen = tmp_path / "seen"
    program = tmp_path / "kubectl"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>{seen}\necho \'{{"items": []}}\'\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    lost = []
    for name in NAMES:
        done = CliRunner().invoke(cli, [*words, "--", name])
        lost += [] if isinstance(done.exception, UsageError) or done.exit_code == 2 else [name]
        done = CliRunner().invoke(cli, [*words, "-n", name, "fine"]) if name else done
        lost += [] if isinstance(done.exception, UsageError) or done.exit_code == 2 else [f"-n {name}"]
    assert not lost and not seen.exists()
    CliRunner().invoke(cli, [*words, "fine"])
    assert "moe-asr/run=fine" in seen.read_text()
    tally(2 * len(NAMES), len(lost))
