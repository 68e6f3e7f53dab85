"""Pieces of PromQL that the dashboards share."""

from common.telemetry import Metric

OWN = 'namespace=~"$namespace",stage=~"$stage"'
WORKFLOWS = 'moe_asr:pod_workflow:info{namespace=~"$namespace",workflow=~"$workflow"}'
CHOSEN = 'namespace=~"$namespace",workflow=~"$workflow",stage=~"$stage"'  # of series that carry the workflow already
RATE = "$__rate_interval"


def selected(metric: Metric | str, labels: str = "") -> str:
    """A metric of ours in the chosen namespaces and stages."""
    return f"{metric}{{{OWN}{',' if labels else ''}{labels}}}"


def by_workflow(expr: str) -> str:
    """A vector with pod labels, kept to the chosen workflows and labelled with theirs."""
    return f"{expr} * on (namespace, pod) group_left (workflow) {WORKFLOWS}"


def gauge(metric: Metric | str, labels: str = "") -> str:
    """A gauge of ours by workflow."""
    return by_workflow(selected(metric, labels))


def rate(metric: Metric) -> str:
    """A counter of ours per second, by workflow."""
    return by_workflow(f"rate({selected(metric)}[{RATE}])")


def controller(metric: str, labels: str = "") -> str:
    """The increase of a counter of Argo's controller in the chosen namespaces over the dashboard's time.

    The workflow's namespace is in `namespace`, or in `exported_namespace` where the scrape has a label of that name.
    """
    more = f",{labels}" if labels else ""
    parts = (f'{metric}{{{name}=~"$namespace"{more}}}' for name in ("exported_namespace", "namespace"))
    return " or ".join(f"increase({part}[$__range])" for part in parts)
