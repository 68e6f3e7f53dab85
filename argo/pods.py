"""The pods of the workflow: a template of one container, with its variables, volumes, nodes, resources and retries.

This module imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hera.workflows import (
    DAG,
    Artifact,
    Container,
    EmptyDirVolume,
    Env,
    Parameter,
    RetryStrategy,
    SecretEnv,
    SecretEnvFrom,
    Task,
    WorkflowTemplate,
)
from hera.workflows import models as m

from argo.parameters import GPU_LABEL, Installation, parameter, quantity, template_name
from common import __version__

GPU_RESOURCE = "nvidia.com/gpu"
SCRATCH = "/scratch"
OUTPUTS = f"{SCRATCH}/outputs"
UID = 65532  # the numeric user of the images
SLOTS = 4  # product names that a node affinity can hold

# Retries after the loss of a pod or node, a kill (143 SIGTERM, 137 memory or grace period) and a temporary fault (75).
# 64, 65, 74 and 78 need a correction by the user, other codes of the program. There is no anti-affinity among tries:
# Argo makes it a requirement, and if only one node has the GPUs, a second try would wait forever.
RETRY_EXPRESSION = (
    "asInt(lastRetry.exitCode) in [75, 137, 143] || "
    "(asInt(lastRetry.exitCode) in [-1, 0] && lastRetry.status in ['Error', 'Failed']) || "
    "(lastRetry.status == 'Error' && asInt(lastRetry.exitCode) not in [64, 65, 70, 74, 78])"
)


def container(
    place: Installation,
    name: str,
    image: str,
    command: Sequence[str],
    args: Sequence[str] | None = None,
    *,
    inputs: Sequence[Parameter] = (),
    outputs: Sequence[Parameter | Artifact] = (),
    env: Mapping[str, str] | None = None,
    secrets: Mapping[str, tuple[str, str]] | None = None,
    kind: str = "step",
    gpus: str = "",
    title: str = "",
    deadline: str = "3600",
    metrics: Sequence[m.Prometheus] = (),
) -> None:
    """A template of one container, with the security context of the Pod Security level "restricted".

    Args:
        image: name of the stage whose image it uses.
        secrets: variable → name and key of a Secret, which may be missing.
        kind: group of resource parameters: step, cpu-stage or gpu-stage.
        gpus: number of GPUs; empty for none.
        title: title on Argo's page.
        metrics: metrics that the controller updates at the end of each try.
    """
    Container(
        name=name,
        image=place.image(image),
        image_pull_policy="IfNotPresent",
        command=list(command),
        args=list(args) if args else None,
        inputs=list(inputs) or None,
        outputs=list(outputs) or None,
        env=_env(env or {}) + [_secret(variable, *entry) for variable, entry in (secrets or {}).items()],
        env_from=[SecretEnvFrom(name=place.store_secret, optional=True)],
        labels={"app.kubernetes.io/name": "moe-asr", "app.kubernetes.io/component": name.removesuffix("-pod")}
        | {"kueue.x-k8s.io/queue-name": parameter("queue")},
        annotations=display(title) if title else None,
        volumes=_volumes(),
        affinity=_affinity() if gpus else None,
        tolerations=[m.Toleration(key=GPU_RESOURCE, operator="Exists", effect="NoSchedule")] if gpus else None,
        priority_class_name=place.priority_class or None,
        security_context=m.SecurityContext(
            allow_privilege_escalation=False,
            capabilities=m.Capabilities(drop=["ALL"]),
            read_only_root_filesystem=True,
            run_as_non_root=True,
        ),
        termination_message_policy="FallbackToLogsOnError",
        metrics=list(metrics) or None,
        active_deadline_seconds=deadline,
        retry_strategy=RetryStrategy(
            limit=parameter("retries"),
            retry_policy="Always",
            expression=RETRY_EXPRESSION,
            # No `max_duration`: Argo counts it from the first try's start, and ends a later try at that time too.
            backoff=m.Backoff(duration="10s", factor=2, cap="5m"),
        ),
        pod_spec_patch=_patch(kind, gpus),
    )


def _env(more: Mapping[str, str]) -> list[Env]:
    values = {
        name.upper().replace("-", "_"): parameter(name)
        for name in ("mode", "config", "gpu", "gpus", "settings", "run", "store", "endpoint-url")
    }
    values |= {"WORKFLOW": "{{workflow.namespace}}/{{workflow.name}}", "OUTPUTS": OUTPUTS, **more}
    values |= {"CACHE": f"{SCRATCH}/cache", "TERMINATION_LOG": "/dev/termination-log"}
    plain = {"HOME": SCRATCH, "TMPDIR": SCRATCH, "HF_HOME": f"{SCRATCH}/hub", "MPLCONFIGDIR": f"{SCRATCH}/matplotlib"}
    plain |= {"NUMBA_CACHE_DIR": f"{SCRATCH}/numba"}
    return [Env(name=f"MOE_ASR_{n}", value=v) for n, v in values.items()] + [
        Env(name=n, value=v) for n, v in plain.items()
    ]


def _secret(variable: str, name: str, key: str) -> SecretEnv:
    return SecretEnv(name=f"MOE_ASR_{variable}", secret_name=name, secret_key=key, optional=True)


def _volumes() -> list[EmptyDirVolume]:
    """Volumes of the pod; their sizes are parameters, so that the pod patch sets them."""
    return [
        EmptyDirVolume(name="scratch", mount_path=SCRATCH),
        EmptyDirVolume(name="shm", mount_path="/dev/shm", medium="Memory"),
    ]


def _affinity() -> m.Affinity:
    """Node affinity: GPU nodes with the preset's products; any node for `cpu`."""
    listed = "split(workflow.parameters['gpu-products'], ',')"
    preset = "(fromJSON(workflow.parameters['gpu-table'])[workflow.parameters.gpu] ?? ['none'])"
    products = f"let p = workflow.parameters['gpu-products'] != '' ? {listed} : {preset}"
    values = [f"{{{{={products}; p[{slot} % len(p)]}}}}" for slot in range(SLOTS)]
    operator = "{{=workflow.parameters.gpu == 'cpu' ? 'NotIn' : 'In'}}"
    requirement = m.NodeSelectorRequirement(key=GPU_LABEL, operator=operator, values=values)
    required = m.NodeSelector(node_selector_terms=[m.NodeSelectorTerm(match_expressions=[requirement])])
    return m.Affinity(node_affinity=m.NodeAffinity(required_during_scheduling_ignored_during_execution=required))


