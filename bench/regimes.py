"""The tables of sweeps over several seeds: `moe-asr compare` on the groups that training heard, and the unseen one.

python -m bench.regimes --store runs --sweep bench bench-long alike     reads the runs bench-REGIME-sSEED, … of a store

Runs are compared with those of the same corpus and the same number of steps. The regimes of the first sweep with a
corpus and a budget go by their names, those of another (another rank) by `REGIME, SWEEP`. What `bench.peft` wrote
beside the runs of a sweep is the regime `peft`.

Prints tables in Markdown and writes bench/results/regimes.json, whose `summary` has one row for each corpus, number of
steps and regime.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.peft import FACTS, TEST
from common.config import Config, flatten
from common.evaluation.compare import compare
from common.evaluation.results import Result, before_training, read_result
from common.json_files import Row, read_object, read_rows
from common.pipeline.runs import run_names, run_record, stage_folders
from common.storage import open_store
from common.storage.store import Store
from stages.local_runner import cache_folder
from stages.sweep import REGIMES

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 4000
RATES = ("wer_before", "wer_after", "cer_before", "cer_after", "wer_interval_before", "wer_interval_after")
ROUTING = ("experts", "top_k", "load", "router_entropy", "top1_share", "collapsed")
PEFT = "peft"
Budget = tuple[str, int]  # corpus, optimiser steps in all


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads, compares, prints, writes."""
    parser = argparse.ArgumentParser(prog="bench.regimes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", default="runs")
    parser.add_argument("--sweep", nargs="+", default=["bench"])
    parser.add_argument("--against", default="dense", help="what the others are compared with")
    parser.add_argument("--unseen", default="island", help="etiology that no training heard")
    parser.add_argument("--results", type=Path, default=RESULTS / "regimes.json")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    groups = group_runs(store, options.sweep)
    facts = {run: run_facts(store, run) for group in groups.values() for runs in group.values() for run in runs}
    tables, summary = [], []
    for (corpus, steps), names in groups.items():
        systems = read_systems(store, names)
        reference = options.against if options.against in systems else next(iter(names))
        seen, unseen = compare_parts(systems, reference, options.unseen)
        against = {
            name: seen if name == reference else compare_parts(systems, name, options.unseen)[0]
            for name in ("dense", PEFT)
            if name in systems
        }
        tables.append({"corpus": corpus, "steps": steps, "seen": seen, "unseen": unseen})
        own = {regime: [facts[run] for run in runs] for regime, runs in names.items()}
        summary += summary_rows((corpus, steps), seen, unseen, against, own)
        print(f"## {corpus}, {steps} steps", overview(seen, unseen, own), by_etiology(seen), sep="\n\n", end="\n\n")
    value = {"sweeps": options.sweep, "unseen_etiology": options.unseen, "summary": summary}
    value |= {"comparisons": tables, "runs": facts}
    options.results.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def group_runs(store: Store, sweeps: Sequence[str]) -> dict[Budget, dict[str, list[str]]]:
    """(corpus, steps) → regime → its finished runs by seed, and the folders that `bench.peft` wrote."""
    groups: dict[Budget, dict[str, list[str]]] = {}
    first: dict[Budget, str] = {}  # sweep
    for sweep in sweeps:
        for regime, run, budget in [*finished_runs(store, sweep), *peft_folders(store, sweep)]:
            label = regime if first.setdefault(budget, sweep) == sweep else f"{regime}, {sweep}"
            groups.setdefault(budget, {}).setdefault(label, []).append(run)
    return groups


def finished_runs(store: Store, sweep: str) -> Iterable[tuple[str, str, Budget]]:
    """Regime, name, corpus and steps of the finished runs of a sweep."""
    for name in run_names(store):
        match = re.fullmatch(rf"{re.escape(sweep)}-(.+)-s\d+", name)
        record = run_record(store, name) if match else None
        if match and match[1] in REGIMES and record and record["status"] == "done":
            steps = read_result(name, store=store, cache=cache_folder()).facts["steps"]
            yield match[1], name, (Path(record["config"]["corpus"]["path"]).name, steps)


