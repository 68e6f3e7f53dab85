"""The workflow of the chart: what argo/workflow.py makes, with the values merged in and nothing else changed."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from argo import extend, workflow
from tests.helm.pods import extension_of, kind_of, parameters_of, pods_of, workflow_of
from tests.helm.tools import CHART

OWN_STORE = ("--values", CHART / "ci" / "own-store-values.yaml")


@pytest.fixture(scope="module")
def plain(render):
    return render()


@pytest.fixture(scope="module")
def rich(render):
    return render(*OWN_STORE)


@pytest.fixture(scope="module")
def original():
    return yaml.safe_load(workflow.to_text())


def templates(workflow):
    return {template["name"]: template for template in workflow["spec"]["templates"]}


def pod_patch(workflow, name):
    return json.loads(templates(workflow)[name]["podSpecPatch"])


def variables(container):
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}


def tags(tree):
    return set(re.findall(r"\{\{.*?\}\}(?!\})", json.dumps(tree["spec"]["templates"])))


@pytest.mark.parametrize(("part", "module"), [(workflow_of, workflow), (extension_of, extend)])
def test_by_default_the_steps_are_those_of_the_generated_file(plain, part, module):
    ours, theirs = templates(part(plain)), templates(yaml.safe_load(module.to_text()))
    assert ours.keys() == theirs.keys()
    for name, template in theirs.items():
        kept = {k: v for k, v in ours[name].items() if k not in ("container", "memoize", "podSpecPatch")}
        assert kept == {k: v for k, v in template.items() if k not in ("container", "memoize", "podSpecPatch")}, name
        if "container" in template:
            assert pod_patch(part(plain), name) == json.loads(template["podSpecPatch"])
            for field in ("image", "command", "args", "securityContext"):
                assert ours[name]["container"].get(field) == template["container"].get(field), (name, field)


def test_argos_own_linter_accepts_workflow_and_clock(argo_lint, rich):
    objects = [workflow_of(rich), extension_of(rich), *kind_of(rich, "CronWorkflow")]
    done = argo_lint(yaml.safe_dump_all(objects))
    assert done.returncode == 0, done.stdout + done.stderr
    objects[0]["spec"]["entrypoint"] = "nowhere"
    assert argo_lint(yaml.safe_dump_all(objects)).returncode != 0


def test_no_tag_of_argo_is_lost_or_changed(plain, rich, original):
    assert tags(workflow_of(plain)) == tags(original)
    gone = {tag for tag in tags(original) - tags(workflow_of(rich)) if "-memory" not in tag}
    assert gone == set()


def test_defaults_of_the_chart_are_those_of_the_workflow(plain, original):
    ours, theirs = parameters_of(workflow_of(plain)), parameters_of(original)
    assert json.loads(ours.pop("gpu-table")) == json.loads(theirs.pop("gpu-table"))
    assert ours == theirs


def test_values_are_the_defaults_of_parameters(rich, original):
    got = parameters_of(workflow_of(rich))
    expected = {
        "mode": "full",
        "gpu": "h200-141",
        "gpus": "4",
        "store": "s3://moe-asr/runs",
        "endpoint-url": "http://store.storage.svc:9000",
        "parallelism": "8",
        "shm-size": "16Gi",
        "scratch-size": "500Gi",
        "queue": "speech",
        "gpu-stage-cpu": "8",
        "gpu-stage-memory": "64",
        "artifacts": "true",
        "verify": "true",
    }
    assert {name: got[name] for name in expected} == expected
    assert workflow_of(rich)["spec"]["serviceAccountName"] == "atypical"
    (hook,) = (e for e in templates(workflow_of(rich))["outcome"]["container"]["env"] if e["name"] == "MOE_ASR_WEBHOOK")
    assert hook["valueFrom"]["secretKeyRef"] == {"key": "url", "name": "hooks", "optional": True}
    priorities = {name: template.get("priorityClassName") for name, template in templates(workflow_of(rich)).items()}
    assert (priorities["plan"], priorities["asr-pod"], priorities["main"]) == ("normal", "high", None)
    table = json.loads(parameters_of(original)["gpu-table"])
    assert json.loads(got["gpu-table"]) == table | {"h200-141": ["NVIDIA-H200-MIG-3g.71gb", "NVIDIA-H200"]}


def test_the_extension_gets_the_same_values_where_it_has_the_parameter(rich):
    ours, theirs = parameters_of(extension_of(rich)), parameters_of(workflow_of(rich))
    shared = ours.keys() & theirs.keys() - {"run"}
    assert {"store", "gpu", "gpu-stage-memory", "scratch-size", "retries", "queue"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_large_numbers_are_printed_in_full(render):
    workflow = workflow_of(render("--set", "workflow.stageDeadlineSeconds=1209600,workflow.deadlineSeconds=12096000"))
    assert parameters_of(workflow)["stage-deadline"] == "1209600"
    assert workflow["spec"]["activeDeadlineSeconds"] == 12096000


def test_the_configuration_is_in_the_workflow_and_in_a_config_map(render):
    from common.config import validate

    objects = render("--values", CHART / "ci" / "aws-values.yaml")
    text = parameters_of(workflow_of(objects))["config"]
    (shown,) = [o for o in kind_of(objects, "ConfigMap") if o["metadata"]["name"].endswith("-config")]
    assert yaml.safe_load(shown["data"]["config.yaml"]) == yaml.safe_load(text)
    config = validate(yaml.safe_load(text))
    assert (config.asr.epochs, config.asr.learning_rate) == (3, 0.0002)
    assert config.corpus.path == "s3://speech-corpora/sap"


def test_images_of_every_pod_come_from_the_registry(render):
    pods = pods_of(render("--values", CHART / "ci" / "aws-values.yaml"))
    for name, pod in pods.items():
        images = {c["image"] for c in pod["spec"]["containers"] if c["name"] != "wait"}
        assert all(re.fullmatch(r"registry\.example\.com/speech/[a-z]+:0\.1\.0-3f2c1ab", i) for i in images), name
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}], name


def test_an_image_with_a_digest_is_used_by_it(render):
    digest = f"sha256:{'1f' * 32}"
    pods = pods_of(render("--set", f"images.digests.cluster={digest},images.tag=v7,store.url=s3://b/p"))
    images = {name: c["image"] for name, pod in pods.items() for c in pod["spec"]["containers"] if c["name"] != "wait"}
    assert images["plan"] == images["cluster-pod"] == images["speech-moe-asr-test-store"] == f"moe-asr/cluster@{digest}"
    assert images["asr-pod"] == images["extension: extend-pod"] == "moe-asr/asr:v7"


def test_without_a_secret_no_stage_gets_one(render):
    objects = render("--set", "store.existingSecret=")
    assert not any("envFrom" in t["container"] for t in templates(workflow_of(objects)).values() if "container" in t)


def test_a_stage_may_differ_and_still_doubles_its_memory(rich):
    workflow = workflow_of(rich)
    asr, experts, cluster = (
        pod_patch(workflow, f"{n}-pod")["containers"][0]["resources"] for n in ("asr", "experts", "cluster")
    )
    assert asr["requests"]["cpu"] == "16"
    assert "{{=128 * (lastRetry.exitCode == '137' ? min(2 **" in asr["limits"]["memory"]
    assert "{{=32 * (" in cluster["requests"]["memory"]
    assert "gpu-stage-memory" in experts["limits"]["memory"]
    assert templates(workflow)["asr-pod"]["nodeSelector"] == {"pool": "large", "zone": "a"}
    assert templates(workflow)["asr-pod"]["priorityClassName"] == "high"


def test_every_pod_of_a_stage_can_be_overridden(render):
    names = [name for name in templates(workflow_of(render())) if name.endswith("-pod")] + ["extend-pod"]
    asked = ",".join(f"stages.{name.removesuffix('-pod')}.memoryGi=77" for name in names)
    objects = render("--set", asked)
    patches = templates(workflow_of(objects)) | templates(extension_of(objects))
    assert all("{{=77 * (" in patches[name]["podSpecPatch"] for name in names)


def test_stages_with_a_gpu_ask_for_the_resource_of_the_values(rich):
    workflow = workflow_of(rich)
    for name in ("extract-pod", "experts-pod", "asr-pod"):
        limits = pod_patch(workflow, name)["containers"][0]["resources"]["limits"]
        assert "nvidia.com/mig-3g.71gb" in limits
        assert "nvidia.com/gpu" not in limits
        assert {t["key"] for t in templates(workflow)[name]["tolerations"]} == {"nvidia.com/gpu", "team", "spot"}
    assert pod_patch(workflow, "plan")["containers"][0]["resources"]["limits"].keys() == {"memory"}
    assert workflow["spec"]["tolerations"] == [{"key": "spot", "operator": "Exists"}]


def test_every_container_gets_what_the_values_add(rich):
    pods = pods_of(rich)
    stages = {name: pod for name, pod in pods.items() if not name.startswith("atypical-test")}
    assert len(stages) == 14
    for name, pod in stages.items():
        (main,) = [c for c in pod["spec"]["containers"] if c["name"] == "main"]
        seen = variables(main)
        assert seen["AWS_CA_BUNDLE"] == "/ca/ca.crt", name
        assert seen["AWS_REGION"] == "us-east-1"
        assert seen["HF_TOKEN"] == {"secretKeyRef": {"name": "hub-token", "key": "HF_TOKEN"}}
        assert {"configMapRef": {"name": "proxy"}} in main["envFrom"]
        assert {"secretRef": {"name": "moe-asr-store", "optional": True}} in main["envFrom"]
        assert "/ca" in {m["mountPath"] for m in main["volumeMounts"]}
        assert {m["name"] for m in main["volumeMounts"]} <= {v["name"] for v in pod["spec"]["volumes"]}
        sizes = {v["name"]: v["emptyDir"].get("sizeLimit") for v in pod["spec"]["volumes"] if "emptyDir" in v}
        assert (sizes["shm"], sizes["scratch"]) == ("16Gi", "500Gi")
        assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "speech"
        assert pod["metadata"]["labels"]["cost-center"] == "42"
        assert pod["spec"]["schedulerName"] == "bin-packing"
        assert pod["spec"]["securityContext"]["runAsUser"] == 10001


def test_what_becomes_of_workflows_and_pods(rich):
    spec = workflow_of(rich)["spec"]
    assert spec["ttlStrategy"] == {"secondsAfterSuccess": 86400, "secondsAfterFailure": 172800}
    assert spec["podGC"] == {"strategy": "OnWorkflowSuccess", "deleteDelayDuration": "60s"}
    assert spec["artifactRepositoryRef"] == {"configMap": "artifact-repositories", "key": "speech"}


def test_memoized_results_have_a_cache_of_their_own(plain, rich, render):
    def caches(objects):
        return {
            t["memoize"]["cache"]["configMap"]["name"]
            for t in workflow_of(objects)["spec"]["templates"]
            if "memoize" in t
        }

    assert caches(plain) == {"team-speech-moe-asr-cache"}
    assert caches(rich) == {"team-atypical-cache"}
    assert caches(render("--values", CHART / "ci" / "bare-values.yaml")) == {"shared-cache"}
    (cache,) = [o for o in kind_of(plain, "ConfigMap") if o["metadata"]["name"] in caches(plain)]
    assert cache["metadata"]["namespace"] == "argo"
    assert cache["metadata"]["labels"]["workflows.argoproj.io/configmap-type"] == "Cache"


def test_the_name_carries_the_version(plain, rich):
    assert workflow_of(plain)["metadata"]["name"] == "speech-moe-asr-0.1.0"
    assert workflow_of(rich)["metadata"]["name"] == "train"


def test_the_clock_starts_the_same_template(rich, plain):
    (cron,) = kind_of(rich, "CronWorkflow")
    assert cron["spec"]["workflowSpec"]["workflowTemplateRef"] == {"name": "train"}
    assert cron["spec"]["workflowSpec"]["arguments"]["parameters"] == [{"name": "run", "value": "weekly"}]
    assert cron["spec"]["schedules"] == ["0 3 * * 0", "30 12 1 * *"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert not kind_of(plain, "CronWorkflow")


def test_extra_objects_are_templates(rich):
    extra = {o["metadata"]["name"]: o for o in kind_of(rich, "ConfigMap") if o["metadata"]["name"].startswith("speech")}
    assert extra.keys() == {"speech-more", "speech-text"}
    assert extra["speech-more"]["data"] == {"of": "atypical"}
