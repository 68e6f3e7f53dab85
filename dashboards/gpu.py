"""The dashboard "GPU utilisation": how well the GPUs are used."""

from common import telemetry
from dashboards.panels import Dashboard, Panel, PanelRow, Query
from dashboards.promql import CHOSEN, by_workflow, gauge, rate

SERIES = "{{workflow}} {{stage}} {{shard}} GPU {{gpu}}"
IDLE_MINUTES = f"sum_over_time(moe_asr:gpu_idle:bool{{{CHOSEN}}}[$__range:15s]) / 4"
GPU_HOURS = f"count_over_time(moe_asr:gpu_busy:ratio{{{CHOSEN}}}[$__range:15s]) / 240"


def chosen(name: str) -> str:
    """A recorded series of the GPUs in the chosen namespaces, workflows and stages."""
    return f"moe_asr:gpu_{name}{{{CHOSEN}}}"


MONEY = PanelRow(
    "Cost",
    (
        Panel(
            "GPU hours",
            "Hours that GPUs were held by pods of the chosen workflows, in the chosen time.",
            "h",
            (Query(f"sum({GPU_HOURS})", "GPU hours"),),
            kind="stat",
            width=6,
            extra={"decimals": 1},
        ),
        Panel(
            "Cost",
            "These hours times the price of a GPU hour (the box above), in its currency.",
            "short",
            (Query(f"sum({GPU_HOURS}) * $gpu_hour_price", "cost"),),
            kind="stat",
            width=6,
            extra={"decimals": 2},
        ),
        Panel(
            "Idle GPU minutes",
            "Minutes in which a held GPU was under 5% busy.",
            "m",
            (Query(f"sum({IDLE_MINUTES})", "idle"),),
            kind="stat",
            width=6,
            extra={
                "decimals": 0,
                "thresholds": {
                    "mode": "absolute",
                    "steps": [{"color": "green", "value": None}, {"color": "red", "value": 30}],
                },
            },
        ),
        Panel(
            "Cost of idleness",
            "Idle minutes times the price of a GPU hour.",
            "short",
            (Query(f"sum({IDLE_MINUTES}) / 60 * $gpu_hour_price", "idle cost"),),
            kind="stat",
            width=6,
            extra={"decimals": 2},
        ),
        Panel(
            "Idle GPU minutes by stage",
            "Where the idle minutes are.",
            "m",
            (Query(f"sum by (workflow, stage, shard) ({IDLE_MINUTES})", "{{workflow}} {{stage}} {{shard}}"),),
            kind="bargauge",
            width=12,
        ),
        Panel(
            "Cost by workflow and stage",
            "GPU hours times the price of a GPU hour.",
            "short",
            (
                Query(
                    f"sum by (workflow, stage) ({GPU_HOURS}) * $gpu_hour_price",
                    "{{workflow}} {{stage}}",
                ),
            ),
            kind="bargauge",
            extra={"decimals": 2},
            width=12,
        ),
    ),
)

ACTIVITY = PanelRow(
    "Activity",
    (
        Panel(
            "Engine activity",
            "Share of time in which the GPU's engine was busy, by workflow, stage and expert (shard).",
            "percentunit",
            (Query(chosen("engine_active:ratio"), SERIES),),
            extra={"min": 0, "max": 1},
            width=12,
        ),
        Panel(
            "Waiting for data beside GPU activity",
            "Share of the step time spent waiting for the loader, and GPU activity of the same stages: when one is "
            "high the other is low, the loader is the bottleneck.",
            "percentunit",
            (
                Query(gauge("moe_asr:data_wait:ratio5m"), "{{stage}} {{shard}} waits for data"),
                Query(f"avg by (workflow, stage, shard) ({chosen('busy:ratio')})", "{{stage}} {{shard}} GPU busy"),
            ),
            extra={"min": 0, "max": 1},
            width=12,
        ),
        Panel(
            "Tensor cores",
            "Share of time in which the tensor pipe was busy: low beside a busy engine means fp32 or small matrices.",
            "percentunit",
            (Query(chosen("tensor_active:ratio"), SERIES),),
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "Memory bandwidth",
            "Share of time in which the GPU's memory was read or written.",
            "percentunit",
            (Query(chosen("dram_active:ratio"), SERIES),),
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "Audio per GPU and second",
            "Seconds of speech that went through the model per second and GPU.",
            "short",
            (
                Query(
                    f"sum by (workflow, stage) ({rate(telemetry.AUDIO)}) / on (workflow, stage)"
                    f" count by (workflow, stage) ({chosen('busy:ratio')})",
                    "{{workflow}} {{stage}}",
                ),
            ),
        ),
    ),
)

HARDWARE = PanelRow(
    "Memory, power, errors",
    (
        Panel(
            "Memory in use",
            "GPU memory in use, all processes.",
            "bytes",
            (Query(chosen("memory_used:bytes"), SERIES),),
        ),
        Panel(
            "Memory of the processes",
            "As the stages see it: allocated and peak of torch on a GPU; resident memory on the CPU.",
            "bytes",
            (
                Query(
                    by_workflow(f'{telemetry.MEMORY}{{namespace=~"$namespace",kind=~"allocated|peak|used"}}'),
                    "{{workflow}} {{pod}} {{device}} {{kind}}",
                ),
            ),
        ),
        Panel("Power", "Power draw of each GPU.", "watt", (Query(chosen("power:watts"), SERIES),)),
        Panel(
            "Xid errors",
            "Number of the last error that the driver reported; 0 is none.",
            "short",
            (Query(chosen("xid:code"), SERIES),),
            extra={"decimals": 0},
        ),
        Panel(
            "GPUs held",
            "GPUs that pods of the chosen workflows hold, by model.",
            "short",
            (Query(f"count by (workflow, modelName) ({chosen('busy:ratio')})", "{{workflow}} {{modelName}}"),),
            extra={"min": 0, "decimals": 0},
        ),
        Panel(
            "Free memory",
            "GPU memory that a larger batch could use.",
            "bytes",
            (Query(chosen("memory_free:bytes"), SERIES),),
        ),
    ),
)

GPU = Dashboard(
    "moe-asr-gpu",
    "moe-asr / GPU utilisation",
    "Whether the GPUs are used, by workflow, stage and expert, and what idleness costs.",
    (MONEY, ACTIVITY, HARDWARE),
    prices=True,
)
