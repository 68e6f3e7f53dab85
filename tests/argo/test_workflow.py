"""The generated workflow: as the contracts say, and with the keys of a local run."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from argo.parameters import PARAMETERS, PRODUCTS
from argo.submit import submission
from argo.workflow import to_text
from common.config import GPUS, flatten, resolve
from common.errors import UsageError
from common.storage.artifacts import commit, new_attempt
from stages import STAGES

TEXT = to_text()
SPEC = yaml.safe_load(TEXT)["spec"]
TEMPLATES = {t["name"]: t for t in SPEC["templates"]}
LEAVES = [f"{contract.name}-pod" for contract in STAGES]


def test_nothing_here_imports_torch():
    code = "import argo.workflow, argo.submit, argo.progress, stages.__main__, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def tasks():
    return {t["name"]: t for t in TEMPLATES["main"]["dag"]["tasks"]}


def ancestors(name):
    words = [w for w in tasks()[name].get("depends", "").split() if w != "&&"]
    return set(words).union(*(ancestors(word) for word in words))


@pytest.mark.parametrize("contract", STAGES, ids=lambda c: c.name)
def test_a_stage_comes_after_all_that_make_its_inputs_and_its_plan_after_them(contract):
    makers = {other.name for other in STAGES if other.output in contract.inputs}
    plan = tasks()[contract.name]["depends"]
    assert makers <= ancestors(plan)
    assert tasks()[contract.name]["withParam"] == f"{{{{tasks.{plan}.outputs.parameters.{contract.name}}}}}"


@pytest.mark.parametrize("contract", STAGES, ids=lambda c: c.name)
def test_only_stages_with_gpus_ask_for_one_and_for_its_nodes(contract):
    template = TEMPLATES[f"{contract.name}-pod"]
    assert ("nvidia.com/gpu" in template["podSpecPatch"]) == bool(contract.gpus)
    assert ("affinity" in template) == ("tolerations" in template) == bool(contract.gpus)


@pytest.mark.parametrize("contract", STAGES, ids=lambda c: c.name)
def test_tasks_of_a_fan_out_are_told_their_number(contract):
    args = TEMPLATES[f"{contract.name}-pod"]["container"].get("args")
    assert args == (["--shard", "{{inputs.parameters.shard}}"] if contract.fan_out else None)


def test_no_template_both_memoizes_and_retries():
    assert [name for name, t in TEMPLATES.items() if "memoize" in t] == [contract.name for contract in STAGES]
    assert all("retryStrategy" not in t for t in TEMPLATES.values() if "memoize" in t)
    assert all("retryStrategy" in TEMPLATES[name] for name in LEAVES)


def test_items_of_a_fan_out_have_no_condition_and_do_not_fail_fast():
    assert TEMPLATES["main"]["dag"]["failFast"] is False
    assert [name for name, task in tasks().items() if "when" in task and "withParam" in task] == []


def test_every_pod_is_restricted_and_writes_only_to_its_scratch_folder():
    assert SPEC["securityContext"]["runAsNonRoot"] and SPEC["securityContext"]["runAsUser"] > 0
    assert SPEC["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for template in TEMPLATES.values():
        if "container" in template:
            context = template["container"]["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert [m["mountPath"] for m in template["container"]["volumeMounts"]] == ["/scratch", "/dev/shm"]


def test_every_parameter_is_used_and_every_used_one_is_declared():
    used = set(re.findall(r"\{\{workflow\.parameters\.([\w-]+)\}\}", TEXT))
    used |= set(re.findall(r"workflow\.parameters\[''([\w-]+)''\]", TEXT))
    used |= set(re.findall(r"workflow\.parameters\.(\w+)[ \]]", TEXT))
    assert used == set(PARAMETERS)


def test_every_preset_has_its_nodes():
    assert set(PRODUCTS) == set(GPUS)


def test_argos_own_linter_accepts_it(argo_lint):
    done = argo_lint(TEXT)
    assert done.returncode == 0, done.stdout + done.stderr


def local_config(tmp_path, micro_model, tones, **options):
    file = tmp_path / "my.yaml"
    tree = {
        "run": "micro",
        "corpus": {"path": str(tones)},
        "model": {"name": str(micro_model)},
        "num_experts": 2,
        "subsets": {"embeddings_percent": 100},
        "asr": {"pretrain": "alone"},
    }
    file.write_text(yaml.safe_dump(tree))
    store = tmp_path / "store"
    return file, resolve(None, file=file, gpu="h100-80", options={"store": str(store)} | options)


def in_a_pod(monkeypatch, parameters, outputs):
    """Sets the variables that the workflow sets."""
    container = TEMPLATES["plan"]["container"]
    defaults = {name: value for name, (value, _) in PARAMETERS.items()} | parameters
    for entry in container["env"]:
        if entry["name"].startswith("MOE_ASR_"):
            name = entry["value"].removeprefix("{{workflow.parameters.").removesuffix("}}")
            monkeypatch.setenv(entry["name"], defaults.get(name, entry["value"]))
    monkeypatch.setenv("MOE_ASR_OUTPUTS", str(outputs))
    monkeypatch.setenv("MOE_ASR_CACHE", str(outputs.parent / "cache"))


@pytest.fixture
def planned(tmp_path, monkeypatch, micro_model, tones):
    """(lists that the workflow's plan hands on, configuration of the local runner)."""
    from stages.pod import plan_stage

    file, config = local_config(tmp_path, micro_model, tones)
    in_a_pod(monkeypatch, submission(config, mode=None, file=file, gpu="h100-80"), tmp_path / "outputs")
    plan_stage("")
    return {c.name: json.loads((tmp_path / "outputs" / f"{c.name}.json").read_text()) for c in STAGES}, config


def test_the_workflow_has_the_local_runners_keys(planned):
    from stages.local_runner import Run

    lists, config = planned
    local = {(p.task.contract.name, p.task.key.digest) for p in Run(config).plan().planned}
    assert {(name, item["key"]) for name, items in lists.items() for item in items} == local
    assert len(local) == 3  # extract, cluster, gating; the number of experts is not known yet


def test_a_plan_that_verifies_leaves_no_altered_artifact_to_its_stages_and_later_plans(planned, tmp_path, monkeypatch):
    from stages.local_runner import Run
    from stages.pod import plan_stage

    run = Run(planned[1])
    key = run.plan().planned[0].task.key
    folder = new_attempt(run.store, key, tmp_path)
    (folder / "weights").write_bytes(b"made")
    commit(run.store, key, folder, started=0.0, seconds=1.0)
    (folder / "weights").write_bytes(b"meat")
    plan_stage("")
    assert run.plan().planned[0].status == "done"
    monkeypatch.setenv("MOE_ASR_VERIFY", "true")
    plan_stage("")
    assert run.plan().planned[0].status == "todo"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"asr.epochs": 7, "asr.batch_size": 3},
        {"lora.targets": ["fc1"], "audio.margin": 100},
        {"subsets.asr_samples": None},
    ],
    ids=["none", "numbers", "lists", "null"],
)
def test_pods_come_to_the_same_configuration_as_the_command_line(tmp_path, monkeypatch, micro_model, tones, options):
    from stages.pod import config_from_variables

    file, config = local_config(tmp_path, micro_model, tones, **options)
    in_a_pod(monkeypatch, submission(config, mode=None, file=file, gpu="h100-80"), tmp_path / "outputs")
    assert dict(flatten(config_from_variables().model_dump())) == dict(flatten(config.model_dump()))


@pytest.mark.parametrize("path", ["store", "corpus.path", "model.name"])
def test_places_that_pods_cannot_see_are_refused(path):
    options = {"store": "s3://b/r", "corpus.path": "s3://b/c", "model.name": "s3://b/m"} | {path: "some/where/else"}
    with pytest.raises(UsageError, match=f"{path}.*place on this machine"):
        submission(resolve("full", options=options), mode="full", file=None, gpu="h100-80")


def test_a_store_inside_of_the_pod_is_refused(monkeypatch):
    from stages.pod import config_from_variables

    monkeypatch.setenv("MOE_ASR_STORE", "runs")
    with pytest.raises(UsageError, match="would vanish with its pod"):
        config_from_variables()


def test_a_store_may_be_named_in_the_configuration_alone(monkeypatch):
    from stages.pod import config_from_variables

    monkeypatch.setenv("MOE_ASR_CONFIG", "store: s3://bucket/runs")
    assert config_from_variables().store == "s3://bucket/runs"
