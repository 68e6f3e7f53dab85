"""The dashboard "Pipeline": progress of runs, failures, and the store."""

from common import telemetry
from dashboards.panels import Dashboard, Panel, PanelRow, Query
from dashboards.promql import RATE, by_workflow, controller, gauge, rate, selected

UNITS = selected(telemetry.DONE)
LEFT = f"({selected(telemetry.EXPECTED)} - {UNITS})"
PHASES = by_workflow('kube_pod_status_phase{namespace=~"$namespace"}')
FAILED = by_workflow('kube_pod_status_phase{namespace=~"$namespace",phase="Failed"}')
ENDED = 'phase=~"Succeeded|Failed|Error"'
TASKS = f"sum by (stage, result) (max_over_time({selected(telemetry.TASKS)}[$__range]))"
FIRING = 'sum by (alertname, severity) (ALERTS{alertname=~"MoeAsr.+",alertstate="firing"})'

RUNS = PanelRow(
    "Runs",
    (
        Panel(
            "Workflows by phase",
            "Workflows that the cluster holds now, as Argo's controller counts them.",
            "short",
            (Query("sum by (phase) (argo_workflows_gauge)", "{{phase}}"),),
            kind="stat",
            width=12,
        ),
        Panel(
            "Workflows that ended",
            "Workflows that succeeded or failed in the chosen time, by Argo's counter.",
            "short",
            (Query(f"sum by (phase) ({controller('argo_workflows_total_count', ENDED)})", "{{phase}}"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Alerts firing",
            "Alerts of this project that fire now; none is a single 0.",
            "short",
            (Query(f'{FIRING} or label_replace(vector(0), "alertname", "none", "", "")', "{{alertname}}"),),
            kind="stat",
            width=6,
        ),
    ),
)

STAGES = PanelRow(
    "Stages",
    (
        Panel(
            "Stages running",
            "Stages and shards at work now, by workflow.",
            "short",
            (Query(f"sum by (workflow, stage) ({gauge(telemetry.RUNNING)})", "{{workflow}} {{stage}}"),),
            extra={"min": 0, "decimals": 0},
        ),
        Panel(
            "Progress",
            "Share of the stage's units (optimiser steps; utterances of extract) that is done.",
            "percentunit",
            (Query(gauge("moe_asr:progress:ratio"), "{{workflow}} {{stage}} {{shard}}"),),
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "Time left",
            "Estimated time remaining of each stage, at the pace of the last ten minutes.",
            "s",
            (
                Query(
                    by_workflow(f"({LEFT} / (deriv({UNITS}[10m]) > 0))"),
                    "{{workflow}} {{stage}} {{shard}}",
                ),
            ),
            extra={"min": 0},
        ),
        Panel(
            "Time so far",
            "Elapsed time of each running stage.",
            "s",
            (
                Query(
                    by_workflow(f"(time() - {selected(telemetry.STARTED)} and {selected(telemetry.RUNNING)} == 1)"),
                    "{{workflow}} {{stage}} {{shard}}",
                ),
            ),
        ),
        Panel(
            "Plan",
            "Tasks of the newest plan: done ones are skipped, `stale` ones are recomputed as an input changed.",
            "short",
            (Query(by_workflow(f'{telemetry.PLAN_TASKS}{{namespace=~"$namespace"}}'), "{{workflow}} {{status}}"),),
            extra={"min": 0, "decimals": 0},
        ),
        Panel(
            "Tasks by result",
            "How tasks ended in the chosen time. `skipped` found their artifact in the store; on a cluster, they start "
            "no pod and are not counted.",
            "short",
            (Query(TASKS, "{{stage}} {{result}}"),),
            kind="bargauge",
        ),
    ),
)

PODS = PanelRow(
    "Pods",
    (
        Panel(
            "Pods by phase",
            "Pods of the workflows, by phase.",
            "short",
            (Query(f"sum by (workflow, phase) ({PHASES}) > 0", "{{workflow}} {{phase}}"),),
        ),
        Panel(
            "Failed pods",
            "Pods that failed and are still there; each but the last of a task was retried.",
            "short",
            (Query(f"sum by (workflow) ({FAILED})", "{{workflow}}"),),
            extra={"min": 0, "decimals": 0},
        ),
        Panel(
            "Pods started again",
            "Pods that Argo started again after their node was lost, before their container ran.",
            "short",
            (Query(f"sum by (reason) ({controller('argo_workflows_pod_restarts_total')})", "{{reason}}"),),
            extra={"min": 0},
        ),
        Panel(
            "Pods waiting, by reason",
            "Pods that began to wait for a node, an image or a volume, in the chosen time.",
            "short",
            (Query(f"sum by (reason) ({controller('argo_workflows_pod_pending_count')})", "{{reason}}"),),
        ),
        Panel(
            "Controller",
            "Depth of the controller's queues, and its errors: a queue that grows means workflows that stand still.",
            "short",
            (
                Query("sum by (queue_name) (argo_workflows_queue_depth_gauge)", "{{queue_name}}"),
                Query(f"sum by (cause) (increase(argo_workflows_error_count[{RATE}]))", "error: {{cause}}"),
            ),
        ),
        Panel(
            "Versions",
            "What runs where: version of this project, Python and torch.",
            "short",
            (Query(by_workflow(f'{telemetry.BUILD_INFO}{{namespace=~"$namespace"}}')),),
            kind="table",
        ),
    ),
)

STORE = PanelRow(
    "Store and checkpoints",
    (
        Panel(
            "Store, busy",
            "Seconds per second that stages spend in the store, by operation.",
            "s",
            (Query(f"sum by (operation) ({rate(telemetry.STORE_SECONDS)})", "{{operation}}"),),
        ),
        Panel(
            "Store, throughput",
            "Bytes per second to and from the store, by operation.",
            "Bps",
            (Query(f"sum by (operation) ({rate(telemetry.STORE_BYTES)})", "{{operation}}"),),
        ),
        Panel(
            "Store and checkpoint errors",
            "Calls of the store and checkpoints that failed, in the chosen time.",
            "short",
            (
                Query(
                    f"sum by (operation) (max_over_time({selected(telemetry.STORE_ERRORS)}[$__range]))",
                    "{{operation}}",
                ),
                Query(
                    f"sum by (stage) (max_over_time({selected(telemetry.CHECKPOINT_ERRORS)}[$__range]))",
                    "checkpoint of {{stage}}",
                ),
            ),
            extra={"min": 0, "decimals": 0},
        ),
        Panel(
            "Time to write a checkpoint",
            "Mean seconds per checkpoint; training goes on meanwhile.",
            "s",
            (
                Query(
                    f"{gauge(telemetry.CHECKPOINT_SECONDS)} / on (namespace, pod, stage, shard)"
                    f" ({selected(telemetry.CHECKPOINTS)} > 0)",
                    "{{stage}} {{shard}}",
                ),
            ),
        ),
    ),
)

PIPELINE = Dashboard(
    "moe-asr-pipeline",
    "moe-asr / Pipeline",
    "Runs, stages, progress, time left, failures, retries and the store.",
    (RUNS, STAGES, PODS, STORE),
)
