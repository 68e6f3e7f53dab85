"""`moe-asr corpus import`: which options each format takes."""

import pytest
from click.testing import CliRunner

from cli.corpus import corpus
from common.errors import UsageError


@pytest.mark.parametrize(
    ("kind", "option", "users"),
    [
        ("table", ("--microphone", "array"), "torgo"),
        ("table", ("--official-splits",), "sap"),
        ("audiofolder", ("--audio-root", "."), "table"),
        ("audiofolder", ("--header", "audio,text"), "table"),
        ("sap", ("--column", "text=said"), "table and audiofolder"),
        ("torgo", ("--skip-bad",), "table and audiofolder"),
    ],
)
def test_an_option_of_another_format_is_refused(tmp_path, kind, option, users):
    source = tmp_path / "source"
    source.touch() if kind == "table" else source.mkdir()
    chosen = ["--format", kind] if kind in ("sap", "torgo") else []
    done = CliRunner().invoke(corpus, ["import", str(source), str(tmp_path / "out"), *chosen, *option])
    assert isinstance(done.exception, UsageError)
    assert f"{option[0]} is not for --format {kind}, only for {users}" in str(done.exception)
