"""The workflow template, built with Hera from the stages' contracts: `make argo` writes it to
argo/moe-asr.yaml.

    plan ─▶ extract ─▶ plan-cluster ─▶ cluster ─▶ plan-gating ─▶ gating
            ─▶ plan-experts ─▶ experts (one pod each) ─▶ plan-asr ─▶ asr ─▶ report
    plan ─▶ shared ─▶ plan-experts  (where routed experts build on a shared one, beside extract to gating)

A plan step looks at the manifests in the store and hands on a list with one small item per piece of a stage; a stage
that a configuration does not need gets an empty list. Each piece is memoized under a name that changes when its
artifact is gone, holds a lock on its key, and retries inside of both: in Argo 4.0.2 a template that both memoizes and
retries hangs on a cache hit.

This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hera.workflows import (
    DAG,
    Artifact,
    Container,
    EmptyDirVolume,
    Env,
    NoneArchiveStrategy,
    Parameter,
    RetryStrategy,
    SecretEnv,
    SecretEnvFrom,
    Task,
    WorkflowTemplate,
)
from hera.workflows import models as m

from argo.parameters import GPU_LABEL, PARAMETERS, Installation, parameter, quantity
from common import __version__
from common.pipeline.contract import Contract
from stages import STAGES

UID = 65532  # the numeric user of the images
GPU_RESOURCE = "nvidia.com/gpu"
SCRATCH = "/scratch"
OUTPUTS = f"{SCRATCH}/outputs"
ITEM = ("shard", "key", "memo", "lock", "lane")  # what the plan says of one piece
POD_INPUTS = ("shard", "key", "memo", "model")
MODEL = "{{inputs.parameters.model}}"  # digest of the base model, known from the first plan on
SLOTS = 4  # product names that a node affinity can hold

# Tries again after the loss of a pod or node, a kill (143 told, 137 memory or grace period) and a passing fault (75).
# 64, 65, 74 and 78 are for the user to mend, anything else for us. There is no anti-affinity among tries: Argo makes it
# a requirement, and where one node alone has the GPUs a second try would wait for ever.
RETRY_EXPRESSION = (
    "asInt(lastRetry.exitCode) in [75, 137, 143] || "
    "(asInt(lastRetry.exitCode) in [-1, 0] && lastRetry.status in ['Error', 'Failed']) || "
    "(lastRetry.status == 'Error' && asInt(lastRetry.exitCode) not in [64, 65, 70, 74, 78])"
)


def build(place: Installation | None = None) -> WorkflowTemplate:
    """The whole template."""
    place = place or Installation()
    with WorkflowTemplate(
        name=f"moe-asr-{__version__}",
        annotations={
            "workflows.argoproj.io/title": "Mixtures of LoRA experts on Whisper",
            "workflows.argoproj.io/description": "extract, cluster, gating, experts, asr and a report (moe-asr)",
        },
        labels={"app.kubernetes.io/name": "moe-asr", "app.kubernetes.io/version": __version__},
        entrypoint="main",
        on_exit="outcome",
        arguments=[Parameter(name=n, value=v, description=d) for n, (v, d) in PARAMETERS.items()],
        workflow_metadata=m.WorkflowMetadata(
            labels={"app.kubernetes.io/name": "moe-asr", "moe-asr/run": parameter("run")},
            annotations={
                "workflows.argoproj.io/title": f"moe-asr {parameter('mode')} {parameter('run')}",
                "workflows.argoproj.io/description": f"results in {parameter('store')}",
            },
        ),
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
    ) as template:
        _plan(place)
        for contract in STAGES:
            _stage_pod(contract, place)
            _stage(contract)
        _report(place)
        _publish(place)
        _outcome(place)
        _main()
    return template


def _main() -> None:
    """The order of things: each stage after the plan that names its pieces, each plan after what the stage reads."""
    made_by = {contract.output: contract.name for contract in STAGES}
    with DAG(name="main", fail_fast=False):
        model = "{{tasks.plan.outputs.parameters.model}}"
        Task(name="plan", template="plan", arguments={"stage": "", "model": ""})
        for contract in STAGES:
            earlier = [made_by[name] for name in contract.inputs]
            planner = f"plan-{contract.name}" if earlier else "plan"
            if earlier:
                stage = {"stage": contract.name, "model": model}
                Task(name=planner, template="plan", arguments=stage, depends=" && ".join(["plan", *earlier]))
            Task(
                name=contract.name,
                template=contract.name,
                depends=planner,
                with_param=f"{{{{tasks.{planner}.outputs.parameters.{contract.name}}}}}",
                arguments={name: f"{{{{item.{name}}}}}" for name in ITEM} | {"model": model},
            )
        every = " && ".join(["plan", *(contract.name for contract in STAGES)])
        Task(name="report", template="report", arguments={"model": model}, depends=every)
        Task(
            name="publish",
            template="publish",
            arguments={"model": model},
            depends="report",
            when=f"{parameter('artifacts')} == true",
        )


def _stage(contract: Contract) -> None:
    """Memoize and lock around a stage's pod."""
    inputs = [Parameter(name=name) for name in (*ITEM, "model")]
    with DAG(
        name=contract.name,
        inputs=inputs,
        outputs=[Parameter(name="result", value_from=m.ValueFrom(parameter="{{tasks.pod.outputs.parameters.result}}"))],
        annotations=_display(contract.name + (" {{inputs.parameters.shard}}" if contract.fan_out else "")),
        memoize=m.Memoize(
            key="{{inputs.parameters.memo}}",
            max_age="8760h",
            cache=m.Cache(config_map=m.LocalObjectReference(name="moe-asr-cache")),
        ),
        synchronization=m.Synchronization(mutexes=_locks(contract)),
    ):
        Task(
            name="pod",
            template=f"{contract.name}-pod",
            arguments={name: f"{{{{inputs.parameters.{name}}}}}" for name in POD_INPUTS},
        )


