"""Help texts are whole phrases that can stand alone: a noun or an imperative first, a full stop at the end."""

from collections.abc import Iterator

import click
import pytest

from cli.main import cli
from recipes.text_to_sql.__main__ import cli as text_to_sql
from stages.__main__ import stages

# A text that begins so needs the option's name before it to mean something.
DEPENDENT = {
    "Of",
    "Or",
    "In",
    "For",
    "With",
    "From",
    "To",
    "At",
    "By",
    "On",
    "And",
    "Only",
    "Also",
    "Not",
    "Where",
    "Who",
}


def options(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(command and option, its help text) of a command and all below it."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from options(below, (*path, name))
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield " ".join((*path, parameter.opts[0])), parameter.help or ""


@pytest.mark.parametrize("root", [cli, stages, text_to_sql], ids=["moe-asr", "stages", "text-to-sql"])
def test_help_texts_stand_alone(root):
    texts = dict(options(root, (root.name or "",)))
    assert len(texts) > 10
    wrong = {
        name: text for name, text in texts.items() if text.split(" ")[0] in DEPENDENT or text[:1] != text[:1].upper()
    }
    assert wrong == {}
    assert [name for name, text in texts.items() if not text] == []
