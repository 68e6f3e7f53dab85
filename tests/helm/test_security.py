"""What the release may do, and what may be done to it."""

from __future__ import annotations

import copy

import pytest

from tests.helm.pods import kind_of, pods_of, workflow_of
from tests.helm.tools import CHART

CASES = sorted((CHART / "ci").glob("*-values.yaml"))
every_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem.removesuffix("-values"))


@pytest.fixture(scope="module")
def plain(render):
    return render("--set", "store.url=s3://b/p")


def is_hook(thing):
    return "helm.sh/hook" in thing["metadata"].get("annotations", {})


@every_case
def test_every_pod_passes_restricted_pod_security(render, pod_security, case):
    pods = pods_of(render("--values", case))
    assert len(pods) >= 9
    objections = zip(pods, pod_security(list(pods.values())), strict=True)
    assert {name: objected for name, objected in objections if objected} == {}


def test_the_judge_of_pod_security_objects_to_less(plain, pod_security):
    pod = pods_of(plain)["asr-pod"]
    for spoil, word in (
        (lambda spec: spec.pop("securityContext"), "seccompProfile"),
        (lambda spec: spec["containers"][0].pop("securityContext"), "allowPrivilegeEscalation"),
        (lambda spec: spec["containers"][1]["securityContext"].pop("capabilities"), "capabilities"),
        (lambda spec: spec["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath"),
    ):
        worse = copy.deepcopy(pod)
        spoil(worse["spec"])
        (objections,) = pod_security([worse])
        assert any(word in objection for objection in objections), objections


@every_case
def test_root_file_systems_are_read_only(render, case):
    for name, pod in pods_of(render("--values", case)).items():
        for container in pod["spec"]["containers"]:
            if container["name"] != "wait":  # Argo's own needs to write
                assert container["securityContext"]["readOnlyRootFilesystem"], name


@every_case
def test_no_stage_sees_a_token(render, case):
    objects = render("--values", case)
    spec = workflow_of(objects)["spec"]
    assert spec["automountServiceAccountToken"] is False
    for name, pod in pods_of(objects).items():
        if is_hook(pod):
            continue
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        (main,) = [c for c in pod["spec"]["containers"] if c["name"] == "main"]
        assert not any("serviceaccount" in mount["mountPath"] for mount in main["volumeMounts"]), name
        assert "exec-sa-token" not in {mount["name"] for mount in main["volumeMounts"]}, name


def test_argo_finds_the_executor_and_its_token(plain):
    account = workflow_of(plain)["spec"]["executor"]["serviceAccountName"]
    assert account in {o["metadata"]["name"] for o in kind_of(plain, "ServiceAccount")}
    (token,) = kind_of(plain, "Secret")
    assert token["metadata"]["name"] == f"{account}.service-account-token"
    assert token["metadata"]["annotations"] == {"kubernetes.io/service-account.name": account}
    assert token["type"] == "kubernetes.io/service-account-token"
    assert not token.get("data")


def test_the_executor_may_report_results_and_nothing_else(plain):
    account = workflow_of(plain)["spec"]["executor"]["serviceAccountName"]
    bound = [b for b in kind_of(plain, "RoleBinding") if any(s["name"] == account for s in b["subjects"])]
    (binding,) = bound
    (role,) = [r for r in kind_of(plain, "Role") if r["metadata"]["name"] == binding["roleRef"]["name"]]
    assert role["rules"] == [
        {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}
    ]


def test_stages_have_no_rights_at_all(plain):
    stage = workflow_of(plain)["spec"]["serviceAccountName"]
    bindings = kind_of(plain, "RoleBinding") + kind_of(plain, "ClusterRoleBinding")
    assert not any(subject["name"] == stage for binding in bindings for subject in binding["subjects"])


def test_nothing_outside_of_the_namespace_but_the_cache(plain):
    outside = [o for o in plain if o["metadata"].get("namespace", "team") != "team"]
    assert {(o["kind"], o["metadata"]["namespace"], o["metadata"]["name"]) for o in outside} == {
        (kind, "argo", "team-speech-moe-asr-cache") for kind in ("ConfigMap", "Role", "RoleBinding")
    }
    assert all(is_hook(o) for kind in ("ClusterRole", "ClusterRoleBinding") for o in kind_of(plain, kind))


def test_the_controller_may_write_the_cache_and_read_no_other_config_map(plain):
    (role,) = [r for r in kind_of(plain, "Role") if r["metadata"].get("namespace") == "argo"]
    write, create = role["rules"]
    config_maps = {"apiGroups": [""], "resources": ["configmaps"]}
    assert write == config_maps | {"resourceNames": ["team-speech-moe-asr-cache"], "verbs": ["get", "update"]}
    assert create == config_maps | {"verbs": ["create"]}


def ports(rules):
    return {(port["protocol"], port["port"]) for rule in rules for port in rule["ports"]}


def test_pods_reach_names_the_store_and_the_api_server_only(plain):
    (policy,) = kind_of(plain, "NetworkPolicy")
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert ports(policy["spec"]["egress"]) == {("UDP", 53), ("TCP", 53), ("TCP", 443), ("TCP", 6443)}
    blocks = [peer["ipBlock"] for rule in policy["spec"]["egress"] for peer in rule["to"] if "ipBlock" in peer]
    assert all("169.254.169.254/32" in block.get("except", []) for block in blocks if block["cidr"] == "0.0.0.0/0")


def test_the_policy_applies_to_every_pod(plain):
    (policy,) = kind_of(plain, "NetworkPolicy")
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    for name, pod in pods_of(plain).items():
        assert wanted <= pod["metadata"]["labels"].items(), name


def test_a_narrow_policy_names_its_addresses(render):
    (policy,) = kind_of(render("--values", CHART / "ci" / "own-store-values.yaml"), "NetworkPolicy")
    dns, store, server, extra = policy["spec"]["egress"]
    assert store == {
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "storage"}}}],
        "ports": [{"protocol": "TCP", "port": 9000}],
    }
    assert server == {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [{"protocol": "TCP", "port": 6443}]}
    assert extra["to"] == [{"ipBlock": {"cidr": "192.0.2.7/32"}}]
    assert dns["to"]


