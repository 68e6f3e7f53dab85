"""compare.html: rates of systems, their differences from the reference, rates by etiology, and costs of training."""

from collections.abc import Sequence
from pathlib import Path

from common import __version__
from common.evaluation.breakdown import UNKNOWN
from common.files import new_folder
from common.json_files import Row, write_object
from common.report.error_rates import axis_end, caution
from common.report.page import clock, interval, number, percent, points, render_page

RESULT, PAGE = "comparison.json", "compare.html"


def render_comparison(comparison: Row) -> str:
    """The page as one HTML string, from the result of `compare.compare`."""
    systems: Sequence[Row] = comparison["systems"]
    etiologies = [name for name in systems[0]["by_etiology"] if name != UNKNOWN]
    ends = [end for system in systems for end in (system["wer"], *(system["wer_interval"] or ()))]
    differences = [system["difference"]["wer"] for system in systems if system["difference"]]
    reach = max((abs(end or 0.0) for d in differences for end in (d["delta"], d["low"], d["high"])), default=0.0)
    return render_page(
        "compare.html",
        comparison=comparison,
        systems=systems,
        version=__version__,
        top=axis_end(ends),
        reach=_round_up(reach),
        etiologies=[_etiology(systems, name) for name in etiologies],
        caution=caution(comparison["speakers"], comparison["named_speakers"], "tested"),
        trained=[system for system in systems if system["facts"].get("trained_parameters") is not None],
        loads=[system for system in systems if len(system["facts"].get("load") or ()) > 1],
        verdict=_verdict(comparison),
        several=any(len(system["runs"]) > 1 for system in systems),
    )


def _etiology(systems: Sequence[Row], name: str) -> Row:
    """Rates of all systems on one etiology; the lowest is marked."""
    cells = [system["by_etiology"][name] for system in systems]
    return {"name": name, "speakers": cells[0]["speakers"], "cells": cells, "best": min(cell["wer"] for cell in cells)}


def _verdict(comparison: Row) -> str:
    """A description of the systems that differ significantly from the reference."""
    reference = comparison["reference"]
    if comparison["speakers"] == 1:
        return "Whether a difference is more than chance cannot be said: that takes two or more speakers."
    changes: dict[str, list[str]] = {"lower": [], "higher": [], "same": []}
    for system in comparison["systems"]:
        if system["difference"]:
            difference = system["difference"]["wer"]
            side = "lower" if difference["high"] < 0 else "higher" if difference["low"] > 0 else "same"
            changes[side].append(system["name"])
    parts = []
    if changes["lower"]:
        parts.append(f"WER is lower than {reference}'s for {', '.join(changes['lower'])}.")
    if changes["higher"]:
        parts.append(f"WER is higher than {reference}'s for {', '.join(changes['higher'])}.")
    if changes["same"]:
        parts.append(f"Not distinguishable from {reference}: {', '.join(changes['same'])}.")
    return " ".join(parts)


def _round_up(reach: float) -> float:
    """Half the width of an axis of differences: a round number at or above `reach`."""
    return next((end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if end >= reach), 1.0)


def table_rows(comparison: Row) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the comparison for a terminal."""
    reference = comparison["reference"]
    etiologies = [name for name in comparison["systems"][0]["by_etiology"] if name != UNKNOWN]
    header = ("", "runs", "WER", "95% interval", "CER", f"WER − {reference}", "95% interval", "p",
              *(f"WER {name}" for name in etiologies), "parameters", "utt/s", "time")  # fmt: skip
    rows = []
    for system in comparison["systems"]:
        facts, delta = system["facts"], (system["difference"] or {}).get("wer")
        alone = system["speakers"] == 1
        bounds = f"{points(delta['low'])} to {points(delta['high'])}" if delta and not alone else ""
        rows.append(
            (
                system["name"],
                str(len(system["runs"])),
                percent(system["wer"]),
                "one speaker" if alone else interval(system["wer_interval"]),
                percent(system["cer"]),
                points(delta["delta"]) if delta else "",
                bounds,
                f"{delta['p']:.3f}" if delta and not alone else "",
                *(percent(system["by_etiology"][name]["wer"]) for name in etiologies),
                number(facts.get("trained_parameters")),
                number(facts.get("samples_per_second"), 1),
                clock(facts.get("seconds")),
            )
        )
    return header, rows


def write_comparison(comparison: Row, folder: Path, *, overwrite: bool = False) -> None:
    """Writes comparison.json and compare.html into a folder, both or none.

    Raises:
        UsageError: the folder exists and may not be replaced.
    """
    with new_folder(folder, overwrite=overwrite, mark=RESULT) as new:
        write_object(new / RESULT, comparison)
        (new / PAGE).write_text(render_comparison(comparison), encoding="utf-8")
