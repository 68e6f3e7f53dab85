"""The results of sweeps over several seeds: on the groups that are in the training data, and on the one that is not.

python -m bench.regimes --store runs --sweep bench bench-speaker="gate on the labels"     adds runs of a store
python -m bench.regimes                                                                   computes the summary again

A sweep's runs are NAME-REGIME-sSEED; --sweep NAME adds all of them, --sweep NAME-REGIME one regime. A label after it
stands behind the regime's name.

bench/results/regimes.json holds, for each corpus, the utterances of its test set; for each run, what it was made with
and its word errors by utterance; and `summary`, one row for each corpus, number of steps and regime, which is computed
from them. What `bench.peft` wrote beside the runs of a sweep is the regime `peft`.

Runs that were added before word errors were part of the file have rates alone; their rows of the summary stay as they
are. `make generate` writes the tables of docs/regimes.md from the summary.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.peft import FACTS, TEST
from bench.results_file import (
    RESAMPLES,
    RESULTS,
    read_results,
    tested_utterances,
    to_scores,
    word_errors,
    write_results,
)
from common.config import Config, flatten
from common.errors import DataError
from common.evaluation.compare import compare
from common.evaluation.results import Result, before_training, read_result
from common.json_files import Row, read_object, read_rows
from common.pipeline.runs import run_names, run_record, stage_folders
from common.storage import open_store
from common.storage.store import Store
from stages.local_runner import cache_folder
from stages.sweep import REGIMES

BASE, PEFT = "base", "peft"
REFERENCES = ("dense", "dense-plain", PEFT)  # that all regimes of a budget are compared with


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads runs, adds them to the file, and computes its summary."""
    parser = argparse.ArgumentParser(prog="bench.regimes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", default="runs")
    parser.add_argument("--sweep", nargs="*", default=[], metavar="NAME[=LABEL]")
    parser.add_argument("--unseen", default="island", help="etiology that is not in the training data")
    parser.add_argument("--results", type=Path, default=RESULTS / "regimes.json")
    options = parser.parse_args(arguments)
    empty: Row = {"unseen_etiology": options.unseen, "corpora": {}, "runs": [], "summary": []}
    value = read_results(options.results, empty)
    store = open_store(options.store)
    for sweep in options.sweep:
        name, _, label = sweep.partition("=")
        for run in [*finished_runs(store, name), *peft_folders(store, name)]:
            add_run(value, run | {"regime": f"{run['regime']}, {label}" if label else run["regime"]}, store)
    write_results(options.results, value | {"summary": summarise(value)})


def finished_runs(store: Store, sweep: str) -> Iterable[Row]:
    """Name, regime, corpus and facts of the finished runs of a sweep, except the number of steps."""
    for name in run_names(store):
        regime = regime_of(name, sweep)
        record = run_record(store, name) if regime else None
        if record and record["status"] == "done":
            corpus = Path(record["config"]["corpus"]["path"]).name
            yield {"run": name, "corpus": corpus, "regime": regime} | run_facts(store, name, record)


def regime_of(run: str, sweep: str) -> str | None:
    """The regime of a run NAME-REGIME-sSEED if it belongs to the sweep, given as NAME or NAME-REGIME."""
    match = re.fullmatch(r"(.+)-s\d+", run)
    for regime in sorted(REGIMES, key=len, reverse=True) if match else ():
        if match and match[1].endswith(f"-{regime}"):
            return regime if sweep in (match[1], match[1].removesuffix(f"-{regime}")) else None
    return None


def peft_folders(store: Store, sweep: str) -> Iterable[Row]:
    """The same of what `bench.peft` wrote beside them, with their steps, which are not among an evaluation's facts."""
    root = store.local_path("")
    for path in sorted(root.glob(f"{sweep}-{PEFT}-s*/{FACTS}")) if root else ():
        made = read_object(path)
        facts = {key: made[key] for key in ("steps", "seed", "learning_rate", "rank", "dev_wer", "seconds")}
        facts["trained_parameters"] = made["trained_parameters"]
        yield {"run": str(path.parent), "corpus": Path(made["corpus"]).name, "regime": PEFT} | facts


def run_facts(store: Store, name: str, record: Row) -> Row:
    """What a run was made with, and what it cost."""
    config, (folder,) = record["config"], stage_folders(store, record, "asr", cache_folder())
    report, summary = read_object(folder / "report.json"), json.loads(store.read(f"{name}/summary.json"))
    return {
        "seed": config["seed"],
        "learning_rate": config["asr"]["learning_rate"],
        "rank": None if config["asr"]["adapt"] == "full" else config["lora"]["rank"],
        "dev_wer": dev_wer(folder),
        "seconds": training_seconds(folder, summary["seconds"]),
        "trained_parameters": report["trained_parameters"],
    }


def training_seconds(folder: Path, stages: Mapping[str, float]) -> float:
    """Seconds of the training loop and of all stages before it, without the scoring of dev and test: as `peft.json`."""
    before = sum(seconds for stage, seconds in stages.items() if stage != "asr")
    return before + float(read_object(folder / "throughput.json")["training_seconds"])


def dev_wer(folder: Path) -> float:
    """Of the weights that were kept, evaluated ones or their mean: what a learning rate is chosen by."""
    rows = read_rows(folder / "metrics.jsonl")
    return min(float(row["wer"]) for row in rows if row["split"] in ("dev", "average") and "wer" in row)


