"""`python -m reference`: writes the generated pages of docs/reference and the generated parts of other pages."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.table import full_table, options_table, regime_rows
from reference import settings, tables
from reference.blocks import fill

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path("docs/reference")


def generated() -> dict[Path, str]:
    """Path → text of every generated page."""
    blocks = {
        PAGES / "exit-codes.md": {"codes": tables.exit_code_rows()},
        PAGES / "artifacts.md": {"stages": tables.stage_rows(), "manifest": tables.manifest_rows()},
        Path("docs/performance.md"): {"bench": full_table(), "options": options_table()},
        Path("docs/regimes.md"): {
            "audible": regime_rows("bench", [384]),
            "alike": regime_rows("bench-alike", [384]),
            "budgets": regime_rows("bench", [128, 256, 336, 1152]),
            "human": regime_rows("human", [384]),
        },
        Path("docs/running.md"): {"presets": settings.preset_rows()},
    }
    texts = {PAGES / "config.md": settings.page()}
    for path, parts in blocks.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, lines in parts.items():
            text = fill(text, name, lines)
        texts[path] = text
    return texts


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail where a page is not as it would be written.")
def main(check: bool) -> None:
    """Writes docs/reference and the generated parts of other pages."""
    made = generated()
    stale = [path for path, text in made.items() if not _is(ROOT / path, text)]
    if check and stale:
        sys.exit(f"not as `make reference` writes them: {', '.join(map(str, stale))}")
    for path in stale:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(made[path], encoding="utf-8")
        click.echo(path)


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    main()