ADDRESSES = {
    "": 443,
    "http://s3.local": 80,
    "https://s3.local/": 443,
    "http://10.0.0.5:9000": 9000,
    "https://[fd00::1]:7070": 7070,
}


@pytest.mark.parametrize(("url", "port"), ADDRESSES.items())
def test_the_port_of_the_store_comes_from_its_address(render, url, port):
    (policy,) = kind_of(render("--set", f"store.endpointUrl={url}"), "NetworkPolicy")
    assert policy["spec"]["egress"][1]["ports"] == [{"protocol": "TCP", "port": port}]


def test_the_hub_is_reached_by_option(render):
    (policy,) = kind_of(render("--values", CHART / "ci" / "aws-values.yaml"), "NetworkPolicy")
    _, store, _, hub = policy["spec"]["egress"]
    assert [peer["ipBlock"]["cidr"] for peer in store["to"]] == ["52.219.0.0/16"]
    assert ports([hub]) == {("TCP", 443)}


def test_workload_identity_needs_no_secret(render):
    objects = render("--values", CHART / "ci" / "aws-values.yaml")
    accounts = kind_of(objects, "ServiceAccount")
    (account,) = [a for a in accounts if "eks.amazonaws.com/role-arn" in a["metadata"].get("annotations", {})]
    pod = pods_of(objects)["asr-pod"]
    assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"]
    sources = [source["secretRef"] for c in pod["spec"]["containers"] for source in c.get("envFrom", [])]
    assert all(source["optional"] for source in sources)


def test_what_a_test_makes_goes_with_it(plain):
    hooks = [o for o in plain if is_hook(o)]
    assert {(o["kind"], o["metadata"]["name"].rpartition("test-")[2]) for o in hooks} == {
        ("Pod", "store"), ("Pod", "executor"), ("Pod", "config"), ("Pod", "gpus"),
        ("ServiceAccount", "gpus"), ("ClusterRole", "gpus"), ("ClusterRoleBinding", "gpus"),
    }  # fmt: skip
    for hook in hooks:
        notes = hook["metadata"]["annotations"]
        assert notes["helm.sh/hook"] == "test"
        ends = {"hook-succeeded", "hook-failed"}
        assert set(notes["helm.sh/hook-delete-policy"].split(",")) == {"before-hook-creation"} | ends
        assert set(notes["helm.sh/hook-output-log-policy"].split(",")) == ends


def test_tests_look_where_a_run_would(plain, render):
    pods = pods_of(render("--values", CHART / "ci" / "own-store-values.yaml"))
    (store,) = pods["atypical-test-store"]["spec"]["containers"]
    assert store["command"][:3] == ["python", "-m", "cli.main"]
    assert store["command"][-3:] == ["s3://moe-asr/runs", "--endpoint-url", "http://store.storage.svc:9000"]
    stage, test = pods["cluster-pod"]["spec"], pods["atypical-test-store"]["spec"]
    (main,) = [c for c in stage["containers"] if c["name"] == "main"]
    assert store["envFrom"] == main["envFrom"]
    for field in ("nodeSelector", "tolerations", "schedulerName", "priorityClassName"):
        assert test[field] == stage[field], field
    assert {"/ca"} == {mount["mountPath"] for mount in store["volumeMounts"]} - {"/scratch"}
    assert {mount["name"] for mount in store["volumeMounts"]} == {volume["name"] for volume in test["volumes"]}
    (gpus,) = pods["atypical-test-gpus"]["spec"]["containers"]
    assert gpus["command"][-4:] == ["gpus", "nvidia.com/mig-3g.71gb", "NVIDIA-H200-MIG-3g.71gb", "NVIDIA-H200"]
    executor = pods_of(plain)["speech-moe-asr-test-executor"]["spec"]
    assert executor["serviceAccountName"] == workflow_of(plain)["spec"]["executor"]["serviceAccountName"]
    assert executor["automountServiceAccountToken"] is True
