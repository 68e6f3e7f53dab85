"""Imports go one way: each package may import those before it, and none is in a cycle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom up. `small` is every module that lies directly in common/.
ORDER = (
    "small",
    "storage",
    "data",
    "model",
    "pipeline",
    "decoding",
    "clustering",
    "training",
    "inference",
    "evaluation",
    "export",
    "report",
    "demo",
    "recipes",
    "stages",
    "argo",
    "cli",
)
# Modules that take plain values: a configuration is read by what calls them.
PLAIN = ("data", "model", "decoding", "training", "inference", "storage", "clustering")


def package(parts: tuple[str, ...]) -> str:
    """The layer that a file or a dotted name belongs to."""
    if parts[0] != "common":
        return parts[0]
    return parts[1] if len(parts) > 1 and (ROOT / "common" / parts[1]).is_dir() else "small"


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, those inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> Iterator[tuple[str, str, str]]:
    """(file, its layer, the layer that it imports) within the project."""
    for top in sorted({"common"} | set(ORDER) - {"small"}):
        for path in sorted((ROOT / top).rglob("*.py")) if (ROOT / top).is_dir() else ():
            file = path.relative_to(ROOT)
            for name in imports(path):
                target = package(tuple(name.split(".")))
                if name.split(".")[0] == "common" or target in ORDER:
                    yield str(file), package(file.parts[:-1] or file.parts), target


def test_no_package_imports_one_that_comes_after_it():
    wrong = {(file, target) for file, own, target in edges() if ORDER.index(target) > ORDER.index(own)}
    assert wrong == set()


@pytest.mark.parametrize("layer", PLAIN)
def test_the_configuration_stays_at_the_border(layer):
    folder = ROOT / "common" / layer
    leaks = [
        str(path.relative_to(ROOT)) for path in folder.rglob("*.py") if "common.config.Config" in set(imports(path))
    ]
    assert leaks == []


def test_no_source_file_is_over_400_lines():
    files = [path for top in {"common", "bench", "dashboards", *ORDER} for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 150
    assert [str(path) for path in files if path.read_text("utf-8").count("\n") > 400] == []


def test_files_that_contributing_names_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`((?:common|stages|argo|cli)/[\w/]*(?:\.py)?)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
