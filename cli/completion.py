"""`moe-asr completion`: words of the command line, completed by the shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from common.console import echo
from common.errors import UsageError


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Prints the script that lets a shell complete commands, options and their choices.

    \b
        moe-asr completion bash >> ~/.bashrc
        moe-asr completion zsh >> ~/.zshrc
        moe-asr completion fish > ~/.config/fish/completions/moe-asr.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    try:
        echo(kind(context.find_root().command, {}, "moe-asr", "_MOE_ASR_COMPLETE").source())
    except RuntimeError as error:  # its bash is too old
        raise UsageError(f"completion {shell}: {error}") from None
