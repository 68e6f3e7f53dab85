"""The reference of the command line, from click's own commands: docs/reference/cli.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import click

from cli.main import cli, config_show
from common.options import RUN_OPTIONS, SHARED_OPTIONS
from recipes.text_to_sql.__main__ import cli as text_to_sql
from reference.blocks import table
from stages.__main__ import stages

HEAD = """# Command line

<!-- Written by `make reference` from the commands themselves: change those. -->

`moe-asr` is one command with subcommands. Each has `--help`, with examples. Options that lead to a configuration are
the same wherever they occur and stand [once, at the end](#options-of-a-configuration). What exit codes mean is on
[a page of its own](exit-codes.md).
"""
SHARED_HEAD = """## Options of a configuration

`run`, `plan`, `sweep`, `submit`, `config show`, `estimate`, `fit-batch` and each stage alone have all of these. They
merge in this order, later ones winning: `--mode`, `--config`, `--gpu`, the single options, `--set`.
[Configuration](config.md) says what each setting means and which stages depend on it.
"""
STAGES_HEAD = """## One stage alone

`python -m stages STAGE` runs the pieces of a stage that are not done. Its options are those of its section of the
configuration, and all those of a configuration.
"""
RECIPES_HEAD = """## The second recipe

[Text to SQL](../text-to-sql.md) on the same training loop.
"""


def page() -> str:
    """The whole page."""
    shared = {name for parameter in config_show.params for name in parameter.opts}
    parts = [HEAD]
    for path, command in _commands(cli, ("moe-asr",)):
        parts.append(_section(path, command, shared))
    parts += [SHARED_HEAD, *_lines(_option_rows(config_show, ("moe-asr", "config", "show")))]
    parts.append("\n" + STAGES_HEAD)
    for path, command in _commands(stages, ("python", "-m", "stages")):
        parts.append(_section(path, command, shared))
    parts.append(RECIPES_HEAD)
    for path, command in _commands(text_to_sql, ("python", "-m", "recipes.text_to_sql")):
        parts.append(_section(path, command, shared))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["\n".join(table(("option", "sets", "what it does"), rows))]


def _commands(group: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, depth first, with the words that call it."""
    assert isinstance(group, click.Group)
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        elif not command.hidden:
            yield (*path, name), command


def _context(command: click.Command, path: Sequence[str]) -> click.Context:
    return click.Context(command, info_name=" ".join(path))


def _section(path: tuple[str, ...], command: click.Command, shared: set[str]) -> str:
    """Heading, usage, help text and options of one command; those of a configuration are referred to."""
    context = _context(command, path)
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    configured = shared <= {name for parameter in command.params for name in parameter.opts}
    own = _option_rows(command, path, without=shared if configured else set())
    text = [f"## {' '.join(path)}", "", "```text", usage, "```", "", *_help(command)]
    if own:
        text += ["", *table(("option", "what it does"), [(row[0], row[2]) for row in own])]
    if configured:
        more = "Also all" if own else "All"
        text += ["", f"{more} [options of a configuration](#options-of-a-configuration)."]
    return "\n".join(text) + "\n"


def _help(command: click.Command) -> list[str]:
    """The help text; what stands after \\b keeps its lines."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines += ["```sh", *paragraph.splitlines()[1:], "```", ""]
        else:
            lines += [*paragraph.splitlines(), ""]
    return lines[:-1]


def _option_rows(
    command: click.Command, path: Sequence[str], *, without: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """(flags, setting, help) of every option that is not among `without`."""
    settings = settings_of_options()
    rows = []
    context = _context(command, path)
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or not record[1] or set(parameter.opts) & set(without):
            continue
        text = re.sub(r" \[[a-z_.]+\]\.$", ".", record[1])
        rows.append((f"`{record[0]}`", settings.get(parameter.opts[0], ""), text))
    return rows


def settings_of_options() -> Mapping[str, str]:
    """Flag → the settings that it sets, as code."""
    found: dict[str, Any] = {option.flag: (option.path,) for option in RUN_OPTIONS}
    found |= {flag: paths for flag, (paths, _) in SHARED_OPTIONS.items()}
    return {flag: ", ".join(f"`{path}`" for path in paths) for flag, paths in found.items()}
