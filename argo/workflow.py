"""The workflow template, built with Hera from the stages' contracts: `make generate` writes it into the chart.

    plan ─▶ extract ─▶ plan-cluster ─▶ cluster ─▶ plan-gating ─▶ gating
            ─▶ plan-experts ─▶ experts (one pod each) ─▶ plan-asr ─▶ asr ─▶ report
    plan ─▶ shared ─▶ plan-experts  (where routed experts build on a shared one, beside extract to gating)

A plan step reads the manifests in the store and outputs a list with one small item per task of a stage; a stage that a
configuration does not need gets an empty list. Each task is memoized under a name that changes when its artifact is
gone, holds a lock on its key, and retries inside of both: in Argo 4.0.2 a template that both memoizes and retries hangs
on a cache hit.

This module imports no torch.
"""

from typing import Any

from hera.workflows import (
    DAG,
    Artifact,
    NoneArchiveStrategy,
    Parameter,
    Task,
    WorkflowTemplate,
)
from hera.workflows import models as m

from argo.parameters import PARAMETERS, Installation, parameter
from argo.pods import OUTPUTS, container, memoized, outcome, output, template
from common.pipeline.contract import Contract
from stages import STAGES

ITEM = ("shard", "key", "memo", "lock", "lane")  # the plan's item for one task
POD_INPUTS = ("shard", "key", "memo", "model")
MODEL = "{{inputs.parameters.model}}"  # digest of the base model, known from the first plan on


def build(place: Installation | None = None) -> WorkflowTemplate:
    """The whole template."""
    place = place or Installation()
    with template(
        "moe-asr",
        "Mixtures of LoRA experts on Whisper",
        "extract, cluster, gating, experts, asr and a report (moe-asr)",
        place,
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
    ) as made:
        _plan(place)
        for contract in STAGES:
            _stage_pod(contract, place)
            _stage(contract)
        _report(place)
        _publish(place)
        outcome(place)
        _main()
    return made


def _main() -> None:
    """The order of steps: each stage after the plan that lists its tasks, each plan after the inputs of the stage."""
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
    """Memoization and locks around a stage's pod."""
    memoized(
        contract.name,
        contract.name + (" {{inputs.parameters.shard}}" if contract.fan_out else ""),
        inputs=(*ITEM, "model"),
        pod_inputs=POD_INPUTS,
        locks=_locks(contract),
    )


def _locks(contract: Contract) -> list[str]:
    """A lock on the key, so that no two workflows run the same task, and a lock on the lane, which limits concurrent
    tasks.
    """
    locks = ["moe-asr-{{inputs.parameters.lock}}"]
    if contract.fan_out:
        locks.append(f"{{{{workflow.uid}}}}-{contract.name}-{{{{inputs.parameters.lane}}}}")
    return locks


def _stage_pod(contract: Contract, place: Installation) -> None:
    """The pod of one task of a stage, with retries."""
    inputs = [Parameter(name=name) for name in POD_INPUTS]
    args = ["--shard", "{{inputs.parameters.shard}}"] if contract.fan_out else None
    env = {"MEMO": "{{inputs.parameters.memo}}", "MODEL": MODEL}
    gpus = parameter("gpus") if contract.together else str(contract.gpus)
    container(
        place,
        f"{contract.name}-pod",
        contract.section,
        ["python", "-m", "stages", contract.name],
        args,
        inputs=inputs,
        outputs=[output("result")],
        env=env,
        kind="gpu-stage" if contract.gpus else "cpu-stage",
        gpus=gpus if contract.gpus else "",
        title=contract.summary,
        deadline=parameter("stage-deadline"),
        metrics=_stage_metrics(contract.name),
    )


def _plan(place: Installation) -> None:
    """The step that lists a stage's tasks, on a CPU, before the stage."""
    container(
        place,
        "plan",
        "cluster",
        ["python", "-m", "stages", "plan"],
        ["--stage", "{{inputs.parameters.stage}}"],
        inputs=[Parameter(name="stage"), Parameter(name="model")],
        outputs=[output(contract.name, default="[]") for contract in STAGES] + [output("model", default="")],
        env={"MODEL": MODEL, "NONCE": "{{workflow.uid}}", "PARALLELISM": parameter("parallelism")}
        | {name: parameter(name.lower()) for name in ("RESUME", "VERIFY")},
    )


def _report(place: Installation) -> None:
    container(
        place,
        "report",
        "cluster",
        ["python", "-m", "stages", "report"],
        inputs=[Parameter(name="model")],
        outputs=[output("wer-before"), output("wer-after")],
        env={"MODEL": MODEL, "STARTED": "{{workflow.creationTimestamp.s}}"},
        metrics=[_rate(model) for model in ("before", "after")],
    )


def _publish(place: Installation) -> None:
    """The report as Argo artifacts; separate from `report`, since it needs an artifact repository."""
    files = {name: f"{OUTPUTS}/{name}" for name in ("report.html", "summary.json")}
    container(
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


def _stage_metrics(stage: str) -> list[m.Prometheus]:
    """Durations and results of tasks. No label contains a workflow's name, since each workflow would then add
    series.
    """
    labels = [m.MetricLabel(key="stage", value=stage), m.MetricLabel(key="status", value="{{status}}")]
    seconds = m.Gauge(realtime=False, value="{{duration}}")
    about = "Seconds of the last task, with retries and their delays."
    return [
        m.Prometheus(name="moe_asr_try_seconds", help=about, labels=labels, gauge=seconds),
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


def to_text(place: Installation | None = None) -> str:
    """The YAML file, with a first line that says where it comes from."""
    text: Any = build(place).to_yaml()
    return f"# Generated by `make generate` from the stages' contracts: change argo/workflow.py instead.\n{text}"