def add_run(value: Row, run: Row, store: Store) -> None:
    """Adds a run with its word errors by utterance, in place of an earlier one of this regime and seed.

    Raises:
        DataError: it was tested on other utterances than the runs of this corpus in the file.
    """
    path = Path(run["run"])
    peer = (path / FACTS).is_file()
    result = read_result(str(path / TEST) if peer else run["run"], store=store, cache=cache_folder())
    rows = sorted(result.rows, key=lambda row: str(row["id"]))
    scores = [result.scores[str(row["id"])] for row in rows]
    columns = {"speakers": [row["speaker"] for row in rows], "etiologies": [row["etiology"] for row in rows]}
    tested = tested_utterances(scores, **columns)
    corpora: Row = value["corpora"]
    if corpora.setdefault(run["corpus"], tested) != tested:
        raise DataError(f"{run['run']} was not tested on the same utterances as the other runs on {run['corpus']}")
    run = {"steps": result.facts.get("steps")} | run | {"run": path.name, "errors": word_errors(scores)}
    own = [run]
    if not peer:
        base = before_training(result).scores
        of_base = {"run": BASE, "corpus": run["corpus"], "regime": BASE, "steps": 0, "seed": None}
        own.append(of_base | {"errors": word_errors([base[score.id] for score in scores])})
    which = {identity(row) for row in own}
    value["runs"] = [row for row in value["runs"] if identity(row) not in which] + own


def identity(run: Row) -> tuple[Any, ...]:
    """What the file has one run of."""
    return tuple(run[key] for key in ("corpus", "steps", "regime", "seed"))


def summarise(value: Row) -> list[Row]:
    """One row for each corpus, number of steps and regime, with rates as fractions.

    `wer` is of the groups that are in the training data, `minus_X` the difference from regime X at the same budget.
    """
    budgets: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for run in value["runs"]:
        if run["regime"] != BASE:
            budgets.setdefault((run["corpus"], run["steps"]), {}).setdefault(run["regime"], []).append(run)
    earlier = {(row["corpus"], row["steps"], row["regime"]): row for row in value["summary"]}
    summary = []
    for (corpus, steps), regimes in sorted(budgets.items()):
        base = [run for run in value["runs"] if (run["corpus"], run["regime"]) == (corpus, BASE)]
        whole = {name: runs for name, runs in regimes.items() if all("errors" in run for run in runs)}
        computed = compared((corpus, steps), ({BASE: base} if base else {}) | whole, value) if whole else {}
        for name in (BASE, *sorted(regimes, key=regime_order)):
            if name in computed:
                summary.append(computed[name])
            elif (row := earlier.get((corpus, steps, name))) is not None:
                summary.append(row)
    return summary


def regime_order(name: str) -> tuple[bool, bool, int, str]:
    """The default first, then in the order of `moe-asr sweep`, the peer after them; rows of an earlier recipe last."""
    plain, _, label = name.partition(", ")
    number = list(REGIMES).index(plain) if plain in REGIMES else len(REGIMES)
    return label.startswith("earlier"), not is_default(name), number, name


def compared(budget: tuple[str, int], regimes: Mapping[str, Sequence[Row]], value: Row) -> dict[str, Row]:
    """regime → its row of the summary, from word errors by utterance."""
    corpus, steps = budget
    systems = {name: [as_result(run, value["corpora"][corpus]) for run in runs] for name, runs in regimes.items()}
    seen, unseen = (only(systems, value["unseen_etiology"], wanted=wanted) for wanted in (False, True))
    there = [name for name in REFERENCES if name in systems] or [next(iter(systems))]
    tables = {name: compare(seen, reference=name, resamples=RESAMPLES) for name in there}
    held_out = {name: results for name, results in unseen.items() if results[0].rows}
    apart = compare(held_out, reference=there[0], resamples=RESAMPLES) if held_out else {"systems": ()}
    others = {other["name"]: other["wer"] for other in apart["systems"]}
    rows = {}
    for system in next(iter(tables.values()))["systems"]:
        name, runs = system["name"], regimes[system["name"]] if system["name"] != BASE else ()
        worst, rates = max(system["by_etiology"].items(), key=lambda item: item[1]["wer"])
        row = {"corpus": corpus, "steps": steps, "regime": name, "default": is_default(name)}
        row |= {"seeds": len(runs), "wer": system["wer"], "wer_interval": system["wer_interval"]}
        row["wer_of_seeds"] = [run["wer"] for run in system["runs"]] if runs else []
        row["wer_dev"] = _mean([run["dev_wer"] for run in runs])
        row["seconds"] = _mean([run["seconds"] for run in runs])
        row |= {"worst_group": rates["wer"], "worst_group_name": worst, "wer_unseen": others.get(name)}
        row |= {f"minus_{reference}": _difference(tables.get(reference), name) for reference in REFERENCES}
        row["unseen_minus_dense"] = _difference(apart if held_out and "dense" in systems else None, name)
        rows[name] = row
    return rows


def as_result(run: Row, tested: Mapping[str, Sequence[Any]]) -> Result:
    """A run's word errors in the form that `compare` takes."""
    columns = zip(tested["ids"], tested["speakers"], tested["etiologies"], strict=True)
    rows = [{"id": id, "speaker": speaker, "etiology": group, "reference": ""} for id, speaker, group in columns]
    return Result(run["run"], rows, {score.id: score for score in to_scores(tested, run["errors"])}, {})


def only(systems: Mapping[str, Sequence[Result]], etiology: str, *, wanted: bool) -> dict[str, list[Result]]:
    """The same results on one etiology alone, or on all others."""

    def part(result: Result) -> Result:
        rows = [row for row in result.rows if (row["etiology"] == etiology) == wanted]
        return replace(result, rows=rows, scores={str(row["id"]): result.scores[str(row["id"])] for row in rows})

    return {name: [part(result) for result in results] for name, results in systems.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


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


if __name__ == "__main__":
    main()
