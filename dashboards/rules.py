"""Recording and alert rules of Prometheus, in the form of its rule files.

dcgm-exporter names the pod that uses a GPU in `pod` or in `exported_pod`, depending on the scrape configuration; the
recording rules accept both and add workflow, stage and shard. Workflows come from kube-state-metrics (`kube_pod_labels`
with the label `workflows.argoproj.io/workflow` allowed), else from a target label `workflow`, else they are `none`.
"""

from typing import Any

from common.telemetry import (
    BUILD_INFO,
    CHECKPOINT_ERRORS,
    DATA_WAIT,
    DONE,
    EVALUATING,
    EXPECTED,
    LOAD,
    LOSS,
    NONFINITE,
    RUNNING,
    STEP,
    STORE_ERRORS,
)

IDLE = 0.05  # activity of the engine below which a GPU counts as idle
GPU_LABELS = "namespace, pod, Hostname, gpu, UUID, GPU_I_ID, modelName"

Rule = dict[str, Any]


def folded(series: str) -> str:
    """A series of dcgm-exporter with the using pod in `namespace` and `pod`, for both scrape configurations."""
    renamed = f'label_replace({series}{{exported_pod!=""}}, "pod", "$1", "exported_pod", "(.+)")'
    renamed = f'label_replace({renamed}, "namespace", "$1", "exported_namespace", "(.+)")'
    return f'max by ({GPU_LABELS}) ({renamed} or {series}{{exported_pod="", pod!=""}})'


def of_stage(vector: str) -> str:
    """The vector with workflow, stage and shard of its pods; pods without a workflow are omitted."""
    return f"{vector} * on (namespace, pod) group_left (workflow, stage, shard) moe_asr:pod_stage:info"


def record(name: str, expr: str) -> Rule:
    """A recording rule."""
    return {"record": name, "expr": expr}


def pods() -> list[Rule]:
    """Workflow and stage of each pod."""
    label = "label_workflows_argoproj_io_workflow"
    # What was known minutes ago stays: a scrape that fails must not move a pod out of its workflow or stage.
    known = f'label_replace(last_over_time(kube_pod_labels{{{label}!=""}}[5m]), "workflow", "$1", "{label}", "(.+)")'
    own = f'label_replace({BUILD_INFO}, "workflow", "none", "workflow", "")'
    at_work = f"(last_over_time({RUNNING}[2m]) == 1)"
    running = f"topk by (namespace, pod) (1, max by (namespace, pod, stage, shard) {at_work})"
    staged = f"moe_asr:pod_workflow:info * on (namespace, pod) group_left (stage, shard) {running}"
    other = f"moe_asr:pod_workflow:info unless on (namespace, pod) {at_work}"
    return [
        record(
            "moe_asr:pod_workflow:info",
            f"max by (namespace, pod, workflow) ({known}) * 0 + 1"
            f" or on (namespace, pod) max by (namespace, pod, workflow) ({own})",
        ),
        record("moe_asr:pod_stage:info", f'{staged} or label_replace({other}, "stage", "none", "", "")'),
    ]


def gpus() -> list[Rule]:
    """dcgm-exporter's series by workflow, stage and shard."""
    plain = {
        "engine_active:ratio": "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
        "tensor_active:ratio": "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        "dram_active:ratio": "DCGM_FI_PROF_DRAM_ACTIVE",
        "power:watts": "DCGM_FI_DEV_POWER_USAGE",
        "xid:code": "DCGM_FI_DEV_XID_ERRORS",
    }
    rules = [record(f"moe_asr:gpu_{name}", of_stage(folded(series))) for name, series in plain.items()]
    for name in ("used", "free"):
        mebibytes = folded(f"DCGM_FI_DEV_FB_{name.upper()}")
        rules.append(record(f"moe_asr:gpu_memory_{name}:bytes", of_stage(f"{mebibytes} * 1048576")))
    # Without profiling counters (vGPU, older cards) there is only the share of time in which some kernel ran.
    utilisation = of_stage(f"{folded('DCGM_FI_DEV_GPU_UTIL')} / 100")
    busy = f"moe_asr:gpu_engine_active:ratio or on (UUID, GPU_I_ID, namespace, pod) ({utilisation})"
    return [
        *rules,
        record("moe_asr:gpu_busy:ratio", busy),
        record("moe_asr:gpu_idle:bool", f"moe_asr:gpu_busy:ratio < bool {IDLE}"),
    ]


def training() -> list[Rule]:
    """Recording rules for ratios that several panels and alerts use."""
    wait, steps = DATA_WAIT, f"{STEP}_sum"
    return [
        record("moe_asr:progress:ratio", f"{DONE} / ({EXPECTED} > 0)"),
        record("moe_asr:data_wait:ratio5m", f"rate({wait}[5m]) / (rate({steps}[5m]) > 0)"),
    ]


def alert(name: str, expr: str, wait: str, severity: str, summary: str, description: str) -> Rule:
    """An alert rule; `wait` is how long it must hold."""
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


