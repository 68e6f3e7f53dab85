"""`report.html`: what a run did and what came of it, in one file that needs no network and runs no script.

Every section is built from the plain files of a stage. A stage that the run lacks leaves its section out, with the
reason in one line. Rates are micro-averaged fractions; as in `summary.json`, an utterance's errors are counted up to
its number of words unless the text says unclipped.
"""

from __future__ import annotations

import math
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from common import plots
from common.page import (
    align_words,
    axis_of_time,
    clock,
    inline_svg,
    interval,
    is_number,
    lanes,
    number,
    percent,
    points,
)
from common.plots import Row, read_object, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = tuple[str, Callable[[], "Figure"], str]  # title, how to draw it, what it shows in words
WORST = 25
DIFF_WORDS = 80
TABLE_ROWS = 50
EVENTS = 200
FEW_SPEAKERS = 10
BOOTSTRAPS = 2_000
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scikit-learn", "fast-hdbscan",
            "umap-learn", "soundfile", "soxr", "jiwer", "whisper-normalizer", "matplotlib")  # fmt: skip
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
    """What a report is made from.

    Args:
        name: the run's name.
        config_yaml: the resolved configuration.
        version: of moe-asr.
        summary: `summary.json`'s object; rates are fractions.
        cluster, gate, asr: a stage's output folder; None where the run has no such stage.
        experts: one output folder per expert.
        timeline: {stage, shard, started (unix seconds), seconds, host, status ("run" or "skipped")} each.
        audio_root: where the corpus lies, shown beside the utterances.
    """

    name: str
    config_yaml: str
    version: str
    summary: Row
    cluster: Path | None
    gate: Path | None
    experts: list[Path]
    asr: Path | None
    timeline: list[Row]
    audio_root: str | None


def render_report(view: RunView) -> str:
    """The report as one self-contained HTML string; the same view gives the same string.

    Raises:
        DataError: a stage's file is there but cannot be read.
    """
    import jinja2

    predictions = _predictions(view.asr)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"pct": percent, "points": points, "num": number, "clock": clock, "interval": interval}
    template = environment.from_string(files("common").joinpath("templates/report.html").read_text(encoding="utf-8"))
    sections: dict[str, Row | str] = {
        "result": _result(view.summary, predictions),
        "etiologies": _etiologies(view.summary, predictions),
        "clusters": _clusters(view.cluster),
        "gate": _gate(view.gate),
        "experts": _experts(view.experts),
        "joint": _joint(view.asr, predictions),
        "worst": _worst(predictions, view.audio_root),
        "timeline": _timeline(view.timeline),
    }
    return template.render(
        view=view,
        **{name: None if isinstance(section, str) else section for name, section in sections.items()},
        contents=[(name, TITLES[name], not isinstance(section, str)) for name, section in sections.items()],
        left_out=[reason for reason in sections.values() if isinstance(reason, str)],
        palette=plots.PALETTE,
        versions=_versions(),
    )


def difference_interval(rows: Sequence[Row], seed: int = 0) -> tuple[float, float] | None:
    """95% interval of WER after minus WER before, by a paired bootstrap over speakers; None below two speakers.

    Both rates of a draw come from the same speakers (Bisani and Ney, 2004), so that what is hard about a speaker
    cancels out.
    """
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        totals[row["speaker"]][0] += _clipped(row, "errors") - _clipped(row, "errors_before")
        totals[row["speaker"]][1] += row["words"]
    difference, words = np.array([totals[speaker] for speaker in sorted(totals)], float).reshape(-1, 2).T
    if len(words) < 2 or "" in totals:
        return None
    draws = np.random.default_rng(seed).multinomial(len(words), np.full(len(words), 1 / len(words)), BOOTSTRAPS)
    low, high = np.percentile(draws @ difference / np.maximum(1, draws @ words), [2.5, 97.5])
    return float(low), float(high)


def _predictions(asr: Path | None) -> list[Row]:
    """The scored rows: of the test split where there is one."""
    if asr is None or not (asr / "predictions.jsonl").is_file():
        return []
    rows = read_rows(asr / "predictions.jsonl")
    return [row for row in rows if row.get("split") == "test"] or rows


