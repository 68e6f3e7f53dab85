"""`python -m reference` (`make generate`): writes every generated file, of docs/ and of the chart."""

from pathlib import Path

from bench.table import (
    extension_costs,
    extension_rows,
    full_table,
    group_rows,
    options_table,
    person_rows,
    regime_rows,
)
from dashboards import files
from helm import chart
from reference import settings, tables
from reference.blocks import fill

ROOT = Path(__file__).resolve().parents[1]
PAGES = Path("docs/reference")


def generated() -> dict[Path, str]:
    """Path → text of every generated file."""
    blocks = {
        PAGES / "exit-codes.md": {"codes": tables.exit_code_rows()},
        PAGES / "artifacts.md": {"stages": tables.stage_rows(), "manifest": tables.manifest_rows()},
        Path("docs/cluster.md"): {"parameters": tables.parameter_rows()},
        Path("docs/monitoring.md"): {"metrics": tables.metric_rows(), "alerts": tables.alert_rows()},
        Path("docs/performance.md"): {"bench": full_table(), "options": options_table()},
        Path("docs/extending.md"): {
            "methods": extension_rows("island"),
            "hours": extension_rows("island-000 alone"),
            "costs": extension_costs(),
            "persons": person_rows(),
            "groups": group_rows(),
        },
        Path("docs/regimes.md"): {
            "audible": regime_rows("bench", [384]),
            "alike": regime_rows("bench-alike", [384]),
            "budgets": regime_rows("bench", [128, 256, 336, 1152]),
            "human": regime_rows("human", [384]),
        },
        Path("docs/running.md"): {"presets": settings.preset_rows()},
    }
    texts = {PAGES / "config.md": settings.page(), **files.generated()}
    texts |= {path.relative_to(ROOT): text for path, text in chart.generated().items()}
    for path, parts in blocks.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name, lines in parts.items():
            text = fill(text, name, lines)
        texts[path] = text
    return texts


def main() -> None:
    """Writes what differs, and prints its path."""
    for path, text in generated().items():
        file = ROOT / path
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