def _patch(kind: str, gpus: str) -> str:
    """The pod patch with the quantities, which can be set from parameters only by a patch.

    After a try that ran out of memory, the next try gets twice the memory, from the second retry on four times: few
    nodes have more, and a pod that fits on no node would wait forever.
    """
    memory = (
        f"{{{{=asInt(workflow.parameters['{kind}-memory']) * "
        "(lastRetry.exitCode == '137' ? min(2 ** asInt(retries), 4) : 1)}}Gi"
    )
    requests = {"cpu": quantity(f"{kind}-cpu"), "memory": memory}
    limits = {"memory": memory}
    if gpus:
        limits[GPU_RESOURCE] = f"{{{{=workflow.parameters.gpu == 'cpu' ? '0' : '{gpus}'}}}}"
        if "{{" in gpus:
            limits[GPU_RESOURCE] = "{{=workflow.parameters.gpu == 'cpu' ? 0 : asInt(workflow.parameters.gpus)}}"
    patch = {
        "terminationGracePeriodSeconds": 60,
        "containers": [{"name": "main", "resources": {"requests": requests, "limits": limits}}],
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": quantity("scratch-size")}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity("shm-size")}},
        ],
    }
    return json.dumps(patch)


def memoized(name: str, title: str, *, inputs: Sequence[str], pod_inputs: Sequence[str], locks: Sequence[str]) -> None:
    """A template around the pod template `<name>-pod`: memoization under the input `memo`, and locks.

    Args:
        title: title on Argo's page.
        inputs: names of the template's inputs; `pod_inputs` of those of the pod.
        locks: names of mutexes.
    """
    with DAG(
        name=name,
        inputs=[Parameter(name=input_name) for input_name in inputs],
        outputs=[Parameter(name="result", value_from=m.ValueFrom(parameter="{{tasks.pod.outputs.parameters.result}}"))],
        annotations=display(title),
        memoize=m.Memoize(
            key="{{inputs.parameters.memo}}",
            max_age="8760h",
            cache=m.Cache(config_map=m.LocalObjectReference(name="moe-asr-cache")),
        ),
        synchronization=m.Synchronization(mutexes=[m.Mutex(name=lock) for lock in locks]),
    ):
        arguments = {input_name: f"{{{{inputs.parameters.{input_name}}}}}" for input_name in pod_inputs}
        Task(name="pod", template=f"{name}-pod", arguments=arguments)


def outcome(place: Installation, env: Mapping[str, str] | None = None) -> None:
    """The step after the end of a workflow, which stores its result and posts it."""
    container(
        place,
        "outcome",
        "cluster",
        ["python", "-m", "stages", "outcome"],
        ["{{workflow.status}}", "{{workflow.failures}}"],
        env=env,
        secrets={"WEBHOOK": (place.webhook_secret, "url")},
    )


def display(text: str) -> dict[str, str]:
    """The annotation with the name that Argo's page shows for a step."""
    return {"workflows.argoproj.io/display-name": text}


def output(name: str, default: str | None = None) -> Parameter:
    """An output parameter that the pod writes as a JSON file."""
    return Parameter(name=name, value_from=m.ValueFrom(path=f"{OUTPUTS}/{name}.json", default=default))


def template(name: str, title: str, description: str, place: Installation, **options: Any) -> WorkflowTemplate:
    """An empty template with the common settings: labels, account, rights and deadlines."""
    return WorkflowTemplate(
        name=template_name(name),
        annotations={
            "workflows.argoproj.io/title": title,
            "workflows.argoproj.io/description": description,
        },
        labels={"app.kubernetes.io/name": "moe-asr", "app.kubernetes.io/version": __version__},
        service_account_name=place.service_account,
        security_context=m.PodSecurityContext(
            run_as_non_root=True,
            run_as_user=UID,
            run_as_group=UID,
            fs_group=UID,
            seccomp_profile=m.SeccompProfile(type="RuntimeDefault"),
        ),
        active_deadline_seconds=1_209_600,
        ttl_strategy=m.TTLStrategy(seconds_after_success=604_800, seconds_after_failure=1_209_600),
        pod_gc=m.PodGC(strategy="OnPodSuccess", delete_delay_duration="600s"),
        **options,
    )