def _result(summary: Row, rows: Sequence[Row]) -> Row | str:
    before, after = summary.get("wer_before"), summary.get("wer_after")
    if after is None:
        return "Result: the run has no error rate yet; the asr stage measures it."
    bounds = difference_interval(rows) if rows and before is not None else None
    speakers = summary.get("speakers")
    return {
        "verdict": _verdict(before, after, bounds),
        "bounds": bounds,
        "relative": (after - before) / before if before else None,
        "few": speakers is not None and speakers < FEW_SPEAKERS,
        "worse": [n for n, r in summary.get("by_etiology", {}).items() if (r.get("wer_before") or 0) < r["wer_after"]],
    } | {key: summary.get(key) for key in _RESULT_KEYS}


_RESULT_KEYS = ("wer_before", "wer_after", "cer_before", "cer_after", "wer_before_unclipped", "wer_after_unclipped",
                "wer_interval_before", "wer_interval_after", "utterances", "speakers", "loops_before",
                "loops_after")  # fmt: skip


def _verdict(before: float | None, after: float, bounds: tuple[float, float] | None) -> str:
    if before is None:
        return "The rate before training was not measured, so nothing can be said about the gain."
    if bounds is None:
        return "Whether the difference is more than chance cannot be said: it needs two or more known speakers."
    span = f"{points(after - before)} points, 95% interval {points(bounds[0])} to {points(bounds[1])}"
    if bounds[0] <= 0 <= bounds[1]:
        return f"Before and after are not distinguishable: the interval of the difference contains zero ({span})."
    return f"WER {'fell' if after < before else 'rose'} ({span}, from a bootstrap over speakers)."


def _etiologies(summary: Row, rows: Sequence[Row]) -> Row | str:
    table = summary.get("by_etiology")
    if not table:
        return "WER by etiology: the corpus names no etiology."
    speakers = {name: len({r["speaker"] for r in rows if (r["etiology"] or "unknown") == name}) for name in table}
    ends = [
        x for r in table.values() for x in (r.get("wer_before"), r["wer_after"], *(r.get("wer_interval_after") or ()))
    ]
    lines = [
        {"name": name, "speakers": speakers[name] or None, **table[name]}
        for name in sorted(table, key=lambda name: (-table[name]["wer_after"], name))
    ]
    return {
        "lines": lines,
        "top": _axis_end([x for x in ends if is_number(x)]),
        "single": [line["name"] for line in lines if line["speakers"] == 1],
        "slices": _slices(rows),
    }


def _slices(rows: Sequence[Row]) -> list[Row]:
    """Rates by what the summary does not break down by: severity, duration, speaker."""
    slices = []
    for title, key in (("severity", partial(_field, name="severity")), ("duration", _duration_bin)):
        groups = _rates_by(rows, key)
        if len(groups) > 1:
            slices.append({"title": title, "rows": groups, "cut": 0})
    speakers = sorted(_rates_by(rows, partial(_field, name="speaker")), key=lambda g: (-g["wer_after"], g["name"]))
    if len(speakers) > 1:
        cut = max(0, len(speakers) - TABLE_ROWS)
        slices.append({"title": "speaker", "rows": speakers[:TABLE_ROWS], "cut": cut})
    return slices


def _rates_by(rows: Iterable[Row], key: Callable[[Row], str]) -> list[Row]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    table = []
    for name, group in sorted(groups.items()):
        words = max(1, sum(row["words"] for row in group))
        before, after = (sum(_clipped(row, field) for row in group) / words for field in ("errors_before", "errors"))
        table.append({"name": name, "utterances": len(group), "wer_before": before, "wer_after": after})
    return table


