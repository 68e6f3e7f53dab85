"""The dashboard "Training quality": losses, error rates by etiology, experts, pace."""

from common import telemetry
from dashboards.panels import Dashboard, Panel, PanelRow, Query
from dashboards.promql import RATE, by_workflow, gauge, rate, selected

SERIES = "{{workflow}} {{stage}} {{shard}}"
STEP_BUCKETS = by_workflow(f"rate({selected(f'{telemetry.STEP}_bucket')}[{RATE}])")
BY_STAGE = "workflow, stage, shard"


def quantile(share: float) -> Query:
    """A quantile of the step time."""
    return Query(
        f"histogram_quantile({share}, sum by (le, {BY_STAGE}) ({STEP_BUCKETS}))", f"{SERIES} p{round(100 * share)}"
    )


def error_rates(metric: telemetry.Metric, split: str) -> tuple[Query, ...]:
    """Error rates by etiology and model on one split."""
    return (Query(gauge(metric, f'split="{split}"'), "{{workflow}} {{etiology}} {{model}}"),)


LOSSES = PanelRow(
    "Losses",
    (
        Panel(
            "Loss",
            "Loss per token, in training and on dev; dev alone tells whether it learns something general.",
            "short",
            (Query(gauge(telemetry.LOSS), f"{SERIES} {{{{split}}}}"),),
            width=12,
        ),
        Panel(
            "Gradient norm",
            "Norm of the gradient before clipping.",
            "short",
            (Query(gauge(telemetry.GRADIENT_NORM), SERIES),),
            width=6,
        ),
        Panel(
            "Learning rate",
            "Of the first parameter group: warm-up, then decay.",
            "sci",
            (Query(gauge(telemetry.LEARNING_RATE), SERIES),),
            width=6,
        ),
    ),
)

ERRORS = PanelRow(
    "Error rates",
    (
        Panel(
            "WER by etiology, dev",
            "Word error rate on the dev subset that selects checkpoints, after each full evaluation.",
            "percentunit",
            error_rates(telemetry.WER, "dev"),
            extra={"min": 0},
        ),
        Panel(
            "WER by etiology, test",
            "Word error rate of the base model (before) and of the trained one (after) on test.",
            "percentunit",
            error_rates(telemetry.WER, "test"),
            kind="bargauge",
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "CER by etiology, test",
            "Character error rate of the base model (before) and of the trained one (after) on test.",
            "percentunit",
            error_rates(telemetry.CER, "test"),
            kind="bargauge",
            extra={"min": 0, "max": 1},
        ),
    ),
)

EXPERTS = PanelRow(
    "Experts",
    (
        Panel(
            "Expert load",
            "Share of the routing weight on dev that each expert gets; one line near 1 is collapse.",
            "percentunit",
            (Query(gauge(telemetry.LOAD), "{{workflow}} expert {{expert}}"),),
            extra={"min": 0, "max": 1},
            width=12,
        ),
        Panel(
            "Router entropy",
            "How undecided the router is, in nats: 0 certain, the logarithm of the number of experts undecided.",
            "short",
            (Query(gauge(telemetry.ENTROPY), "{{workflow}} {{split}}"),),
            width=6,
            extra={"min": 0},
        ),
        Panel(
            "Load balance",
            "The balance loss: 1 is balanced, the number of experts is collapsed.",
            "short",
            (Query(gauge(telemetry.BALANCE), SERIES),),
            width=6,
        ),
    ),
)

PACE = PanelRow(
    "Pace",
    (
        Panel(
            "Speech per second",
            "Seconds of speech that went through the model per second.",
            "short",
            (Query(f"sum by ({BY_STAGE}) ({rate(telemetry.AUDIO)})", SERIES),),
        ),
        Panel(
            "Utterances per second",
            "Utterances that went through the model per second.",
            "short",
            (Query(f"sum by ({BY_STAGE}) ({rate(telemetry.SAMPLES)})", SERIES),),
        ),
        Panel(
            "Tokens per second",
            "Target tokens that carried loss, per second.",
            "short",
            (Query(f"sum by ({BY_STAGE}) ({rate(telemetry.TOKENS)})", SERIES),),
        ),
        Panel(
            "Step time",
            "Median and 95th percentile of an optimiser step, waiting for data included.",
            "s",
            (quantile(0.5), quantile(0.95)),
        ),
        Panel(
            "Padding",
            "Share of the encoder's work that is padding: larger length buckets cost this much.",
            "percentunit",
            (
                Query(
                    f"1 - sum by ({BY_STAGE}) ({rate(telemetry.AUDIO)})"
                    f" / (sum by ({BY_STAGE}) ({rate(telemetry.PADDED)}) > 0)",
                    SERIES,
                ),
            ),
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "Waiting for data",
            "Share of the step time in which the loop waited for the loader.",
            "percentunit",
            (Query(gauge("moe_asr:data_wait:ratio5m"), SERIES),),
            extra={"min": 0, "max": 1},
        ),
        Panel(
            "Skipped steps",
            "Steps whose gradient was not finite; the weights were not touched.",
            "short",
            (Query(gauge(telemetry.NONFINITE), SERIES),),
            extra={"min": 0, "decimals": 0},
        ),
    ),
)

TRAINING = Dashboard(
    "moe-asr-training",
    "moe-asr / Training quality",
    "Losses, error rates by etiology, expert load, router entropy, and the pace of training.",
    (LOSSES, ERRORS, EXPERTS, PACE),
)
