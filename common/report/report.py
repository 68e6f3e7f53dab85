"""`report.html`: the stages and results of a run, in one file that needs no network and runs no script.

Every section is built from the files of a stage. The section of a stage that the run lacks is omitted, with the reason
in one line.
"""

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from common.json_files import Row, read_object, read_rows
from common.report import page, plots
from common.report.error_rates import TABLE_ROWS, etiology_section, result_section, scored_rows, worst_section
from common.report.page import clock, inline_svg, is_number, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = tuple[str, Callable[[], "Figure"], str]  # caption, how to draw it, what it shows in words
EVENTS = 200
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scikit-learn", "hdbscan",
            "umap-learn", "soundfile", "soxr", "rapidfuzz", "whisper-normalizer", "matplotlib")  # fmt: skip
TITLES = {
    "result": "Result",
    "etiologies": "WER by etiology",
    "clusters": "Clusters",
    "gate": "Gate",
    "experts": "Experts",
    "joint": "Joint training",
    "worst": "Worst utterances",
    "timeline": "Timeline",
}


@dataclass(frozen=True)
class RunView:
    """Inputs of a report.

    Args:
        name: the run's name.
        subject: names of model and corpus, and the seed, by label.
        config_yaml: the resolved configuration.
        version: of moe-asr.
        summary: `summary.json`'s object; rates are fractions.
        cluster, gate, asr: a stage's output folder; None where the run has no cluster or gating stage.
        experts: one output folder per expert, beginning with the shared expert if it was trained before.
        timeline: {stage, shard, started (unix seconds), seconds, host, status ("run" or "skipped")} each.
        audio_root: location of the corpus, shown with the utterances.
        etiologies: etiology of each of the corpus's utterances, by id.
    """

    name: str
    subject: Mapping[str, str]
    config_yaml: str
    version: str
    summary: Row
    cluster: Path | None
    gate: Path | None
    experts: list[Path]
    asr: Path
    timeline: list[Row]
    audio_root: str | None
    etiologies: Mapping[str, str]


def render_report(view: RunView) -> str:
    """The report as one self-contained HTML string; the same view gives the same string.

    Raises:
        DataError: a stage's file exists but cannot be read.
    """
    predictions = scored_rows(view.asr)
    sections: dict[str, Row | str] = {
        "result": result_section(view.summary, predictions),
        "etiologies": etiology_section(view.summary, predictions),
        "clusters": _clusters(view.cluster, view.etiologies),
        "gate": _gate(view.gate),
        "experts": _experts(view.experts, view.timeline),
        "joint": _joint(view.asr, predictions),
        "worst": worst_section(predictions),
        "timeline": _timeline(view.timeline),
    }
    return page.render_page(
        "report.html",
        view=view,
        **{name: None if isinstance(section, str) else section for name, section in sections.items()},
        contents=[(name, TITLES[name], not isinstance(section, str)) for name, section in sections.items()],
        left_out=[reason for reason in sections.values() if isinstance(reason, str)],
        about=_about(view),
        versions=_versions(),
    )


def _about(view: RunView) -> list[str]:
    """When the run began, and on what."""
    started = min((event["started"] for event in view.timeline), default=None)
    about = [f"{datetime.fromtimestamp(started, UTC):%d %B %Y, %H:%M} UTC"] if started is not None else []
    return about + [f"{label} {value}" for label, value in view.subject.items()]


def _clusters(folder: Path | None, etiologies: Mapping[str, str]) -> Row | str:
    if folder is None:
        return "Clusters: this run has no cluster stage."
    report = read_object(folder / "report.json")
    section: Row = {"report": report, "maps": [], "reading": _cluster_reading(report), "no_map": None}
    section["merged"] = f"merged from {report['merged_from']}" if report.get("merged_from") else ""
    tries = [f"{a['clusters']} at {a['min_cluster_size']}" for a in report.get("attempts") or ()]
    section["tried"] = f"found: {', '.join(tries)}" if len(tries) > 1 else ""
    rows = read_rows(folder / "assignments.jsonl")
    section["composition"] = _composition([row | {"etiology": etiologies[row["id"]]} for row in rows])
    if not (folder / "projection.jsonl").is_file():
        return section | {"no_map": "No map: the clusters were made without a projection (--no-plot)."}
    points = read_rows(folder / "projection.jsonl")
    cut = f", a random sample of {number(len(points))} of {number(len(rows))}" if len(points) < len(rows) else ""
    for field in ("cluster", "etiology"):
        label = f"Scatter plot of {len(points)} utterances by {field}; the table below has the counts."
        svg = inline_svg(partial(plots.draw_map, points, field), f"map-{field}", label)
        section["maps"].append((f"Utterances by {field}{cut}. Hollow: noise, in the most similar cluster.", svg))
    return section


