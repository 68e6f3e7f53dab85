"""report.html of an extension: gain by the added expert, the compared methods, confusions, and the check of other
speakers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.evaluation.breakdown import scored_reference
from common.files import new_folder
from common.json_files import Row, read_object, write_object
from common.model.added_experts import AddedExpert
from common.report.error_rates import align_words
from common.report.page import render_page

PAGE, MARK = "report.html", "extension.json"
CONFUSIONS = 15
WAYS = {
    "none": "the unchanged model",
    "choose": "weights over existing experts",
    "gates": "magnitudes of the shared expert",
    "expert": "an expert from zero",
    "neighbour": "an expert from the nearest one",
    "shared": "the change of the tuned shared expert",
}


def render_extension(info: AddedExpert, details: Row, page: Mapping[str, Any], *, model: str, run: str) -> str:
    """The page as one HTML string.

    Args:
        details: extension.json.
        page: `rows` of the held-out utterances without and with the expert; empty if they are not known.
        model, run: names of the model and the run.
    """
    before, after = page.get("rows") or ((), ())
    return render_page(
        "extension.html",
        info=info,
        details=details,
        model=model,
        run=run,
        ways=[{"way": way, "what": WAYS[way], "loss": loss} for way, loss in details["ways"].items()],
        confusions=confusion_table(before, after),
        curve=details.get("curve") or [],
        gain=info.gain,
    )


def confusion_table(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """The most frequent confusions of the unchanged model, and how often each occurs with the expert."""
    old, new = confusions(before), confusions(after)
    shown = [pair for pair, _ in (old + new).most_common(CONFUSIONS)]
    return [{"said": a, "written": b, "before": old[a, b], "after": new[a, b]} for a, b in shown]


def confusions(rows: Sequence[Row]) -> Counter[tuple[str, str]]:
    """How often a word was written instead of another; an empty word stands for a missing word."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for kind, said, written in align_words(scored_reference(row), row["hypothesis"]):
            if kind != "ok":
                counts[said.casefold(), written.casefold()] += 1
    return counts


def is_page_of(folder: Path, info: AddedExpert, run: str) -> bool:
    """Whether a folder has the page of this expert in this run."""
    return (folder / PAGE).is_file() and read_object(folder / MARK) == _subject(info, run)


def _subject(info: AddedExpert, run: str) -> Row:
    return {"run": run, "expert": info.name, "parent": info.parent}


def write_extension(
    info: AddedExpert, details: Row, page: Mapping[str, Any], folder: Path, *, model: str, run: str
) -> None:
    """Writes report.html into a folder, in place of an earlier one."""
    with new_folder(folder, overwrite=True, mark=MARK) as new:
        write_object(new / MARK, _subject(info, run))
        (new / PAGE).write_text(render_extension(info, details, page, model=model, run=run), encoding="utf-8")
