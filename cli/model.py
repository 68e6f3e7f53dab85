"""Commands for base models."""

from pathlib import Path

import click

from common.console import echo


@click.group()
def model() -> None:
    """Convert base models."""


@model.command("import-ct2")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
def import_model(source: str, out: Path) -> None:
    """Convert a CTranslate2 Whisper model (as faster-whisper uses) to a Hugging Face checkpoint.

    SOURCE is a folder with model.bin, or `tiny.en` for the weights that the demo extra installs.

    \b
        moe-asr model import-ct2 tiny.en models/whisper-tiny.en
    """
    from demo.ct2 import bundled_tiny_en, import_ct2

    import_ct2(bundled_tiny_en() if source == "tiny.en" else Path(source), out)
    echo(out)
