"""A hint on the routing that fits a run's corpus, from the numbers in the stages' reports."""

from collections.abc import Sequence
from typing import Any, Literal

from common.json_files import Row

AUDIBLE = 0.9  # accuracy by one utterance from which a speaker's others add nothing
KNOWN = 0.8  # accuracy by all of a speaker's utterances that is enough to route by
GAIN = 0.05  # of accuracy, by a speaker's other utterances
FOLLOWS = 0.5  # adjusted Rand index from which clusters count as the corpus's groups


def corpus_hint(
    gate: Row | None,
    clusters: Row | None,
    judged: Sequence[Row],
    *,
    route_by: Literal["utterance", "speaker", "table"],
    routed: int,
) -> str:
    """A hint on how well the corpus's groups suit a mixture; empty for a model without routed experts.

    Args:
        gate: report of the gating stage.
        clusters: report of the cluster stage.
        judged: improvement on dev by each routed expert (`stages.asr.ablation`).
        routed: number of routed experts.
    """
    if routed < 2:
        return ""
    parts = [_groups(gate or {}, clusters or {}, route_by), _experts(judged, route_by, _kind(gate or {}))]
    return " ".join(part for part in parts if part)


def _kind(gate: Row) -> Literal["audible", "alike", "hidden", ""]:
    """Whether the corpus's groups can be predicted from one utterance, from all of a speaker's, or from neither."""
    accuracy: Any = gate.get("held_out_speakers")
    if not accuracy or accuracy["groups"] == "cluster":
        return ""
    utterance, speaker = accuracy["utterance_accuracy"], accuracy["speaker_accuracy"]
    if utterance >= AUDIBLE or (speaker >= KNOWN and speaker - utterance < GAIN):
        return "audible"
    return "alike" if speaker >= KNOWN else "hidden"


def _groups(gate: Row, clusters: Row, route_by: str) -> str:
    kind = _kind(gate)
    if not kind:
        return ""
    accuracy = gate["held_out_speakers"]
    column, utterance, speaker = accuracy["groups"], accuracy["utterance_accuracy"], accuracy["speaker_accuracy"]
    seen = f"one utterance of a new speaker identifies the {column} in {utterance:.0%} of cases, all "
    seen += f"utterances together in {speaker:.0%}"
    rand = (clusters.get("adjusted_rand") or {}).get(column)
    strangers = gate.get("target", "cluster") == "cluster" and rand is not None and rand < FOLLOWS
    target = f" --set gating.target={column}" if strangers else ""
    other = f", and the clusters are other groups (adjusted Rand index {rand:.2f})" if strangers else ""
    if kind == "audible":
        advice = f"; try{target}." if target else "; routing by utterance fits it."
        return f"One utterance identifies the group: {seen}{other}{advice}"
    table = f"--set asr.route_by=table --set asr.route_column={column}"
    if kind == "hidden":
        advice = "" if route_by == "table" else f"; where it is known beforehand, try {table}."
        return f"Utterances do not identify the group: {seen}{other}{advice or '.'}"
    if route_by == "utterance":
        return (
            f"Groups sound alike: {seen}{other}; try --set asr.route_by=speaker{target}, or {table} where the {column} "
            "is known beforehand."
        )
    return f"Groups sound alike: {seen}{other}; " + (f"try{target}." if target else f"routing by {route_by} fits it.")


def _experts(judged: Sequence[Row], route_by: str, kind: str) -> str:
    """Whether routed experts lower the loss; empty if none was evaluated, or if other routing should be tried first."""
    used = [row for row in judged if row["utterances"]]
    if not used or any(row["gain_interval"] and row["gain_interval"][0] > 0 for row in used):
        return ""
    if kind == "alike" and route_by == "utterance":
        return ""
    return (
        f"None of the {len(used)} routed experts that dev uses lowers the loss beyond chance: one adapter for "
        "all speakers (--num-experts 1) is simpler and as good."
    )