def _clusters(folder: Path | None) -> Row | str:
    if folder is None:
        return "Clusters: this run has no cluster stage."
    if not (folder / "report.json").is_file():
        return "Clusters: the cluster stage wrote no report.json."
    report = read_object(folder / "report.json")
    section: Row = {"report": report, "maps": [], "reading": _cluster_reading(report), "no_map": None}
    section["merged"] = f"merged from {report['merged_from']}" if report.get("merged_from") else ""
    tries = [f"{a['clusters']} at {a['min_cluster_size']}" for a in report.get("attempts") or ()]
    section["tried"] = f"found: {', '.join(tries)}" if len(tries) > 1 else ""
    if not (folder / "projection.jsonl").is_file():
        return section | {"no_map": "No map: the run was made without a projection (--no-plot)."}
    rows = read_rows(folder / "projection.jsonl")
    drawn = plots.sample_points(rows)
    cut = "" if len(drawn) == len(rows) else f", a stratified sample of {number(len(drawn))} of {number(len(rows))}"
    for field, colour in (("cluster", "cluster"), ("etiology", "etiology")):
        label = f"Scatter plot of {len(drawn)} utterances by {field}; the table below has the counts."
        svg = inline_svg(partial(plots.draw_map, drawn, field), f"map-{field}", label)
        section["maps"].append((f"Utterances by {colour}{cut}. Hollow: noise, assigned to the nearest cluster.", svg))
    return section | {"composition": _composition(rows)}


def _cluster_reading(report: Row) -> str:
    """What the clusters follow, by the index that corrects for chance."""
    rand = {name: value for name, value in report["adjusted_rand"].items() if is_number(value)}
    if len(rand) < 2 or max(rand.values()) < 0.1:
        return "The clusters agree with neither etiology nor speaker much more than chance would."
    first, second = sorted(rand, key=lambda name: -rand[name])
    if rand[first] - rand[second] < 0.05:
        return f"The clusters follow {first} and {second} about equally, by the adjusted Rand index."
    caution = " They are more about who speaks than about how." if first == "speaker" else ""
    return f"The clusters follow {first} more than {second}, by the adjusted Rand index.{caution}"


def _composition(rows: Sequence[Row]) -> Row:
    """How many utterances of each etiology a cluster holds."""
    counts = Counter((row["cluster"], _field(row, "etiology")) for row in rows)
    clusters = sorted({cluster for cluster, _ in counts})
    totals = Counter({c: sum(n for (cluster, _), n in counts.items() if cluster == c) for c in clusters})
    names = [name for name, _ in Counter(_field(row, "etiology") for row in rows).most_common(12)]
    lines = [(c, [(counts[c, n], counts[c, n] / totals[c]) for n in names], totals[c]) for c in clusters[:TABLE_ROWS]]
    return {"names": names, "lines": lines, "cut": max(0, len(clusters) - TABLE_ROWS)}


def _gate(folder: Path | None) -> Row | str:
    if folder is None:
        return "Gate: this run trained none before the joint training."
    if not (folder / "report.json").is_file():
        return "Gate: the gating stage wrote no report.json."
    report = read_object(folder / "report.json")
    label = f"Confusion matrix over {len(report['labels'])} clusters; accuracy {percent(report['accuracy'])}."
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
    return {"report": report, "figures": _drawn(figures, "gate")}


def _experts(folders: Sequence[Path]) -> Row | str:
    if not folders:
        return "Experts: this run trained none before the joint training."
    with_report = [folder for folder in folders if (folder / "report.json").is_file()]
    if not with_report:
        return "Experts: the experts stage wrote no report.json."
    reports = [_with_top(read_object(folder / "report.json")) for folder in with_report]
    with_metrics = [folder for folder in with_report if (folder / "metrics.jsonl").is_file()]
    curves = [plots.expert_curves(folder) for folder in with_metrics]
    label = f"Training and dev loss of {len(curves)} experts over steps, one panel each."
    cut = f", the first {plots.PANELS} of {len(curves)} experts" if len(curves) > plots.PANELS else ""
    figures: list[Drawing] = [(f"Losses{cut}.", partial(plots.draw_experts, curves), label)] if curves else []
    return {"reports": reports, "figures": _drawn(figures, "experts")}


def _with_top(report: Row) -> Row:
    """An expert's report with its three most frequent etiologies and the number of the others."""
    ranked = sorted(report["etiologies"].items(), key=lambda item: (-item[1], item[0]))
    return report | {"top": [(name or "unknown", n) for name, n in ranked[:3]], "more": max(0, len(ranked) - 3)}


