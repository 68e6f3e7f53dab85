"""The template that adds experts: memoized apart from its retries, one pod for each speaker."""

import subprocess
import sys

import yaml

from argo.extend import ITEM, to_text
from argo.parameters import EXTEND_PARAMETERS

SPEC = yaml.safe_load(to_text())["spec"]
TEMPLATES = {t["name"]: t for t in SPEC["templates"]}


def test_it_is_built_without_torch():
    code = "import argo.extend, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_of_speakers_is_the_fan_out_and_the_run_comes_after_all():
    tasks = {t["name"]: t for t in TEMPLATES["main"]["dag"]["tasks"]}
    assert tasks["extend"]["withParam"] == "{{tasks.plan.outputs.parameters.extend}}"
    assert {p["name"] for p in tasks["extend"]["arguments"]["parameters"]} == set(ITEM)
    assert tasks["join"]["depends"] == "plan && extend"
    assert {p["name"] for p in SPEC["arguments"]["parameters"]} == set(EXTEND_PARAMETERS)


def test_its_outcome_is_stored_and_posted_as_that_of_the_pipeline():
    container = TEMPLATES[SPEC["onExit"]]["container"]
    assert container["command"][-1] == "outcome"
    variables = {e["name"]: e.get("value") or e["valueFrom"] for e in container["env"]}
    assert variables["MOE_ASR_PARENT"] == "{{workflow.parameters.parent}}"
    assert variables["MOE_ASR_WEBHOOK"]["secretKeyRef"]["key"] == "url"


def test_what_is_memoized_does_not_retry_and_what_retries_is_not_memoized():
    assert "memoize" in TEMPLATES["extend"] and "retryStrategy" not in TEMPLATES["extend"]
    for name in ("plan", "extend-pod", "join"):
        assert "memoize" not in TEMPLATES[name] and "retryStrategy" in TEMPLATES[name]
    assert ["nvidia.com/gpu" in TEMPLATES[name]["podSpecPatch"] for name in ("plan", "extend-pod")] == [False, True]
