"""Rows of clustering: embeddings in a file → PCA → HDBSCAN, against the `hdbscan` package on the same reduced points.

Each run is a process of its own (`python -m bench.clustering ours|hdbscan FILE`), so that its memory is its own; the
package runs with its defaults for Euclidean data (a space tree, an approximate spanning tree, all processors).

Shape letters: N utterances, D embedding width, B rows of a chunk.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch, which they import, would count as memory of the clustering
    from bench.measure import Row
    from bench.setting import Setting

REDUCE_DIM = 50
MIN_SAMPLES = MIN_CLUSTER_SIZE = 5
SECONDS_LIMIT, GIB_LIMIT, ARI_LIMIT = 40.0, 1.5, 0.99
FRAMES = 1500  # of 30 s, which clustering without pooling would load
SIZES = {"quick": ((200, 400, 800), 96)}  # setting → (sizes, width)
FULL_SIZES = ((10_000, 30_000, 100_000), 1280)


def rows(setting: Setting | None = None) -> list[Row]:
    """Measures; the largest size is ours alone, and the peer's there follows from its two smaller ones."""
    (small, middle, large), width = SIZES.get(setting.name, FULL_SIZES) if setting else FULL_SIZES
    repetitions = setting.repetitions if setting else 3
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "embeddings.npy"
        write_embeddings(whole, large, width)
        runs = _compete(whole, (small, middle), repetitions)
        final = [_run("ours", whole) for _ in range(repetitions)]
    ours = {N: _median(runs["ours", N], "cluster_seconds") for N in (small, middle)}
    peer = {N: _median(runs["hdbscan", N], "cluster_seconds") for N in (small, middle)}
    power = np.log(peer[middle] / peer[small]) / np.log(middle / small)
    guess = peer[middle] * (large / middle) ** power
    reduction = _median(final, "reduce_seconds")
    return _table(
        sizes=(small, middle, large),
        width=width,
        seconds=[(ours[N], peer[N]) for N in (small, middle)],
        guess=(float(guess), float(power)),
        final=(reduction, _median(final, "cluster_seconds"), max(run["gib"] for run in final)),
        agreement=_agreement(runs["ours", small][0]["labels"], runs["hdbscan", small][0]["labels"]),
    )


def _table(
    *,
    sizes: tuple[int, int, int],
    width: int,
    seconds: list[tuple[float, float]],
    guess: tuple[float, float],
    final: tuple[float, float, float],
    agreement: float,
) -> list[Row]:
    """The rows; where a limit is absolute, the target is the ratio at which ours just keeps it."""
    from bench.measure import row

    (small, middle, large), (peer_s, power), (reduce_s, cluster_s, gib) = sizes, guess, final
    load = f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
    result = [
        row(
            f"HDBSCAN of {N:,} × {REDUCE_DIM}",
            ours,
            theirs,
            unit="s",
            target=None,
            note=f"medians; min_samples {MIN_SAMPLES}, min_cluster_size {MIN_CLUSTER_SIZE}; {load}",
        )
        for N, (ours, theirs) in zip((small, middle), seconds, strict=True)
    ]
    whole = f"clustering {large:,} × {width} → PCA {REDUCE_DIM} → HDBSCAN"
    frames_gib = large * FRAMES * width * 4 / 2**30
    total = reduce_s + cluster_s
    return [
        *result,
        row(
            whole,
            total,
            reduce_s + peer_s,
            unit="s",
            target=(reduce_s + peer_s) / SECONDS_LIMIT,
            note=f"limit {SECONDS_LIMIT:.0f} s; ours: PCA {reduce_s:.1f} s, HDBSCAN {cluster_s:.1f} s; peer "
            f"extrapolated from {small:,} and {middle:,} (exponent {power:.2f}) after our PCA; {load}",
        ),
        row(
            f"{whole}, memory",
            gib,
            frames_gib,
            unit="GiB",
            target=frames_gib / GIB_LIMIT,
            note=f"limit {GIB_LIMIT} GiB, the mapped file included; peer computed: {FRAMES} frames of each utterance",
        ),
        row(
            f"labels of {small:,} against hdbscan",
            agreement,
            1.0,
            unit="ARI",
            target=ARI_LIMIT,
            better="more",
            note="adjusted Rand index, noise as a group",
        ),
    ]


