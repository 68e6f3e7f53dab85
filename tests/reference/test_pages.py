"""All generated files are those of today, and the pages say all that there is."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

from common import errors
from common.config import known_paths
from reference.__main__ import ROOT, generated
from reference.blocks import fill, table
from reference.settings import read_by
from stages import STAGES

MADE = generated()


@pytest.mark.parametrize("path", sorted(MADE, key=str), ids=str)
def test_a_committed_file_is_what_make_generate_writes(path):
    assert (ROOT / path).read_text(encoding="utf-8") == MADE[path], "run `make generate`"


def test_every_setting_has_a_row_with_a_description():
    page = next(text for path, text in MADE.items() if path.name == "config.md")
    tables = page.partition("## Modes")[0].splitlines()
    rows = {line.split("`")[1]: line for line in tables if line.startswith("| `")}
    for path in known_paths():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[path])]
        assert cells[4], f"{path} has no description in common/sections.py"


def test_the_stages_named_beside_a_setting_are_those_whose_keys_hold_it():
    assert read_by("asr.epochs") == ["asr"]
    assert read_by("seed") == [stage.name for stage in STAGES]
    assert read_by("runtime.num_workers") == []
    assert read_by("corpus.path") == [stage.name for stage in STAGES if "corpus" in stage.sources]


def test_every_exit_code_of_an_error_stands_in_the_table():
    page = next(text for path, text in MADE.items() if path.name == "exit-codes.md")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and "exit_code" in vars(kind)]
    for kind in kinds:
        assert kind is errors.MoeAsrError or f"| {kind.exit_code} | `{kind.__name__}` |" in page


def test_a_block_is_filled_between_its_marks_and_nothing_else_changes():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert fill(page, "x", ["new"]) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    assert fill(fill(page, "x", []), "x", ["old"]) == page
    with pytest.raises(ValueError, match="lacks the marks"):
        fill(page, "y", [])


def test_a_bar_in_a_cell_does_not_end_it():
    assert table(("a",), [("x|y",)])[-1] == r"| x\|y |"


def test_the_version_is_said_once_and_taken_from_there():
    told = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert told == [version("moe-asr")]
    chart = (ROOT / "helm" / "moe-asr" / "Chart.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r'^(?:version|appVersion): "?([^"\n]+)', chart, re.MULTILINE)) == set(told)
    assert f"## {told[0]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
