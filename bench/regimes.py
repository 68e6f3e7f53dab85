"""The table of a sweep over several seeds: `moe-asr compare` on the groups that training heard, and the unseen one.

python -m bench.regimes --store runs --sweep bench longer     reads the runs bench-REGIME-sSEED, longer-… of that store

The first sweep's regimes go by their names, those of the others (another budget, another rank) by `REGIME, SWEEP`.

Prints tables in Markdown and writes bench/results/regimes.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.evaluation.compare import compare
from common.evaluation.results import Result, before_training, read_result
from common.json_files import read_object, read_rows
from common.pipeline.runs import run_names, run_record, stage_folders
from common.storage import open_store
from common.storage.store import Store
from stages.local_runner import cache_folder

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 4000
RATES = ("wer_before", "wer_after", "cer_before", "cer_after", "wer_interval_before", "wer_interval_after")
ROUTING = ("experts", "top_k", "load", "router_entropy", "top1_share", "collapsed")


def main() -> None:
    """Reads, compares, prints, writes."""
    parser = argparse.ArgumentParser(prog="bench.regimes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", default="runs")
    parser.add_argument("--sweep", nargs="+", default=["bench"])
    parser.add_argument("--against", default="dense", help="what the others are compared with")
    parser.add_argument("--unseen", default="island", help="etiology that no training heard")
    parser.add_argument("--results", type=Path, default=RESULTS / "regimes.json")
    options = parser.parse_args()
    store = open_store(options.store)
    names = sweep_runs(store, options.sweep)
    systems = read_systems(store, names)
    seen = compare(only(systems, options.unseen, wanted=False), reference=options.against, resamples=RESAMPLES)
    unseen = compare(only(systems, options.unseen, wanted=True), reference=options.against, resamples=RESAMPLES)
    runs = {run: run_facts(store, run) for members in names.values() for run in members}
    value = {"sweeps": options.sweep, "unseen_etiology": options.unseen, "seen": seen, "unseen": unseen, "runs": runs}
    options.results.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    facts = {regime: [runs[run] for run in members] for regime, members in names.items()}
    print(overview(seen, unseen, facts), by_etiology(seen), sep="\n\n")


def sweep_runs(store: Store, sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Regime → its finished runs, by seed."""
    found: dict[str, list[str]] = {}
    for sweep in sweeps:
        for name in run_names(store):
            match = re.fullmatch(rf"{re.escape(sweep)}-(.+)-s\d+", name)
            if match and run_record(store, name)["status"] == "done":
                label = match[1] if sweep == sweeps[0] else f"{match[1]}, {sweep}"
                found.setdefault(label, []).append(name)
    return found


def read_systems(store: Store, names: Mapping[str, Sequence[str]]) -> dict[str, list[Result]]:
    """regime → results of its runs, the untrained base first."""
    systems = {
        regime: [read_result(run, store=store, cache=cache_folder()) for run in runs] for regime, runs in names.items()
    }
    return {"base": [before_training(next(iter(systems.values()))[0])], **systems}


def only(systems: Mapping[str, Sequence[Result]], etiology: str, *, wanted: bool) -> dict[str, list[Result]]:
    """The same results on one etiology alone, or on all others."""

    def part(one: Result) -> Result:
        rows = [row for row in one.rows if (row["etiology"] == etiology) == wanted]
        return replace(one, rows=rows, scores={str(row["id"]): one.scores[str(row["id"])] for row in rows})

    return {name: [part(one) for one in results] for name, results in systems.items()}


def run_facts(store: Store, run: str) -> dict[str, Any]:
    """What a run was made with, what it cost and what came of it."""
    record = run_record(store, run)
    config = record["config"]
    (folder,) = stage_folders(store, record, "asr", cache_folder())
    report, summary = read_object(folder / "report.json"), json.loads(store.read(f"{run}/summary.json"))
    found = {
        "seed": config["seed"],
        "learning_rate": config["asr"]["learning_rate"],
        "rank": None if config["asr"]["adapt"] == "full" else config["lora"]["rank"],
        "dev_wer": dev_wer(folder),
        "joint_steps": report["steps"],
        "selected_step": report["best_step"],
        "expert_steps": [],
        "trained_parameters": report["trained_parameters"],
        "seconds": summary["seconds"],
        **{key: summary[key] for key in RATES},
        **{key: report[key] for key in ROUTING if key in report},
        "by_etiology": {name: {key: one[key] for key in RATES} for name, one in summary["by_etiology"].items()},
    }
    stages = {task["stage"] for task in record["tasks"].values()}
    if "experts" in stages:
        folders = stage_folders(store, record, "experts", cache_folder())
        found["expert_steps"] = [read_object(one / "report.json")["steps"] for one in folders]
        clusters = read_object(stage_folders(store, record, "cluster", cache_folder())[0] / "report.json")
        found["clusters"] = {key: clusters[key] for key in ("sizes", "purity", "adjusted_rand", "noise_share")}
    return found


def dev_wer(folder: Path) -> float:
    """Of the weights that were kept: what a learning rate is chosen by."""
    rows = read_rows(folder / "metrics.jsonl")
    return min(float(row["wer"]) for row in rows if row["split"] == "dev" and "wer" in row)


def overview(seen: Mapping[str, Any], unseen: Mapping[str, Any], facts: Mapping[str, Sequence[Any]]) -> str:
    """The main table in Markdown, the best regime first."""
    reference = seen["reference"]
    lines = [
        f"| regime | WER | 95% | minus {reference} | WER of seeds | CER | WER unseen | WER dev | steps | weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    others = {one["name"]: one for one in unseen["systems"]}
    for one in sorted(seen["systems"], key=lambda system: system["wer"]):
        delta = (one["difference"] or {}).get("wer")
        runs = facts.get(one["name"], [])
        cells = [
            one["name"],
            f"{one['wer']:.1%}",
            _span(one["wer_interval"]),
            f"{delta['delta']:+.1%} ({_span((delta['low'], delta['high']), '+')})" if delta else "",
            ", ".join(f"{run['wer']:.1%}" for run in one["runs"]) if runs else "",
            f"{one['cer']:.1%}",
            f"{others[one['name']]['wer']:.1%}",
        ]
        if runs:
            before = f"{sum(runs[0]['expert_steps'])} + " if runs[0]["expert_steps"] else ""
            cells += [f"{sum(run['dev_wer'] for run in runs) / len(runs):.1%}", f"{before}{runs[0]['joint_steps']}"]
            cells.append(f"{runs[0]['trained_parameters']:,}")
        lines.append("| " + " | ".join([*cells, "", "", ""][:10]) + " |")
    return "\n".join(lines)


def by_etiology(seen: Mapping[str, Any]) -> str:
    """WER by etiology in Markdown."""
    systems = sorted(seen["systems"], key=lambda system: system["wer"])
    groups = list(systems[0]["by_etiology"])
    lines = ["| regime | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for one in systems:
        lines.append(f"| {one['name']} | " + " | ".join(f"{one['by_etiology'][g]['wer']:.1%}" for g in groups) + " |")
    return "\n".join(lines)


def _span(interval: Sequence[float], sign: str = "") -> str:
    return f"{interval[0]:{sign}.1%} to {interval[1]:{sign}.1%}"


if __name__ == "__main__":
    main()