WHERE = "{{ $labels.namespace }}/{{ $labels.pod }}"
STAGE = f"stage {{{{ $labels.stage }}}} in {WHERE}"


def gpu_alerts() -> list[Rule]:
    """Alerts for idle and failing GPUs."""
    return [
        alert(
            "MoeAsrGpuIdle",
            f'moe_asr:gpu_busy:ratio{{stage!="none"}} < {IDLE}',
            "10m",
            "warning",
            "A GPU is idle while a stage runs",
            f"GPU {{{{ $labels.gpu }}}} of {{{{ $labels.Hostname }}}} has been under 5% busy for 10 minutes: {STAGE}.",
        ),
        alert(
            "MoeAsrGpuXid",
            "moe_asr:gpu_xid:code > 0 and changes(moe_asr:gpu_xid:code[15m]) > 0",
            "0m",
            "critical",
            "The driver reports a GPU error",
            f"Xid {{{{ $value }}}} on GPU {{{{ $labels.gpu }}}} of {{{{ $labels.Hostname }}}}: {STAGE}.",
        ),
    ]


def training_alerts() -> list[Rule]:
    """Alerts for problems of a training."""
    load = LOAD
    by = "by (namespace, pod, stage, shard)"
    unused = f"count {by} ({load} < on (namespace, pod, stage, shard) group_left () (0.1 / count {by} ({load})))"
    return [
        alert(
            "MoeAsrLoaderBound",
            "moe_asr:data_wait:ratio5m > 0.3",
            "10m",
            "warning",
            "Training waits for its data",
            f"{{{{ $value | humanizePercentage }}}} of the step time is waiting for the loader: {STAGE}. "
            "Raise runtime.num_workers, or the pod's CPUs.",
        ),
        alert(
            "MoeAsrNoProgress",
            f"{RUNNING} == 1 and {EVALUATING} == 0 and changes({DONE}[20m]) == 0 and {RUNNING} offset 20m == 1",
            "5m",
            "warning",
            "A stage makes no progress",
            f"No unit was finished for 20 minutes: {STAGE}.",
        ),
        alert(
            "MoeAsrLossNotFinite",
            f"{LOSS} != {LOSS} or abs({LOSS}) == Inf or increase({NONFINITE}[10m]) > 5",
            "0m",
            "critical",
            "Loss or gradient is not finite",
            f"The loss is not a number, or several gradients in 10 minutes were not: {STAGE}.",
        ),
        alert(
            "MoeAsrExpertCollapse",
            f"(max {by} ({load}) > 0.9 and count {by} ({load}) > 1) or {unused} * 2 >= count {by} ({load})",
            "15m",
            "warning",
            "The experts collapse",
            "One expert has over 90% of the load, or half of them under a tenth of their share: "
            f"{STAGE}. Raise asr.balance_weight.",
        ),
    ]


def platform_alerts() -> list[Rule]:
    """Alerts for problems of the cluster or the store."""
    failed = 'kube_pod_status_phase{phase="Failed"}'
    # Argo keeps failed pods until their workflow is deleted, also those whose retry succeeded.
    recent = f"({failed} == 1 unless on (namespace, pod) ({failed} offset 1h == 1))"
    ours = "on (namespace, pod) group_left (workflow) moe_asr:pod_workflow:info"
    return [
        alert(
            "MoeAsrStoreErrors",
            f"increase({STORE_ERRORS}[10m]) > 0",
            "0m",
            "warning",
            "The store refuses or does not answer",
            f"{{{{ $labels.operation }}}} failed {{{{ $value | humanize }}}} times in 10 minutes: {STAGE}.",
        ),
        alert(
            "MoeAsrCheckpointErrors",
            f"increase({CHECKPOINT_ERRORS}[10m]) > 0",
            "0m",
            "critical",
            "Checkpoints cannot be written",
            f"What is trained from here on would be lost: {STAGE}.",
        ),
        alert(
            "MoeAsrPodsFail",
            f"sum by (namespace, workflow) ({recent} * {ours}) >= 3",
            "0m",
            "warning",
            "Pods of a workflow fail repeatedly",
            "{{ $value }} pods of workflow {{ $labels.workflow }} in {{ $labels.namespace }} have failed "
            "within an hour.",
        ),
    ]


def rule_files() -> dict[str, dict[str, Any]]:
    """File name → content, for helm/moe-asr/rules."""
    recording = (("moe-asr-pods-and-gpus", [*pods(), *gpus()]), ("moe-asr-training", training()))
    alerts = (("gpu", gpu_alerts()), ("training", training_alerts()), ("platform", platform_alerts()))
    return {
        "recording.yaml": {"groups": [{"name": name, "rules": rules} for name, rules in recording]},
        "alerts.yaml": {"groups": [{"name": f"moe-asr-{name}-alerts", "rules": rules} for name, rules in alerts]},
    }
