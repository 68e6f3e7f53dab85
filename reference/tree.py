"""The files of the project with a phrase each, from the first line of their docstrings."""

from __future__ import annotations

import ast
import re
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
    "monitor",
    "bench",
    "reference",
)
LONGEST = 92  # characters of a phrase


def tree() -> list[str]:
    """One line per Python file: its path and its phrase; a folder's own phrase comes first."""
    lines = ["```text"]
    for folder in FOLDERS:
        files = sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)
        told = [(path.relative_to(ROOT).as_posix().removesuffix("__init__.py"), phrase(path)) for path in files]
        width = max(len(name) for name, _ in told)
        lines += [f"{name:<{width}}  {text}".rstrip() for name, text in told if text] + [""]
    lines[-1] = "```"
    return lines


def phrase(path: Path) -> str:
    """The first sentence of a module's docstring, or the first line of a long one, without markup."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`])[.](?: |$)", first)[0].rstrip(".")
    if len(sentence) > LONGEST:
        sentence = sentence[: max(sentence.rfind(mark, 0, LONGEST) for mark in (": ", "; ", ", "))]
        if sentence.count("(") > sentence.count(")"):
            sentence = sentence[: sentence.rfind(" (")]
    return sentence