def _locks(contract: Contract) -> list[m.Mutex]:
    """One on the key: no two workflows make the same thing; one on the lane: only so many pieces at once."""
    locks = [m.Mutex(name="moe-asr-{{inputs.parameters.lock}}")]
    if contract.fan_out:
        locks.append(m.Mutex(name=f"{{{{workflow.uid}}}}-{contract.name}-{{{{inputs.parameters.lane}}}}"))
    return locks


def _stage_pod(contract: Contract, place: Installation) -> None:
    """The pod of one piece of a stage, with retries."""
    inputs = [Parameter(name=name) for name in POD_INPUTS]
    args = ["--shard", "{{inputs.parameters.shard}}"] if contract.fan_out else None
    env = {"MEMO": "{{inputs.parameters.memo}}", "MODEL": MODEL}
    gpus = parameter("gpus") if contract.together else str(contract.gpus)
    _container(
        place,
        f"{contract.name}-pod",
        contract.section,
        ["python", "-m", "stages", contract.name],
        args,
        inputs=inputs,
        outputs=[_output("result")],
        env=env,
        kind="gpu-stage" if contract.gpus else "cpu-stage",
        gpus=gpus if contract.gpus else "",
        display=contract.summary,
        deadline=parameter("stage-deadline"),
        metrics=_stage_metrics(contract.name),
    )


def _plan(place: Installation) -> None:
    """Which pieces the stages have: on a CPU, before each of them."""
    _container(
        place,
        "plan",
        "cluster",
        ["python", "-m", "stages", "plan"],
        ["--stage", "{{inputs.parameters.stage}}"],
        inputs=[Parameter(name="stage"), Parameter(name="model")],
        outputs=[_output(contract.name, default="[]") for contract in STAGES] + [_output("model", default="")],
        env={"MODEL": MODEL, "NONCE": "{{workflow.uid}}", "PARALLELISM": parameter("parallelism")}
        | {name: parameter(name.lower()) for name in ("RESUME", "VERIFY")},
    )


def _report(place: Installation) -> None:
    _container(
        place,
        "report",
        "cluster",
        ["python", "-m", "stages", "report"],
        inputs=[Parameter(name="model")],
        outputs=[_output("wer-before"), _output("wer-after")],
        env={"MODEL": MODEL, "STARTED": "{{workflow.creationTimestamp.s}}"},
        metrics=[_rate(model) for model in ("before", "after")],
    )


