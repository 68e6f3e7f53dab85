"""What all commands have in common: help with examples, colours, machine-readable answers, completion, doctor."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.main import cli
from common.pipeline import machine_checks
from recipes.text_to_sql.__main__ import cli as text_to_sql
from stages.__main__ import stages
from tests.cli.test_main import ENVIRONMENT, moe_asr


def walk(command, words):
    """(words that call it, command) of a command or group and all below it."""
    yield words, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from walk(below, (*words, name))


COMMANDS = {
    words: command
    for words, command in walk(cli, ("moe-asr",))
    if not isinstance(command, click.Group) and not command.hidden
}
# A help text that begins so needs the option's name before it to mean something.
DEPENDENT = re.compile("(Of|Or|In|For|With|From|To|At|By|On|And|Only|Also|Not|Where|Who) ")


def examples(command):
    """Lines of a command's help that show a call."""
    return [line.strip() for line in (command.help or "").splitlines() if line.strip().startswith("moe-asr ")]


@pytest.mark.parametrize("words", sorted(COMMANDS), ids=" ".join)
def test_the_help_of_every_command_shows_calls_of_it_that_parse(words):
    calls = examples(COMMANDS[words])
    assert calls, f"{' '.join(words)} --help has no example"
    for call in calls:
        given = shlex.split(re.split(r" [|>]", call)[0])
        assert tuple(given[: len(words)]) == words
        COMMANDS[words].make_context(" ".join(words), given[len(words) :])


@pytest.mark.parametrize("root", [cli, stages, text_to_sql], ids=["moe-asr", "stages", "text-to-sql"])
def test_every_option_has_a_help_text_that_stands_alone(root):
    texts = {
        " ".join((*words, option.opts[0])): option.help or ""
        for words, command in walk(root, (root.name or "",))
        for option in command.params
        if isinstance(option, click.Option)
    }
    assert len(texts) > 10
    wrong = {
        name: text for name, text in texts.items() if not text or DEPENDENT.match(text) or text[0] != text[0].upper()
    }
    assert wrong == {}


def test_the_shell_completes_commands_options_and_choices(tmp_path):
    def ask(**variables):
        command = [sys.executable, "-c", "import sys; sys.argv[0] = 'moe-asr'; from cli.main import main; main()"]
        variables |= {"PYTHONPATH": str(Path.cwd())}
        return subprocess.run(command, env=ENVIRONMENT | variables, cwd=tmp_path, capture_output=True, text=True).stdout

    def complete(text):
        said = ask(_MOE_ASR_COMPLETE="bash_complete", COMP_WORDS=text, COMP_CWORD=str(text.count(" ")))
        return {line.partition(",")[2] for line in said.splitlines()}

    assert "_MOE_ASR_COMPLETE=bash_complete" in ask(_MOE_ASR_COMPLETE="bash_source")
    assert "corpus" in complete("moe-asr cor")
    assert "--mixture" in complete("moe-asr run --mix")
    assert complete("moe-asr run --mode ") == {"full", "quick", "demo"}


def on_a_terminal(*words, cwd, **variables):
    """What a command writes to a terminal."""
    leader, follower = pty.openpty()
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path.cwd()), "TERM": "xterm"} | variables
    command = [sys.executable, "-m", "cli.main", *words]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=follower, stderr=follower, stdin=follower)
    os.close(follower)
    text = b""
    while True:
        try:
            more = os.read(leader, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not more:
            break
        text += more
    os.close(leader)
    return process.wait(), text.decode()


def test_colours_are_for_terminals_and_for_those_who_want_them(tmp_path):
    code, coloured = on_a_terminal("status", "nothing", cwd=tmp_path)
    assert (code, "\x1b[" in coloured) == (65, True)
    code, plain = on_a_terminal("status", "nothing", cwd=tmp_path, NO_COLOR="1")
    assert (code, "\x1b[" in plain) == (65, False)
    assert "\x1b[" not in moe_asr("status", "nothing", cwd=tmp_path).stderr


def test_doctor_tells_a_sound_machine_and_a_store_from_others(tmp_path, monkeypatch):
    done = CliRunner().invoke(cli, ["doctor", "--store", str(tmp_path / "store"), "--json"])
    report = json.loads(done.stdout)
    names = {check["name"] for check in report["checks"]}
    assert (done.exit_code, report["ok"]) == (0, True)
    assert {"device", "memory", "disk", "cores", "decoding MP3", "store: create-only writes"} <= names

    done = CliRunner().invoke(cli, ["doctor", "--store", str(tmp_path / "store"), "--only-store", "--json"])
    assert {check["name"].partition(":")[0] for check in json.loads(done.stdout)["checks"]} == {"store"}
    assert CliRunner().invoke(cli, ["doctor", "--only-store"]).exit_code != 0

    monkeypatch.setattr(machine_checks, "LOW_DISK", 2**62)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1
    assert re.search(r"^fail +disk", done.stdout, re.MULTILINE)
    assert "checks failed: disk" in done.stderr


def test_machines_get_json_where_people_get_a_table(tmp_path):
    takes_json = {words for words, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}
    wanted = "run, status, runs list, verify, doctor, estimate, fit-batch, corpus stats"
    assert {("moe-asr", *name.split()) for name in wanted.split(", ")} <= takes_json
    (tmp_path / "runs").mkdir()
    assert json.loads(moe_asr("runs", "list", "--json", cwd=tmp_path).stdout) == []


def test_every_group_says_what_its_commands_do():
    for words, command in walk(cli, ("moe-asr",)):
        assert command.get_short_help_str(), words