def _joint(folder: Path | None, rows: Sequence[Row]) -> Row | str:
    if folder is None:
        return "Joint training: this run has no asr stage."
    if not (folder / "report.json").is_file():
        return "Joint training: the asr stage wrote no report.json."
    report = read_object(folder / "report.json")
    load = report.get("load") or []
    figures = _training_figure(folder, "Loss, and WER on dev where it was decoded.")
    if len(load) > 1:
        label = f"Bar chart of routing weight; from {percent(min(load))} to {percent(max(load))} by expert."
        figures.append(
            ("Expert load on held-out speech; dashed: an even share.", partial(plots.draw_load, load), label)
        )
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
    if not (folder / "metrics.jsonl").is_file() or not (rows := read_rows(folder / "metrics.jsonl")):
        return []
    losses = [row["loss"] for row in rows if row.get("split") == "train" and row.get("loss") is not None]
    ends = f", from {number(float(losses[0]))} to {number(float(losses[-1]))}" if losses else ""
    return [(title, partial(plots.draw_training, rows), f"Line chart of training loss over steps{ends}; and dev.")]


def _drawn(figures: Iterable[Drawing], prefix: str) -> list[tuple[str, Markup]]:
    return [(title, inline_svg(draw, f"{prefix}-{i}", label)) for i, (title, draw, label) in enumerate(figures)]


def _worst(rows: Sequence[Row], audio_root: str | None) -> Row | str:
    if not rows:
        return "Worst utterances: the run has no predictions."
    wrong = [row for row in rows if row["errors"]]
    ranked = sorted(wrong, key=lambda r: (-r["errors"], -r["errors"] / max(1, r["words"]), str(r["id"])))[:WORST]
    lines = []
    for row in ranked:
        steps = align_words(row["reference"], row["hypothesis"])
        mixture = sorted(zip(row.get("weights") or (), row.get("experts") or (), strict=True), reverse=True)
        before = " ".join((row.get("hypothesis_before") or "").split()[: 2 * DIFF_WORDS])
        line = {"steps": steps[:DIFF_WORDS], "cut": max(0, len(steps) - DIFF_WORDS), "mixture": mixture}
        lines.append(row | line | {"before": before})
    share = sum(row["errors"] for row in ranked) / max(1, sum(row["errors"] for row in rows))
    return {"lines": lines, "share": share, "wrong": len(wrong), "total": len(rows), "audio_root": audio_root}


def _timeline(events: Sequence[Row]) -> Row | str:
    if not events:
        return "Stage timeline: no stage has been recorded."
    worked = sorted((e for e in events if e["status"] == "run"), key=lambda e: (e["started"], str(e["shard"])))
    place, span, cuts = axis_of_time([(e["started"], e["started"] + e["seconds"]) for e in worked])
    stages = []
    for stage in dict.fromkeys(e["stage"] for e in sorted(events, key=lambda e: e["started"])):
        mine = [e for e in worked if e["stage"] == stage]
        bars = lanes(mine, place, span)
        skipped = sum(e["stage"] == stage and e["status"] != "run" for e in events)
        seconds = sum(e["seconds"] for e in mine)
        height = 1 + max((bar["lane"] for bar in bars), default=0)
        counts = {"ran": len(mine), "skipped": skipped}
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
    if cuts:
        pauses = ", ".join(clock(cut["seconds"]) for cut in cuts[:5])
        text += f" Dotted lines cut out pauses ({pauses}{', …' if len(cuts) > 5 else ''})."
    return text


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "not installed"))
    return found


def _axis_end(values: Sequence[float]) -> float:
    """The first multiple of 10% (of 50% above 100%) at or over all values."""
    most = max(values, default=0.0)
    step = 0.1 if most <= 1 else 0.5
    return max(step, math.ceil(round(most / step, 6)) * step)


def _clipped(row: Row, field: str) -> int:
    return int(min(row[field], row["words"]))


def _field(row: Row, name: str) -> str:
    return str(row.get(name) or "unknown")


def _duration_bin(row: Row) -> str:
    for low, high in ((0, 2), (2, 5), (5, 10), (10, 20)):
        if row["duration"] < high:
            return f"{low:02d}–{high:02d} s"
    return "20 s and over"