def write_embeddings(path: Path, N: int, D: int, seed: int = 0) -> None:
    """Stand-ins for pooled embeddings: speakers of 100 utterances in eight groups, on axes of falling spread."""
    rng = np.random.default_rng(seed)
    spread_D = (np.arange(1, D + 1) ** -0.5).astype(np.float32)
    speakers = max(N // 100, 8)
    group_GD = 4 * spread_D * rng.standard_normal((8, D), np.float32)
    speaker_SD = group_GD[rng.integers(0, 8, speakers)] + 2 * spread_D * rng.standard_normal((speakers, D), np.float32)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (N, D))
    for low in range(0, N, 5000):
        B = min(5000, N - low)
        noise_BD = spread_D * rng.standard_normal((B, D), np.float32)
        file[low : low + B] = speaker_SD[rng.integers(0, speakers, B)] + noise_BD
    file.flush()


def _compete(whole: Path, sizes: tuple[int, int], repetitions: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Both sides in turn on the first rows of the file, so that a busy machine slows both alike."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(who, N): [] for who in ("ours", "hdbscan") for N in sizes}
    for N in sizes:
        part = whole.with_name(f"{N}.npy")
        np.save(part, np.load(whole, mmap_mode="r")[:N])
        for _ in range(repetitions):
            for who in ("ours", "hdbscan"):
                runs[who, N].append(_run(who, part))
    return runs


def _run(who: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.clustering", who, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(done.stdout)) | {"labels": np.load(path.with_suffix(f".{who}.npy"))}


def _median(runs: list[dict[str, Any]], what: str) -> float:
    return float(statistics.median(run[what] for run in runs))


def _agreement(first_N: np.ndarray, second_N: np.ndarray) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first_N, second_N))


# ---- one run, in a process of its own ----


def measure(who: str, path: Path) -> dict[str, float]:
    """Reduces and clusters a file of embeddings and writes the labels beside it; first some rows, to load libraries."""
    whole_ND = np.load(path, mmap_mode="r")
    _timed(who, whole_ND[:100])
    labels_N, reduce_seconds, cluster_seconds = _timed(who, whole_ND)
    np.save(path.with_suffix(f".{who}.npy"), labels_N)
    return {"reduce_seconds": reduce_seconds, "cluster_seconds": cluster_seconds, "gib": _peak_bytes() / 2**30}


def _timed(who: str, points_ND: np.ndarray) -> tuple[np.ndarray, float, float]:
    from common.clustering.reduction import reduce_dimensions

    started = time.perf_counter()
    reduced_NP = reduce_dimensions(points_ND, method="pca", dim=REDUCE_DIM, seed=0)
    reduced = time.perf_counter()
    labels_N = {"ours": _ours, "hdbscan": _hdbscan}[who](reduced_NP)
    return labels_N, reduced - started, time.perf_counter() - reduced


def _ours(points_NP: np.ndarray) -> np.ndarray:
    from common.clustering.hdbscan import flat_clusters, spanning_tree

    return np.asarray(flat_clusters(spanning_tree(points_NP, MIN_SAMPLES), MIN_CLUSTER_SIZE)[0])


def _hdbscan(points_NP: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hdbscan import HDBSCAN  # type: ignore[import-untyped]

        options = {"min_cluster_size": MIN_CLUSTER_SIZE, "min_samples": MIN_SAMPLES, "core_dist_n_jobs": -1}
        return np.asarray(HDBSCAN(**options).fit_predict(points_NP))


def _peak_bytes() -> int:
    """This process's own peak. On Linux getrusage also counts what its parent held when it was started."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """`python -m bench.clustering` prints the rows; with `ours|hdbscan FILE` it is one run."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    for result in rows():
        print(
            f"{result['row']:62} {result['ours']:9.3g} {result['peer']:9.3g} {result['unit']:4} "
            f"× {result['ratio']:.3g} (target {result['target'] or '–'})  {result['note']}"
        )


if __name__ == "__main__":
    main()
