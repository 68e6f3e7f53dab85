"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.escape import escaped


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; the first is aligned left, the others right."""
    table = [[escaped(str(cell), one_line=True) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def summary_table(summary: Mapping[str, Any]) -> str:
    """WER and CER before and after on held-out speakers, overall and by etiology, and where the report is."""
    rows = [_row(name, values) for name, values in summary["by_etiology"].items()]
    rows.append(_row("overall", summary))
    low, high = summary["wer_interval_after"]
    known = summary.get("speakers_in_train", 0)
    who = "speakers also in train" if known else "held-out speakers"
    how_many = f"{summary['speakers']} speakers" + (f", {known} of them also in train" if known else "")
    contexts = summary.get("audio_context")
    seconds = "  ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    return "\n".join(
        [
            text_table((who, "utterances", "WER before", "WER after", "CER before", "CER after"), rows),
            "",
            f"WER after, 95% interval over {how_many}: {low:.1%} to {high:.1%}",
            *([f"audio context: {contexts['before']} before, {contexts['after']} after"] if contexts else []),
            f"time: {seconds}",
            f"report: {summary['report']}",
        ]
    )


def _row(name: str, values: Mapping[str, Any]) -> list[str]:
    rates = [f"{values[key]:.1%}" for key in ("wer_before", "wer_after", "cer_before", "cer_after")]
    return [name, str(values["utterances"]), *rates]