def _cluster_reading(report: Row) -> str:
    """Description of the clusters' agreement with groups, by the adjusted Rand index."""
    rand = {name: value for name, value in (report.get("adjusted_rand") or {}).items() if is_number(value)}
    if len(rand) < 2 or max(rand.values()) < 0.1:
        return "The clusters agree with neither etiology nor speaker much more than chance would."
    first, second = sorted(rand, key=lambda name: -rand[name])
    if rand[first] - rand[second] < 0.05:
        return f"The clusters follow {first} and {second} about equally, by the adjusted Rand index."
    caution = " They separate speakers rather than kinds of speech." if first == "speaker" else ""
    return f"The clusters follow {first} more than {second}, by the adjusted Rand index.{caution}"


def _composition(rows: Sequence[Row]) -> Row:
    """Number of utterances of each etiology in a cluster."""
    counts = Counter((row["cluster"], _field(row, "etiology")) for row in rows)
    clusters = sorted({cluster for cluster, _ in counts})
    totals = Counter({c: sum(n for (cluster, _), n in counts.items() if cluster == c) for c in clusters})
    names = [name for name, _ in Counter(_field(row, "etiology") for row in rows).most_common(12)]
    lines = [(c, [(counts[c, n], counts[c, n] / totals[c]) for n in names], totals[c]) for c in clusters[:TABLE_ROWS]]
    return {"names": names, "lines": lines, "cut": max(0, len(clusters) - TABLE_ROWS)}


def _gate(folder: Path | None) -> Row | str:
    if folder is None:
        return "Gate: this run trained none before the joint training."
    report = read_object(folder / "report.json")
    label = f"Confusion matrix over {len(report['labels'])} groups; accuracy {percent(report['accuracy'])}."
    figures: list[Drawing] = [
        (
            "Confusion on utterances held out; the tint is the row's share.",
            partial(plots.draw_confusion, report["confusion"], report["labels"]),
            label,
        )
    ]
    if report.get("reliability"):
        label = f"Reliability diagram; expected calibration error {percent(report['expected_calibration_error'])}."
        figures.append(
            (
                "Calibration: accuracy by the gate's own confidence. Area: utterances; dashed: perfect.",
                partial(plots.draw_reliability, report["reliability"]),
                label,
            )
        )
    figures += _training_figure(folder, "Loss of the gate.")
    target = report.get("target", "cluster")
    groups = "clusters" if target == "cluster" else f"groups by {target}"
    return {"report": report, "groups": groups, "figures": _drawn(figures, "gate")}


def _experts(folders: Sequence[Path], timeline: Sequence[Row]) -> Row | str:
    if not folders:
        return "Experts: this run trained none before the joint training."
    reports = [_with_top(read_object(folder / "report.json")) for folder in folders]
    seconds = {e["shard"] or "shared": e["seconds"] for e in timeline if e["stage"] in ("experts", "shared")}
    reports = [report | {"seconds": seconds.get(str(report["cluster"]))} for report in reports]
    curves = [plots.expert_curves(folder) for folder in folders]
    shown = curves[: plots.PANELS]
    highest = max((row["loss"] for _, rows in shown for row in rows if is_number(row.get("loss"))), default=None)
    figures: list[Drawing] = []
    for i in range(0, len(shown), 4):  # four panels per figure, so that figures fit side by side
        part = shown[i : i + 4]
        names = ", ".join(title for title, _ in part)
        more = f" ({len(curves)} in all)" if len(curves) > len(shown) else ""
        label = f"Training and dev loss of {names} over steps, one panel each."
        figures.append((f"Loss of {names}{more}.", partial(plots.draw_experts, part, highest), label))
    return {"reports": reports, "figures": _drawn(figures, "experts")}


