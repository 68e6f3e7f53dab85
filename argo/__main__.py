"""`python -m argo`: writes what is generated from contracts and parameters."""

from __future__ import annotations

from pathlib import Path

from argo.parameters import FILE, PARAMETERS
from argo.workflow import to_text

DOCS = Path(__file__).parents[1] / "docs" / "cluster.md"
BEGIN, END = "<!-- parameters -->", "<!-- /parameters -->"


def table() -> str:
    """The parameters as a Markdown table."""
    rows = []
    for name, (value, text) in PARAMETERS.items():
        shown = "" if not value else "(see `argo/parameters.py`)" if len(value) > 40 else f"`{value}`"
        rows.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(["| parameter | default | |", "|---|---|---|", *rows])


def with_table(page: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Writes the workflow template and the table of its parameters."""
    FILE.write_text(to_text(), encoding="utf-8")
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
