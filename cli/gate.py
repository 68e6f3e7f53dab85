"""`moe-asr gate`: whether a run's gate can be believed, and what its choices are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from cli.shared import device_option, with_store
from cli.table import text_table
from common.errors import UsageError
from common.files import new_folder
from common.storage import open_store


@click.command()
@click.argument("run")
@with_store
@click.option("--out", type=click.Path(path_type=Path), help="Folder for gate.json and gate.html.")
@click.option("--top-k", default="1,2,4", show_default=True, help="Numbers of experts to decode the test split with.")
@click.option("--no-decode", is_flag=True, help="Decode nothing.")
@click.option("--layer", "layers", type=int, multiple=True, help="Cluster this encoder layer too; encodes audio again.")
@click.option("--pooling", "poolings", type=click.Choice(("mean", "max", "meanstd")), multiple=True, help="The same.")
@click.option("--samples", default=2000, show_default=True, help="Utterances to compare clusterings on; 0 for none.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gate(
    run: str,
    store_url: str,
    endpoint_url: str | None,
    out: Path | None,
    top_k: str,
    no_decode: bool,
    layers: tuple[int, ...],
    poolings: tuple[str, ...],
    samples: int,
    device: str,
    as_json: bool,
) -> None:
    """Looks at the gate of a finished RUN: calibration, speakers, numbers of experts, ways of clustering.

    \b
        moe-asr gate mine
    """
    counts = () if no_decode else (0, *_counts(top_k))
    from common.evaluation.gate_run import GateQuestions, examine_gate
    from common.pages.gate import render_gate
    from stages.pipeline import cache_folder

    store = open_store(store_url, endpoint_url=endpoint_url)
    asked = GateQuestions(counts, layers, poolings, samples)
    # Before the work: what is in the way of the folder is said at once.
    with new_folder(out, overwrite=True, mark="gate.json") if out else nullcontext() as folder:
        found = examine_gate(run, store, cache_folder(), asked, device=device)
        text = json.dumps(found, indent=1)
        if folder is not None:
            (folder / "gate.json").write_text(text + "\n", encoding="utf-8")
            (folder / "gate.html").write_text(render_gate(found), encoding="utf-8")
    click.echo(text if as_json else _tables(found))
    if out is not None and not as_json:
        click.echo(f"\n{out / 'gate.html'}")


def _counts(top_k: str) -> list[int]:
    try:
        counts = [int(part) for part in top_k.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--top-k {top_k}: give numbers of experts of 1 or more, as in 1,2,4")
    return counts


def _tables(found: Mapping[str, Any]) -> str:
    parts = []
    if found["calibration"]:
        keys = ("accuracy", "expected_calibration_error")
        rows = [
            [f"{r['gate']}, {r['split']}", r["utterances"], *(_percent(r[k]) for k in keys)]
            for r in found["calibration"]
        ]
        parts.append(text_table(("gate", "utterances", "accuracy", "calibration error"), rows))
    rows = [
        [
            f"{r['gate']}, {r['split']}, by {r['route_by']}",
            r["speakers"],
            _percent(r["same_expert"]),
            _percent(max(r["load"])),
        ]
        for r in found["consistency"]
    ]
    parts.append(text_table(("gate", "speakers", "at one expert", "largest load"), rows))
    if found["sensitivity"]:
        rows = [
            [_choice(r), _percent(r["wer"]), " to ".join(map(_percent, r["interval"])), _percent(r["changed"])]
            for r in found["sensitivity"]
        ]
        parts.append(text_table(("experts per utterance", "WER", "95% interval", "texts changed"), rows))
    if found["choices"]:
        parts.append(_clusterings(found["choices"]))
    return "\n\n".join([*parts, *found["left_out"]])


def _choice(row: Mapping[str, Any]) -> str:
    if row["top_k"] == 0:
        return "none"
    return f"{row['top_k']}, by {row['route_by']}" + (" (as trained)" if row["trained"] else "")


def _clusterings(choices: Sequence[Mapping[str, Any]]) -> str:
    names = ("clusters", "noise_share", "silhouette", "etiology", "speaker", "stability")
    rows = []
    for r in choices:
        name = f"layer {r['layer']} {r['pooling']}, {r['reduce']}, {r['algorithm']}" + (" (own)" if r["own"] else "")
        cells = ["-"] * len(names) if "problem" in r else [_figure(r[n]) for n in names]
        rows.append([name, *cells])
    return text_table(
        ("clustering", "clusters", "noise", "silhouette", "ARI etiology", "ARI speaker", "stability"), rows
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _figure(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
