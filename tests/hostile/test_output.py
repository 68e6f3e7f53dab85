"""What is printed or logged: no control character of somebody else's text, one line a message, no password."""

import ast
import io
import logging
import sys
from pathlib import Path
from unittest.mock import patch

import click
import pytest

from common.console import LineFormatter, coloured, echo, run_command
from common.errors import DataError
from common.escape import escaped
from common.progress import counted

ROOT = Path(__file__).parents[2]
SECRET = "passWORD"
ADDRESSES = (
    f"http://user:{SECRET}@host:9000/path",
    f"s3://KEY:{SECRET}@bucket/x",
    f"https://user:a@{SECRET}@host",
    f"'http://{SECRET}@host'",
)
PRINTABLE = {0x09, 0x0A}  # tab and line feed


def unsafe(text):
    """Characters that a terminal obeys, beside line feed and tab."""
    controls = {*range(0x20), *range(0x7F, 0xA0)} - PRINTABLE
    marks = controls | {0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return [character for character in text if ord(character) in marks]


def test_every_character_comes_out_harmless(tally):
    everything = [chr(code) for code in range(0x3100)] + ["\ud800", "\udfff", "\U000e0001", "\U0010ffff"]
    lost = [character for character in everything if unsafe(escaped(character))]
    assert lost == []
    kept = [character for character in everything if escaped(character) == character]
    assert {"é", "ü", "ー", "ع", "\t", "\n", " "} <= set(kept)
    escaped("".join(everything), one_line=True).encode()  # can be written
    tally(len(everything), len(lost))


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_password_of_an_address_is_shown(address):
    assert SECRET not in escaped(f"before {address} after")
    assert escaped("mail to somebody@example.org about s3://bucket/a@b") == (
        "mail to somebody@example.org about s3://bucket/a@b"
    )


TEXTS = ("line\nfeed", "\x1b[2Jcleared", "\x9b31m", "a\rb", "\u202etxt.exe", f"http://u:{SECRET}@h", "\x07\x08")


@pytest.mark.parametrize("text", TEXTS)
def test_a_log_line_is_one_line(text):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(message)s"))
    log = logging.Logger("hostile")
    log.addHandler(handler)
    log.warning("stage %s: %s", text, text)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
    first, _, rest = stream.getvalue().partition("\n")
    assert first.startswith("stage ") and rest.startswith("failed\n")
    assert not unsafe(stream.getvalue()) and SECRET not in stream.getvalue()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError, click.UsageError, click.BadParameter])
def test_no_error_and_no_traceback_obeys_its_text(text, kind, capsys, caplog):
    @click.command()
    def broken():
        echo("shown ", text, coloured(text, "red"))
        raise kind(text)

    with patch.object(sys, "argv", ["broken"]), pytest.raises(SystemExit):
        run_command(broken)
    out, err = capsys.readouterr()
    shown = out + err
    assert not unsafe(shown) and SECRET not in shown
    assert "shown" in out and (err or caplog.text)


def test_colours_are_ours_alone(monkeypatch, capsys):
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    echo("\x1b[31mtheirs", coloured("ours", "red"))
    assert capsys.readouterr().out == "\\u001b[31mtheirs\x1b[31mours\x1b[0m\n"


def test_labels_of_progress_are_shown_escaped(capsys, monkeypatch):
    monkeypatch.setattr("common.progress.FIRST", 0)
    list(counted(iter("ab"), 2, "label\x1b[2J\nnext"))
    shown = capsys.readouterr().err
    assert not unsafe(shown)


def test_every_text_goes_through_one_place():
    """`common.console.echo` prints; tqdm and the lines of progress are escaped where they are made."""
    places = []
    for top in ("common", "stages", "argo", "cli"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("click.echo", "click.secho", "print"):
                    places.append(str(path.relative_to(ROOT)))
    assert sorted(set(places)) == ["common/console.py", "common/progress.py"]