def _publish(place: Installation) -> None:
    """The report once more, as Argo artifacts; apart from `report` since it needs an artifact repository."""
    files = {name: f"{OUTPUTS}/{name}" for name in ("report.html", "summary.json")}
    _container(
        place,
        "publish",
        "cluster",
        ["python", "-m", "stages", "report"],
        inputs=[Parameter(name="model")],
        outputs=[
            Artifact(name=name.partition(".")[0], path=p, archive=NoneArchiveStrategy()) for name, p in files.items()
        ],
        env={"MODEL": MODEL, "STARTED": "{{workflow.creationTimestamp.s}}"},
    )


def _outcome(place: Installation) -> None:
    _container(
        place,
        "outcome",
        "cluster",
        ["python", "-m", "stages", "outcome"],
        ["{{workflow.status}}", "{{workflow.failures}}"],
        secrets={"WEBHOOK": (place.webhook_secret, "url")},
    )


def _container(
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
    display: str = "",
    deadline: str = "3600",
    metrics: Sequence[m.Prometheus] = (),
) -> None:
    """A template of one container, as careful administrators let it run.

    Args:
        image: name of the stage whose image it uses.
        secrets: variable → name and key of a Secret, which may be missing.
        kind: which of the resource parameters it takes: step, cpu-stage or gpu-stage.
        gpus: how many; empty for none.
        metrics: that the controller counts at the end of each try.
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
        annotations=_display(display) if display else None,
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
    """Their sizes are parameters, so the pod patch sets them."""
    return [
        EmptyDirVolume(name="scratch", mount_path=SCRATCH),
        EmptyDirVolume(name="shm", mount_path="/dev/shm", medium="Memory"),
    ]


def _affinity() -> m.Affinity:
    """GPU nodes of the preset's products; any node for `cpu`."""
    listed = "split(workflow.parameters['gpu-products'], ',')"
    preset = "(fromJSON(workflow.parameters['gpu-table'])[workflow.parameters.gpu] ?? ['none'])"
    products = f"let p = workflow.parameters['gpu-products'] != '' ? {listed} : {preset}"
    values = [f"{{{{={products}; p[{slot} % len(p)]}}}}" for slot in range(SLOTS)]
    operator = "{{=workflow.parameters.gpu == 'cpu' ? 'NotIn' : 'In'}}"
    found = m.NodeSelectorRequirement(key=GPU_LABEL, operator=operator, values=values)
    required = m.NodeSelector(node_selector_terms=[m.NodeSelectorTerm(match_expressions=[found])])
    return m.Affinity(node_affinity=m.NodeAffinity(required_during_scheduling_ignored_during_execution=required))


def _patch(kind: str, gpus: str) -> str:
    """What only a patch can take from parameters: quantities.

    After a try that ran out of memory the next gets twice as much, from the second retry on four times: more than that
    few nodes have, and a pod that fits nowhere waits without an end.
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


def _stage_metrics(stage: str) -> list[m.Prometheus]:
    """How long tries take and how they end. No label names a workflow: each would be a series of its own."""
    labels = [m.MetricLabel(key="stage", value=stage), m.MetricLabel(key="status", value="{{status}}")]
    seconds = m.Gauge(realtime=False, value="{{duration}}")
    return [
        m.Prometheus(name="moe_asr_try_seconds", help="Seconds of the last try.", labels=labels, gauge=seconds),
        m.Prometheus(name="moe_asr_tries_total", help="Finished tries.", labels=labels, counter=m.Counter(value="1")),
    ]


def _rate(model: str) -> m.Prometheus:
    return m.Prometheus(
        name="moe_asr_final_word_error_ratio",
        help="Held-out word error rate of the last finished run.",
        labels=[m.MetricLabel(key="model", value=model)],
        gauge=m.Gauge(realtime=False, value=f"{{{{outputs.parameters.wer-{model}}}}}"),
        when="{{status}} == Succeeded",
    )


def _output(name: str, default: str | None = None) -> Parameter:
    return Parameter(name=name, value_from=m.ValueFrom(path=f"{OUTPUTS}/{name}.json", default=default))


def _display(text: str) -> dict[str, str]:
    return {"workflows.argoproj.io/display-name": text}


def to_text(place: Installation | None = None) -> str:
    """The YAML file, with a first line that says where it comes from."""
    text: Any = build(place).to_yaml()
    return f"# Generated by `make argo` from the stages' contracts: change argo/workflow.py instead.\n{text}"
