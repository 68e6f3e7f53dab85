"""The files of the project with a phrase each, from the first line of their docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "common",
    "stages",
    "cli",
    "argo",
    "recipes",
    "helm",
    "docker",
    "dashboards",
    "bench",
    "reference",
)
LONGEST = 92  # characters of a phrase


def tree() -> list[str]:
    """A line for each folder and Python file: name and phrase, indented by depth; files before folders."""
    lines = ["```text"]
    for folder in FOLDERS:
        told = [("  " * depth + name, phrase(path)) for depth, name, path in entries(ROOT / folder)]
        width = max(len(name) for name, _ in told)
        lines += [f"{name:<{width}}  {text}".rstrip() for name, text in told] + [""]
    lines[-1] = "```"
    return lines


def entries(folder: Path, depth: int = 0) -> Iterator[tuple[int, str, Path]]:
    """(depth, name, file that tells of it) of a folder, its Python files, and the same of its folders that have any."""
    yield depth, f"{folder.name}/", folder / "__init__.py"
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield depth + 1, path.name, path
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and any(p.rglob("*.py"))):
        yield from entries(inner, depth + 1)


def phrase(path: Path) -> str:
    """The first sentence of a module's docstring, or the first line of a long one, without markup; "" for no file."""
    if not path.is_file():
        return ""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`])[.](?: |$)", first)[0].rstrip(".")
    if len(sentence) > LONGEST:
        sentence = sentence[: max(sentence.rfind(mark, 0, LONGEST) for mark in (": ", "; ", ", "))]
        if sentence.count("(") > sentence.count(")"):
            sentence = sentence[: sentence.rfind(" (")]
    return sentence
