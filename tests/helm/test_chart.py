"""The chart as a package: it renders, validates, refuses mistakes."""

from __future__ import annotations

import json
import re
import shlex
import tarfile

import pytest
import yaml

from helm import chart
from tests.helm.pods import pods_of
from tests.helm.tools import CHART, KUBERNETES, ROOT

CASES = sorted((CHART / "ci").glob("*-values.yaml"))
VERSION = ("--kube-version", KUBERNETES.removeprefix("v"))

every_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem.removesuffix("-values"))


@every_case
def test_lint_has_nothing_to_say(helm, case):
    done = helm("lint", "--strict", CHART, "--values", case, *VERSION)
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@every_case
def test_every_object_fits_the_schema_of_its_kind(render, problems, case):
    objects = render("--values", case)
    assert {"WorkflowTemplate", "ConfigMap"} <= {manifest["kind"] for manifest in objects}
    assert [problem for thing in objects for problem in problems(thing)] == []


@every_case
def test_every_pod_fits_the_schema_of_pods_once_it_is_patched(render, problems, case):
    pods = pods_of(render("--values", case))
    assert {"plan", "extract-pod", "cluster-pod", "gating-pod", "experts-pod", "asr-pod", "report"} <= pods.keys()
    assert [problem for pod in pods.values() for problem in problems(pod)] == []


def test_schemas_refuse_a_misspelt_property(render, problems):
    for thing in render("--values", CHART / "ci" / "own-store-values.yaml"):
        wrong = thing | {"specs": {}}
        assert problems(wrong), thing["kind"]


@every_case
def test_names_are_unique_and_say_whose_they_are(render, case):
    objects = render("--values", case)
    names = [(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)
    values = yaml.safe_load(case.read_text(encoding="utf-8"))
    name = values.get("workflow", {}).get("name")
    own = [n for _, _, n in names if n not in (name, f"{name}-extend")]
    assert all("moe-asr" in n or "atypical" in n or "speech" in n or "cache" in n for n in own)


def test_the_same_values_give_the_same_text(helm):
    first, second = (helm("template", "speech", CHART, *VERSION).stdout for _ in range(2))
    assert first == second


def test_the_package_is_the_chart(helm, tmp_path):
    helm("package", CHART, "--destination", tmp_path)
    (package,) = tmp_path.glob("moe-asr-*.tgz")
    with tarfile.open(package) as archive:
        names = set(archive.getnames())
    made = [path.relative_to(CHART.parent).as_posix() for path in chart.generated()]
    assert {"moe-asr/Chart.yaml", *made} <= names
    assert not any("/ci/" in name or "pycache" in name for name in names)
    assert helm("template", "r", package, *VERSION).stdout == helm("template", "r", CHART, *VERSION).stdout


REFUSED = [
    ("image.tag=1", "", "image"),
    ("images.tga=x", "/images", "tga"),
    ("images.digests.asr=sha256:12", "/images/digests/asr", "sha256"),
    ("images.digests.base=sha256:12", "/images/digests", "base"),
    ("images.pullPolicy=Sometimes", "/images/pullPolicy", "IfNotPresent"),
    ("store.url=http://store", "/store/url", "http://store"),
    ("stages.asr.memory=64", "/stages/asr", "memory"),
    ("stages.asr.memoryGi=lots", "/stages/asr/memoryGi", "integer"),
    ("gpu.preset=h100", "/gpu/preset", "h100-80"),
    ("gpu.products.h100-80=x", "/gpu/products/h100-80", "array"),
    ("workflow.parallelism=0", "/workflow/parallelism", "1"),
    ("workflow.shmSize=8GB", "/workflow/shmSize", "8GB"),
    ("workflow.extraEnv[0].name=x,workflow.extraEnv[0].vlaue=y", "/workflow/extraEnv/0", "vlaue"),
    ("networkPolicy.store.cidrs[0]=store", "/networkPolicy/store/cidrs/0", "store"),
    ("metrics.podMonitor.enabled=maybe", "/metrics/podMonitor/enabled", "auto"),
    ("cron.schedules=daily", "/cron/schedules", "array"),
    ("config.asr.epoch=3", "/config/asr", "epoch"),
    ("config.asr.epochs=many", "/config/asr/epochs", "integer"),
    ("config.store=s3://b", "/config", "store"),
]


@pytest.mark.parametrize(("setting", "path", "word"), REFUSED, ids=[setting for setting, _, _ in REFUSED])
def test_a_mistake_is_refused_with_its_path(helm, setting, path, word):
    done = helm("template", "r", CHART, *VERSION, "--set", setting, ok=False)
    (line,) = [line for line in done.stderr.splitlines() if f"- at '{path}':" in line]
    assert word in line


@pytest.mark.parametrize("place", ["workflow", "cron"])
def test_a_parameter_that_the_workflow_lacks_is_refused(helm, place):
    done = helm("template", "r", CHART, *VERSION, "--set-string", f"{place}.parameters.retriez=5", ok=False)
    assert f"{place}.parameters.retriez: the workflow has no such parameter; it has mode, config, " in done.stderr


def leaves(tree, path=()):
    """Paths of all values that are no mapping, or an empty one."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield ".".join((*path, name))


def test_every_value_is_documented():
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    documented = [value.path for value in chart.documented_values(text)]
    bare = [p for p in leaves(yaml.safe_load(text)) if not any(p == d or p.startswith(f"{d}.") for d in documented)]
    assert bare == []
    assert len(set(documented)) == len(documented)


def test_schema_and_values_know_the_same_names():
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

    def compare(node, tree, path):
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
        if "properties" not in node or not tree:  # a free mapping, or one whose parts are options
            return
        assert node["additionalProperties"] is False, path
        assert node["properties"].keys() - {"global"} == tree.keys(), path
        for name, value in tree.items():
            if isinstance(value, dict):
                compare(node["properties"][name], value, f"{path}/{name}")

    compare(schema, values, "")


@pytest.mark.parametrize("page", ["README.md", "docs/chart.md", "helm/moe-asr/README.md"])
def test_commands_of_a_page_install_the_template_that_it_submits(helm, tmp_path, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    (install,) = re.findall(r"^ *helm (install .+)$", text, re.MULTILINE)
    values = tmp_path / "my-values.yaml"
    values.write_text("".join(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[:1]), encoding="utf-8")
    places = {"install": "template", "helm/moe-asr": str(CHART), "my-values.yaml": str(values)}
    done = helm(*(places.get(word, word) for word in shlex.split(install)), *VERSION)
    made = {o["metadata"]["name"] for o in yaml.safe_load_all(done.stdout) if o and o["kind"] == "WorkflowTemplate"}
    submitted = set(re.findall(r"workflowtemplate/(\S+)", text))
    assert submitted and submitted <= made


def test_the_chart_can_be_a_part_of_another(helm, tmp_path):
    outer = tmp_path / "outer"
    (outer / "charts").mkdir(parents=True)
    (outer / "charts" / "moe-asr").symlink_to(CHART)
    (outer / "Chart.yaml").write_text("apiVersion: v2\nname: outer\nversion: 1.0.0\n", encoding="utf-8")
    (outer / "values.yaml").write_text("global: {a: 1}\nmoe-asr: {mode: quick}\n", encoding="utf-8")
    assert "kind: WorkflowTemplate" in helm("template", "r", outer, *VERSION).stdout
