"""`python -m reference.coverage FILE`: the share of lines that tests run, by package, from coverage's JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import click

from cli.table import text_table

# What tests of `make test` do not run, and why.
ELSEWHERE = {
    "bench": "measurements of minutes, run by `make bench`",
    "docker": "builds of images, run by `make test-images`",
}


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@click.option("--least", default=70.0, show_default=True, help="Files below this share are listed.")
def main(file: Path, least: float) -> None:
    """Prints lines, lines run and their share, by package; then the files with many lines that no test runs."""
    lines: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    low = []
    for name, one in json.loads(file.read_text(encoding="utf-8"))["files"].items():
        total, run = one["summary"]["num_statements"], one["summary"]["covered_lines"]
        for package in (name.partition("/")[0], "all"):
            lines[package][0] += total
            lines[package][1] += run
        if total and 100 * run / total < least:
            low.append((name, str(total), f"{run / total:.0%}"))
    rows = [
        (name, str(total), f"{run / max(total, 1):.1%}", ELSEWHERE.get(name, ""))
        for name, (total, run) in sorted(lines.items(), key=lambda item: (item[0] == "all", item[0]))
    ]
    click.echo(text_table(("package", "lines", "run", "the rest"), rows))
    if low:
        click.echo(f"\nfiles below {least:g}%:\n\n{text_table(('file', 'lines', 'run'), sorted(low))}")


if __name__ == "__main__":
    main()