def peft_folders(store: Store, sweep: str) -> Iterable[tuple[str, str, Budget]]:
    """The same of what `bench.peft` wrote beside them."""
    root = store.local_path("")
    for path in sorted(root.glob(f"{sweep}-{PEFT}-s*/{FACTS}")) if root else ():
        facts = read_object(path)
        yield PEFT, str(path.parent), (Path(facts["corpus"]).name, facts["steps"])


def read_systems(store: Store, names: Mapping[str, Sequence[str]]) -> dict[str, list[Result]]:
    """regime → results of its runs, the untrained base first where a run measured it."""
    systems = {
        regime: [read_result(_tested(run), store=store, cache=cache_folder()) for run in runs]
        for regime, runs in names.items()
    }
    own = next((results[0] for regime, results in systems.items() if not regime.startswith(PEFT)), None)
    return ({"base": [before_training(own)]} if own else {}) | systems


def _tested(run: str) -> str:
    """What to read the test set's results of: a run's name, or the folder of an evaluation."""
    return str(Path(run) / TEST) if (Path(run) / FACTS).is_file() else run


def compare_parts(systems: Mapping[str, Sequence[Result]], reference: str, unseen: str) -> tuple[Row, Row | None]:
    """The comparison on the groups that training heard, and that on the unseen one, if the test set has it."""
    heard = compare(only(systems, unseen, wanted=False), reference=reference, resamples=RESAMPLES)
    others = only(systems, unseen, wanted=True)
    there = bool(next(iter(others.values()))[0].rows)
    return heard, compare(others, reference=reference, resamples=RESAMPLES) if there else None


def summary_rows(
    budget: Budget,
    seen: Row,
    unseen: Row | None,
    against: Mapping[str, Row],
    facts: Mapping[str, Sequence[Row]],
) -> list[Row]:
    """One row for each regime: rates as fractions, and its differences from dense LoRA and from the peer.

    Args:
        against: regime → the comparison of the heard groups with it.
        facts: regime → `run_facts` of its seeds.
    """
    rows, others = [], {other["name"]: other["wer"] for other in (unseen or {"systems": ()})["systems"]}
    for system in seen["systems"]:
        name, runs = system["name"], facts.get(system["name"], [])
        worst = max(system["by_etiology"].items(), key=lambda item: item[1]["wer"])
        row = {"corpus": budget[0], "steps": budget[1], "regime": name, "default": is_default(name)}
        row |= {"seeds": len(runs), "wer": system["wer"], "wer_interval": system["wer_interval"]}
        row["wer_dev"] = sum(run["dev_wer"] for run in runs) / len(runs) if runs else None
        row["seconds"] = sum(run["seconds"] for run in runs) / len(runs) if runs else None
        row |= {"worst_group": worst[1]["wer"], "worst_group_name": worst[0]}
        row["wer_unseen"] = others.get(name)
        for reference in ("dense", PEFT):
            row[f"minus_{reference}"] = _difference(against.get(reference), name)
        rows.append(row)
    return rows


def _difference(comparison: Row | None, name: str) -> Row | None:
    """WER less that of the reference with its interval; None for the reference itself, or without one."""
    if comparison is None:
        return None
    difference = next(system["difference"] for system in comparison["systems"] if system["name"] == name)
    return {key: difference["wer"][key] for key in ("delta", "low", "high")} if difference else None


def is_default(name: str) -> bool:
    """Whether a regime is what `moe-asr run` trains by default."""
    values = dict(flatten(Config().model_dump()))
    regime = REGIMES.get(name)
    return regime is not None and not regime.dense and all(values[k] == v for k, v in regime.settings.items())


def only(systems: Mapping[str, Sequence[Result]], etiology: str, *, wanted: bool) -> dict[str, list[Result]]:
    """The same results on one etiology alone, or on all others."""

    def part(result: Result) -> Result:
        rows = [row for row in result.rows if (row["etiology"] == etiology) == wanted]
        return replace(result, rows=rows, scores={str(row["id"]): result.scores[str(row["id"])] for row in rows})

    return {name: [part(result) for result in results] for name, results in systems.items()}


