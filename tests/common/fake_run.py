"""A plausible run folder, made of the files that the stages write: for tests of the report."""

import json
import random
from pathlib import Path

from common.report.report import RunView

ETIOLOGIES = ("plain", "whisper", "croak", "tremor", "fast", "breathy")
WORDS = "the river bank holds seven copper kettles and a quiet lamp beside two old maps under green winter light"
MAPPED = 5000  # points of the cluster map at most, as in the cluster stage
CONFIG = "mode: demo\nseed: 42\nmodel:\n  name: models/tiny.en\nasr:\n  mixture: blend\n  top_k: 2\n"


def write_fake_run(
    root, experts=4, points=120, utterances=60, speakers=12, etiologies=ETIOLOGIES, gain=0.45, seed=0
) -> RunView:
    """Write every file that a report reads; `gain` is the share of errors that training takes away."""
    rng = random.Random(seed)
    root = Path(root)
    predictions = [_prediction(rng, i, speakers, etiologies, experts, gain) for i in range(utterances)]
    cluster, gate, asr = root / "cluster", root / "gate", root / "asr"
    of_points = _write_cluster(cluster, rng, experts, points, etiologies)
    _write_gate(gate, rng, experts)
    folders = [root / "experts" / str(i) for i in range(experts)]
    for i, folder in enumerate(folders):
        _write_expert(folder, rng, i, etiologies)
    summary = _summary(predictions)
    _write_asr(asr, rng, experts, predictions, summary)
    timeline = _timeline(rng, experts)
    stages = {"cluster": cluster, "gate": gate, "experts": folders, "asr": asr}
    subject = {"model": "models/tiny.en", "corpus": "data/demo", "seed": "42"}
    return RunView("demo", subject, CONFIG, "0.1.0", summary, **stages, timeline=timeline, audio_root="data/demo",
                   etiologies=of_points)  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_object(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def metrics(rng, steps=60, start=3.0, end=0.6, wer=True):
    rows = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * 0.94**step
        noise = rng.gauss(0, 0.06)
        rows.append({"step": step, "epoch": step // 20, "split": "train", "loss": loss + noise, "lr": 1e-4})
        if step % 15 == 0:
            dev = {"step": step, "epoch": step // 20, "split": "dev", "loss": loss * 1.1 + 0.1}
            rows.append(dev | ({"wer": 0.2 + 0.3 * 0.97**step} if wer else {}))
    return rows


def _prediction(rng, i, speakers, etiologies, experts, gain):
    speaker = i % speakers
    etiology = etiologies[speaker % len(etiologies)]
    hard = 0.1 + 0.5 * (speaker % len(etiologies)) / len(etiologies)
    reference = [rng.choice(WORDS.split()) for _ in range(rng.randint(4, 14))]
    before, errors_before = _corrupt(rng, reference, hard)
    after, errors = _corrupt(rng, reference, hard * (1 - gain))
    loop = rng.random() < 0.03
    if loop:
        after, errors = after + ["and the"] * 40, errors + 80
    first, second = rng.sample(range(experts), 2) if experts > 1 else (0, 0)
    weight = round(rng.uniform(0.5, 1), 3)
    return {
        "id": f"utt{i:05d}", "split": "test", "speaker": f"spk{speaker:02d}", "etiology": etiology,
        "severity": ("mild", "severe")[speaker % 2], "duration": 0.4 * len(reference), "reference": " ".join(reference),
        "audio": f"audio/utt{i:05d}.flac",
        "hypothesis_before": " ".join(before), "hypothesis": " ".join(after), "words": len(reference),
        "errors_before": errors_before, "errors": errors, "experts": [first, second],
        "weights": [weight, round(1 - weight, 3)], "loop": loop,
    }  # fmt: skip


def _corrupt(rng, words, rate):
    out, errors = [], 0
    for word in words:
        draw = rng.random()
        errors += draw < rate
        if draw >= rate:
            out.append(word)
        elif draw < rate * 0.6:
            out.append(word[::-1] + "x")
        elif draw < rate * 0.8:
            out += [word, "umm"]
    return out, errors


def rate(rows, field, clip=True):
    errors = sum(min(row[field], row["words"]) if clip else row[field] for row in rows)
    return errors / sum(row["words"] for row in rows)


def _summary(rows):
    by_etiology = {}
    for name in sorted({row["etiology"] for row in rows}):
        part = [row for row in rows if row["etiology"] == name]
        before, after = rate(part, "errors_before"), rate(part, "errors")
        by_etiology[name or "unknown"] = {
            "wer_before": before, "wer_after": after, "cer_before": before / 2, "cer_after": after / 2,
            "wer_interval_after": [0.85 * after, 1.15 * after], "utterances": len(part),
            "speakers": len({row["speaker"] for row in part}),
        }  # fmt: skip
    before, after = rate(rows, "errors_before"), rate(rows, "errors")
    return {
        "wer_before": before, "wer_after": after, "cer_before": before / 2, "cer_after": after / 2,
        "wer_before_unclipped": rate(rows, "errors_before", False), "wer_after_unclipped": rate(rows, "errors", False),
        "wer_interval_before": [before * 0.9, before * 1.1], "wer_interval_after": [after * 0.9, after * 1.1],
        "by_etiology": by_etiology, "utterances": len(rows), "speakers": len({row["speaker"] for row in rows}),
        "loops_before": 1, "loops_after": sum(row["loop"] for row in rows),
    }  # fmt: skip


def _write_cluster(folder, rng, experts, points, etiologies):
    rows = []
    for i in range(points):
        cluster = rng.randrange(experts)
        x, y = rng.gauss(4 * (cluster % 3), 0.8), rng.gauss(4 * (cluster // 3), 0.8)
        etiology = etiologies[cluster % len(etiologies)] if rng.random() < 0.7 else rng.choice(etiologies)
        noise = rng.random() < 0.12
        rows.append({"id": f"utt{i:05d}", "x": x, "y": y, "cluster": cluster, "etiology": etiology, "noise": noise})
    assigned = [{"id": r["id"], "cluster": r["cluster"], "noise": r["noise"], "probability": 0.9} for r in rows]
    write_rows(folder / "assignments.jsonl", assigned)
    write_rows(folder / "projection.jsonl", rows if points <= MAPPED else rng.sample(rows, MAPPED))
    write_object(folder / "report.json", {
        "algorithm": "hdbscan", "clusters": experts, "clusters_wanted": experts, "warning": "", "silhouette": 0.31,
        "noise_share": sum(r["noise"] for r in rows) / points,
        "sizes": [sum(r["cluster"] == c for r in rows) for c in range(experts)],
        "purity": {"etiology": 0.74, "speaker": 0.39},
        "adjusted_rand": {"etiology": 0.52, "speaker": 0.21}, "min_cluster_size": 3,
        "attempts": [{"min_cluster_size": 5, "clusters": 2}, {"min_cluster_size": 3, "clusters": experts + 1}],
        "merged_from": experts + 1, "utterances_clustered": points,
    })  # fmt: skip
    return {row["id"]: row["etiology"] for row in rows}


def _write_gate(folder, rng, experts):
    confusion = [[rng.randint(30, 60) if i == j else rng.randint(0, 5) for j in range(experts)] for i in range(experts)]
    bins = [{"confidence": (i + 0.5) / 10, "accuracy": min(1, (i + 0.1) / 10), "count": 4 * i * i} for i in range(10)]
    write_object(folder / "report.json", {
        "accuracy": 0.91, "macro_f1": 0.9, "expected_calibration_error": 0.041, "utterances": 160,
        "labels": [f"cluster {i}" for i in range(experts)],
        "confusion": confusion, "reliability": bins,
    })  # fmt: skip
    write_rows(folder / "metrics.jsonl", metrics(rng, wer=False))


def _write_expert(folder, rng, i, etiologies):
    counts = {name: rng.randint(1, 40) for name in etiologies[: 1 + i % len(etiologies)]}
    write_object(folder / "report.json", {
        "cluster": i, "group": f"cluster {i}", "utterances": sum(counts.values()), "etiologies": counts, "steps": 60,
        "best_step": 45, "best_value": 0.7 + i / 50,
    })  # fmt: skip
    write_rows(folder / "metrics.jsonl", metrics(rng, start=2 + i / 4, wer=False))


def _write_asr(folder, rng, experts, predictions, summary):
    weights = [rng.uniform(0.4, 1) for _ in range(experts)]
    throughput = {
        "samples_per_second": 4.2,
        "audio_seconds_per_second": 19.5,
        "padding_percent": 7.1,
        "data_wait_percent": 1.9,
    }
    write_object(folder / "report.json", {
        "mixture": "blend", "experts": experts, "top_k": 2, "load": [w / sum(weights) for w in weights],
        "router_entropy": 1.4, "top1_share": 0.74, "collapsed": False, "trained_parameters": 1_234_567, "steps": 60,
    })  # fmt: skip
    write_rows(folder / "metrics.jsonl", metrics(rng))
    write_object(folder / "throughput.json", throughput)
    write_rows(folder / "predictions.jsonl", predictions)
    write_object(folder / "summary.json", summary)


def _timeline(rng, experts):
    now, rows = 1_790_000_000.0, []
    for stage in ("extract", "cluster", "gating"):
        seconds = rng.uniform(5, 60)
        rows.append(
            {"stage": stage, "shard": None, "started": now, "seconds": seconds, "host": "laptop", "status": "run"}
        )
        now += seconds + 0.5
    now += 3 * 3600
    for i in range(experts):
        started = now + 25 * (i // 2)
        rows.append(
            {
                "stage": "experts",
                "shard": str(i),
                "started": started,
                "seconds": 20.0 + i,
                "host": "laptop",
                "status": "run",
            }
        )
    started = now + 25 * ((experts + 1) // 2)
    rows.append(
        {"stage": "asr", "shard": None, "started": started, "seconds": 310.0, "host": "laptop", "status": "run"}
    )
    return rows
