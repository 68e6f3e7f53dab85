"""The table of faults names tests that exist, and no test of a fault is missing in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if "::test_" in line]
NAMED = {tuple(name.split("::")) for row in ROWS for name in re.findall(r"`(tests/\S+::test_\w+)`", row)}
COMPLETE = ("tests/stages/test_kill.py", "tests/stages/test_kill_s3.py", "tests/stages/test_faults.py")


def names_in(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_names_a_fault_an_outcome_and_a_test():
    assert len(ROWS) > 40
    for row in ROWS:
        assert [bool(cell.strip()) for cell in row.strip("|").split("|")] == [True] * 3, row


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_the_named_tests_exist(path):
    assert {name for where, name in NAMED if where == path} <= names_in(path)


@pytest.mark.parametrize("path", COMPLETE)
def test_no_test_of_a_fault_is_left_out(path):
    assert names_in(path) == {name for where, name in NAMED if where == path}