def run_facts(store: Store, run: str) -> dict[str, Any]:
    """What a run was made with, what it cost and what came of it."""
    if (Path(run) / FACTS).is_file():
        made = read_object(Path(run) / FACTS)
        return made | {"joint_steps": made["steps"], "expert_steps": []}
    record = run_record(store, run)
    config = record["config"]
    (folder,) = stage_folders(store, record, "asr", cache_folder())
    report, summary = read_object(folder / "report.json"), json.loads(store.read(f"{run}/summary.json"))
    facts = {
        "seed": config["seed"],
        "learning_rate": config["asr"]["learning_rate"],
        "rank": None if config["asr"]["adapt"] == "full" else config["lora"]["rank"],
        "dev_wer": dev_wer(folder),
        "joint_steps": report["steps"],
        "selected_step": report["best_step"],
        "expert_steps": [],
        "trained_parameters": report["trained_parameters"],
        "seconds": training_seconds(folder, summary["seconds"]),
        **{key: summary[key] for key in RATES},
        **{key: report[key] for key in ROUTING if key in report},
        "by_etiology": {name: {key: rates[key] for key in RATES} for name, rates in summary["by_etiology"].items()},
    }
    stages = {task["stage"] for task in record["tasks"].values()}
    for stage in sorted(stages & {"shared", "experts"}, reverse=True):
        folders = stage_folders(store, record, stage, cache_folder())
        facts["expert_steps"] += [read_object(expert / "report.json")["steps"] for expert in folders]
    if "cluster" in stages:
        clusters = read_object(stage_folders(store, record, "cluster", cache_folder())[0] / "report.json")
        facts["clusters"] = {key: clusters[key] for key in ("sizes", "purity", "adjusted_rand", "noise_share")}
    return facts


def training_seconds(folder: Path, stages: Mapping[str, float]) -> float:
    """Seconds of the training loop and of all stages before it, without the scoring of dev and test: as `peft.json`."""
    before = sum(seconds for stage, seconds in stages.items() if stage != "asr")
    return before + float(read_object(folder / "throughput.json")["training_seconds"])


def dev_wer(folder: Path) -> float:
    """Of the weights that were kept: what a learning rate is chosen by."""
    rows = read_rows(folder / "metrics.jsonl")
    return min(float(row["wer"]) for row in rows if row["split"] == "dev" and "wer" in row)


def overview(seen: Mapping[str, Any], unseen: Mapping[str, Any] | None, facts: Mapping[str, Sequence[Any]]) -> str:
    """The main table in Markdown, the best regime first."""
    reference = seen["reference"]
    lines = [
        f"| regime | WER | 95% | minus {reference} | WER of seeds | CER | WER unseen | WER dev | steps | weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    others = {system["name"]: system for system in (unseen or {"systems": ()})["systems"]}
    for system in sorted(seen["systems"], key=lambda system: system["wer"]):
        delta = (system["difference"] or {}).get("wer")
        runs = facts.get(system["name"], [])
        cells = [
            system["name"],
            f"{system['wer']:.1%}",
            _span(system["wer_interval"]),
            f"{delta['delta']:+.1%} ({_span((delta['low'], delta['high']), '+')})" if delta else "",
            ", ".join(f"{run['wer']:.1%}" for run in system["runs"]) if runs else "",
            f"{system['cer']:.1%}",
            f"{others[system['name']]['wer']:.1%}" if others else "",
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
    for system in systems:
        lines.append(
            f"| {system['name']} | " + " | ".join(f"{system['by_etiology'][g]['wer']:.1%}" for g in groups) + " |"
        )
    return "\n".join(lines)


def _span(interval: Sequence[float], sign: str = "") -> str:
    return f"{interval[0]:{sign}.1%} to {interval[1]:{sign}.1%}"


if __name__ == "__main__":
    main()