def _with_top(report: Row) -> Row:
    """An expert's report with its three most frequent etiologies and the number of the others."""
    ranked = sorted((report.get("etiologies") or {}).items(), key=lambda item: (-item[1], item[0]))
    return report | {"top": [(name or "unknown", n) for name, n in ranked[:3]], "more": max(0, len(ranked) - 3)}


def _joint(folder: Path, rows: Sequence[Row]) -> Row:
    report = read_object(folder / "report.json") | {"throughput": read_object(folder / "throughput.json")}
    load = report.get("load") or []
    figures = _training_figure(folder, "Loss, and WER on dev where it was decoded.")
    if len(load) > 1:
        label = f"Bar chart of routing weight; from {percent(min(load))} to {percent(max(load))} by expert."
        dropped = [str(row["expert"]) for row in report.get("experts_judged") or () if row["dropped"]]
        caption = "Expert load on the test set; dashed: an even share."
        if dropped:
            caption += f" Dropped, so that their load has no effect: {', '.join(dropped)}."
        figures.append((caption, partial(plots.draw_load, load), label))
    if len(load) > 1 and (shares := plots.routing(rows)):
        label = f"Heat map of the mean weight of {len(load)} experts for each of {len(shares)} etiologies."
        figures.append(
            (
                "Mean routing weight by etiology, in percent; rows sum to 100.",
                partial(plots.draw_routing, shares),
                label,
            )
        )
    entropy_top = math.log(len(load)) if len(load) > 1 else None
    return {"report": report, "figures": _drawn(figures, "joint"), "entropy_top": entropy_top, "experts": len(load)}


def _training_figure(folder: Path, title: str) -> list[Drawing]:
    rows = read_rows(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row.get("split") == "train" and row.get("loss") is not None]
    ends = f", from {number(float(losses[0]))} to {number(float(losses[-1]))}" if losses else ""
    return [(title, partial(plots.draw_training, rows), f"Line chart of training loss over steps{ends}; and dev.")]


def _drawn(figures: Iterable[Drawing], prefix: str) -> list[tuple[str, Markup]]:
    return [(title, inline_svg(draw, f"{prefix}-{i}", label)) for i, (title, draw, label) in enumerate(figures)]


def _timeline(events: Sequence[Row]) -> Row | str:
    if not events:
        return "Stage timeline: no stage has been recorded."
    worked = sorted((e for e in events if e["status"] == "run"), key=lambda e: (e["started"], str(e["shard"])))
    place, span, cuts = page.axis_of_time([(e["started"], e["started"] + e["seconds"]) for e in worked])
    stages = []
    for stage in dict.fromkeys(e["stage"] for e in sorted(events, key=lambda e: e["started"])):
        entries = [e for e in worked if e["stage"] == stage]
        bars = page.lanes(entries, place, span)
        skipped = sum(e["stage"] == stage and e["status"] != "run" for e in events)
        seconds = sum(e["seconds"] for e in entries)
        height = 1 + max((bar["lane"] for bar in bars), default=0)
        counts = {"ran": len(entries), "skipped": skipped}
        stages.append({"name": stage, "bars": bars, "lanes": height, "seconds": seconds} | counts)
    more = max(0, len(worked) - EVENTS)
    return {
        "stages": stages,
        "cuts": cuts,
        "events": worked[:EVENTS],
        "more": more,
        "reading": _time_reading(worked, cuts),
    }


def _time_reading(worked: Sequence[Row], cuts: Sequence[Row]) -> str:
    """Wall time, work and pauses in words."""
    if not worked:
        return "Nothing had to be done: every stage was reused from an earlier run."
    wall = max(e["started"] + e["seconds"] for e in worked) - min(e["started"] for e in worked)
    hosts = len({e["host"] for e in worked})
    text = f"{clock(wall)} from first start to last end, on {hosts} host{'' if hosts == 1 else 's'}."
    text += " The time beside a stage is its work, summed over its tasks."
    if any(e.get("attempts", 1) > 1 for e in worked):
        text += " Pauses between attempts at a task do not count."
    if cuts:
        pauses = ", ".join(clock(cut["seconds"]) for cut in cuts[:5])
        text += f" Dotted lines cut out pauses ({pauses}{', …' if len(cuts) > 5 else ''})."
    return text


def _versions() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            versions.append((package, version(package)))
        except PackageNotFoundError:
            versions.append((package, "not installed"))
    return versions


def _field(row: Row, name: str) -> str:
    return str(row.get(name) or "unknown")
