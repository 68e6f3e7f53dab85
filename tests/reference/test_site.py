"""The site builds strictly, and nobody who reads it asks another machine for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stages import STAGES
from tests.cli.test_house import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "no_proxy": "*"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_links_and_anchors_hold_and_every_page_is_in_the_navigation(site):
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written <= pages
    start = (site / "index.html").read_text(encoding="utf-8")
    assert {name for name in written if f'href="{name}.html"' not in start} <= {"index"}


def test_a_page_loads_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)[^>]*href=\"?([^\" >]+)", text)
        assert [address for address in loaded if "//" in address] == [], path.name


def test_the_charts_values_are_a_page_of_the_site(site):
    assert "store.url" in (site / "reference" / "chart-values.html").read_text(encoding="utf-8")


def test_every_command_and_option_is_in_the_reference_of_the_command_line(site):
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    headings = {" ".join(words): command for words, command in COMMANDS.items()}
    assert {f"python -m stages {stage.name}" for stage in STAGES} <= set(re.findall(r"<h\d id=[^>]*>([^<]+)", page))
    for words, command in headings.items():
        section = page.partition(f'id="{words.replace(" ", "-")}"')[2].partition("<h")[0]
        options = [option.opts[0] for option in command.params if isinstance(option, click.Option)]
        assert section and [flag for flag in options if flag not in section] == [], words
