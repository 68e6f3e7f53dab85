"""`python -m bench.scale`: the bookkeeping of a corpus of a million utterances, without audio and without training.

Index, subsets, examples, batches of an epoch, table of embeddings, clustering, plan; each in a process of its own, so
that its memory is its own, at the wanted size and at a tenth of it, so that what grows faster than the corpus shows.
The objects in the store and the size of the Workflow follow from their parts.

Shape letters: N utterances, D embedding width, B rows of a chunk.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.scale_parts import Row, objects, workflow_size

if TYPE_CHECKING:  # torch, which some steps import, would count as memory of the others
    from common.config import Config
    from common.data.corpus import Corpus, Utterance

RESULTS = Path(__file__).parent / "results" / "scale.json"
ETIOLOGIES = ("Parkinson's Disease", "ALS", "Cerebral Palsy", "Down Syndrome", "Stroke")
SAID = """the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot
but some what there we can out other were all your when up use word how said an each she which do their time if will way
about many then them would write like so these her long make thing see him two has look more day could go come"""
WORDS = tuple(SAID.split())
PER_SPEAKER = 380  # as in the Speech Accessibility Project: 308,909 utterances of 833 speakers
MEAN_SECONDS, WORDS_PER_SECOND = 8.0, 2.2
TRAIN = 0.8  # of all utterances; dev and test have a tenth each
EXPERTS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the steps at both sizes, prints a table, writes the JSON file."""
    parser = argparse.ArgumentParser(prog="bench.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1280, help="of an embedding; 1280 is a large Whisper's")
    parser.add_argument("--model", type=Path, default=Path("models/whisper-tiny.en"), help="whose tokenizer is used")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--together", action="store_true", help="in one process: quick, but memory adds up")
    parser.add_argument("--step", choices=STEPS, help="one step alone, in this process; prints its rows as JSON")
    parser.add_argument("--folder", type=Path, help="of the step's files")
    options = parser.parse_args(arguments)
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options.utterances, options.width, options.model)))
        return
    rows: list[Row] = []
    sizes = (options.utterances // 10, options.utterances)
    report: Row = {
        "machine": _machine(),
        "utterances": options.utterances,
        "width": options.width,
        "store": [objects(size, EXPERTS) for size in sizes],
        "workflow": [workflow_size(pieces) for pieces in (10, 100, 1000)],
    }
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for step, run in STEPS.items():
                place = Path(folder), size, options.width, options.model.resolve()
                found = run(*place) if options.together else _in_a_process(step, *place)
                rows += [{"step": row.pop("step"), "utterances": size, **row} for row in found]
                report["rows"] = with_growth(rows)
                write(options.out, report)  # after each step: what is cut off leaves what it had
    print(table(report))


def write(path: Path, report: Row) -> None:
    """The JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_a_process(step: str, folder: Path, size: int, width: int, model: Path) -> list[Row]:
    print(f"{step} of {size:,} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "bench.scale", "--step", step, "--folder", str(folder)]
    command += ["--utterances", str(size), "--width", str(width), "--model", str(model)]
    environment = os.environ | {"MOE_ASR_CACHE": str(folder / "cache")}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root, env=environment)
    return list(json.loads(done.stdout))


def with_growth(rows: Sequence[Row]) -> list[Row]:
    """Each row of the larger size with the power of the size that its seconds grow with (1: proportionally)."""
    smaller: dict[str, Row] = {}
    found = []
    for row in rows:
        before = smaller.setdefault(row["step"], row)
        power = None
        if before is not row and min(before["seconds"], row["seconds"]) > 0:
            ratio = row["utterances"] / before["utterances"]
            power = round(float(np.log(row["seconds"] / before["seconds"]) / np.log(ratio)), 2)
        found.append(row | {"growth": power})
    return found


def table(report: Mapping[str, Any]) -> str:
    """Markdown of all rows."""
    lines = ["| step | utterances | seconds | grows as | peak GiB | |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        power = "" if row["growth"] is None else f"N^{row['growth']:.2f}"
        cells = [
            row["step"],
            f"{row['utterances']:,}",
            f"{row['seconds']:.2f}",
            power,
            f"{row['gib']:.2f}",
            row["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for one in report["store"]:
        lines.append(f"\nstore, {one['utterances']:,} utterances: {one['objects']:,} objects")
    for one in report["workflow"]:
        lines.append(f"workflow of {one['pieces']} pieces: {one['bytes']:,} bytes, {one['compressed']:,} compressed")
    return "\n".join(lines)


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"


# ---- steps, each in a process of its own ----


@contextmanager
def measured(rows: list[Row], step: str, note: str = "") -> Iterator[Row]:
    """Adds a row with the block's time and the process's peak of memory so far; the block may add to its note."""
    row: Row = {"step": step, "note": note}
    started = time.perf_counter()
    yield row
    row["seconds"] = round(time.perf_counter() - started, 3)
    row["gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
    rows.append(row)


def utterances(count: int, seed: int = 0) -> Iterator[Utterance]:
    """Speakers of 380 utterances (a small corpus: fifty speakers), a tenth of them in dev and a tenth in test."""
    from common.data.corpus import Utterance

    generator, each = np.random.default_rng(seed), min(PER_SPEAKER, max(1, count // 50))
    duration_N = np.clip(generator.lognormal(np.log(MEAN_SECONDS) - 0.18, 0.6, count), 0.5, 29.9).round(3)
    for number, duration in enumerate(duration_N.tolist()):
        speaker = number // each
        name = f"{speaker:08x}-5c0b-4d6e-9f2a-{speaker * 7919 % 2**48:012x}"
        words = generator.integers(0, len(WORDS), max(1, int(WORDS_PER_SECOND * duration)))
        yield Utterance(
            id=f"{name}_{number % each}_4308",
            audio_filepath=f"{name}/{name}_{number % each}_4308.wav",
            duration=duration,
            text=" ".join(WORDS[i] for i in words),
            split="dev" if speaker % 10 == 8 else "test" if speaker % 10 == 9 else "train",
            speaker=name,
            etiology=ETIOLOGIES[speaker % 5],
            severity=f"intelligibility {1 + speaker % 7}",
        )


def settings(folder: Path) -> Config:
    """The configuration of a full run on this corpus."""
    from common.config import resolve

    places = {"corpus.path": str(folder / "corpus"), "store": str(folder / "store"), "num_experts": EXPERTS}
    return resolve("full", options=places)


def simulated(folder: Path, count: int) -> Corpus:
    """The corpus as it would be read from its index, which takes longer."""
    from common.data.corpus import Corpus

    return Corpus(folder / "corpus", tuple(sorted(utterances(count), key=lambda u: u.id)), "0" * 64)


def step_index(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """Writes the index, reads it back."""
    from common.data.corpus import INDEX_NAME, write_index

    rows: list[Row] = []
    made = list(utterances(count))
    with measured(rows, "write the index") as row:
        write_index(folder / "corpus", made)
        row["bytes"] = (folder / "corpus" / INDEX_NAME).stat().st_size
        row["note"] = f"{row['bytes'] / 1e6:,.0f} MB"
    del made
    return rows


def step_read(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """Reads the index."""
    from common.data.corpus import read_corpus

    rows: list[Row] = []
    with measured(rows, "read the index", "with its digest"):
        corpus = read_corpus(folder / "corpus")
    assert len(corpus.utterances) == count
    return rows


def step_subsets(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """All subsets of a run."""
    from common.data.subsets import embedded_utterances, training_subset

    rows: list[Row] = []
    corpus, config = simulated(folder, count), settings(folder)
    with measured(rows, "subsets") as row:
        clustered = training_subset(config, corpus, "embeddings")
        experts = training_subset(config, corpus, "experts")
        embedded = embedded_utterances(config, corpus)
        row["note"] = f"{len(clustered):,} to cluster, {len(experts):,} for experts, {len(embedded):,} to embed"
    return rows


def step_plan(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """What `moe-asr plan` does, on an empty store."""
    from stages.local_runner import Run

    rows: list[Row] = []
    with measured(rows, "plan") as row:
        made = Run(settings(folder), f"sha256:{'0' * 64}").plan()
        row["note"] = f"{len(made.planned)} pieces known, {len(made.open_ended)} stages open; reads the index"
    return rows


def step_batches(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """Tokens of the training split and the batches of two epochs."""
    from common.data.batches import AudioDataset, epoch_batches, make_examples
    from common.data.subsets import training_subset
    from common.data.tokens import load_codec

    rows: list[Row] = []
    corpus, config, codec = simulated(folder, count), settings(folder), load_codec(model)
    train = training_subset(config, corpus, "asr")
    with measured(rows, "examples", f"{len(train):,} tokenised"):
        examples = make_examples(corpus, train, codec, context=config.audio.context, margin=config.audio.margin)
    for epoch, size in ((0, None), (1, 240.0)):
        with measured(rows, "batches by number" if size is None else "batches by seconds") as row:
            batches = epoch_batches(examples, batch_size=8, batch_seconds=size, seed=42, epoch=epoch)
            row["note"] = f"{len(batches):,} of an epoch"
    with measured(rows, "examples to a loader") as row:
        row["bytes"] = len(pickle.dumps(AudioDataset(examples)))
        row["note"] = f"{row['bytes'] / 1e6:,.0f} MB are sent to each loader process"
    return rows


def step_embeddings(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """The table of embeddings: written in shards, read, and its rows for the training split taken."""
    from common.clustering.embeddings import read_tables, write_table
    from common.data.subsets import embedded_utterances, training_subset

    rows: list[Row] = []
    corpus, config = simulated(folder, count), settings(folder)
    ids = [u.id for u in embedded_utterances(config, corpus)]
    train = [u.id for u in training_subset(config, corpus, "asr")]
    size = config.extract.shard_size
    folders = [folder / "embeddings" / str(i) for i in range(0, len(ids), size)]
    generator = np.random.default_rng(0)
    with measured(rows, "write embeddings", f"{len(folders)} shards, {len(ids) * width * 4 / 1e9:.2f} GB"):
        for place, start in zip(folders, range(0, len(ids), size), strict=True):
            part = ids[start : start + size]
            write_table(place, part, generator.standard_normal((len(part), width), np.float32))
    with measured(rows, "read embeddings", "all shards"):
        whole = read_tables(folders)
    with measured(rows, "embeddings of train", f"{len(train):,} rows, {len(train) * width * 4 / 1e9:.2f} GB"):
        taken_ND = whole.rows(train)
    assert taken_ND.shape == (len(train), width)
    return rows


def step_cluster(folder: Path, count: int, width: int, model: Path) -> list[Row]:
    """Clusters as many random embeddings as the subset has."""
    from bench.clustering import write_embeddings
    from common.clustering.cluster import cluster

    rows: list[Row] = []
    config = settings(folder)
    size = round(TRAIN * count * config.subsets.embeddings_percent / 100)
    write_embeddings(folder / "points.npy", size, width)
    points_ND = np.load(folder / "points.npy", mmap_mode="r")
    options = config.cluster
    cluster(points_ND[:200], num_clusters=2, algorithm="hdbscan", reduce="pca", reduce_dim=9, allow_reduce=True, seed=1)
    with measured(rows, "cluster") as row:
        found = cluster(
            points_ND,
            num_clusters=EXPERTS,
            algorithm="hdbscan",
            reduce="pca",
            reduce_dim=options.reduce_dim,
            min_cluster_size=options.min_cluster_size,
            min_samples=options.min_samples,
            allow_reduce=True,
            seed=config.seed,
        )
        row["note"] = f"{size:,} × {width}, PCA and HDBSCAN: {len(found.centroids_KD)} clusters"
    return rows


Step = Callable[[Path, int, int, Path], list[Row]]
STEPS: dict[str, Step] = {
    "index": step_index,
    "read": step_read,
    "subsets": step_subsets,
    "plan": step_plan,
    "batches": step_batches,
    "embeddings": step_embeddings,
    "cluster": step_cluster,
}


if __name__ == "__main__":
    main()
