"""`python -m reference.screenshots PAGE…`: pictures of the pages that runs leave, by headless Chromium.

python -m reference.screenshots runs/demo/report.html            docs/images/report.png
python -m reference.screenshots --narrow --dark --out /tmp runs/demo/report.html
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from common.errors import DataError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = 1100, 390  # CSS pixels: a window, a telephone
HEIGHT = 1500
MEASURE = (
    "f=document.querySelector('iframe').contentDocument.documentElement;document.title=f.scrollWidth+' '+f.scrollHeight"
)


def browser() -> str | None:
    """The program of a Chromium on this machine."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def take_picture(page: Path, out: Path, *, width: int = WIDE, height: int = HEIGHT, dark: bool = False) -> None:
    """A PNG of the top of a page as a window of this size shows it, light or dark.

    Raises:
        DataError: there is no Chromium, or it fails.
    """
    with _framed(page, width, height) as frame:
        size = f"--window-size={max(width, 500)},{height}"  # a window is never narrower; the frame inside it is
        _chromium([f"--screenshot={out.resolve()}", size], frame, dark=dark)
    if width < 500:
        from PIL import Image

        with Image.open(out) as picture:
            picture.crop((0, 0, width, height)).save(out)


def measured(page: Path, width: int) -> tuple[int, int]:
    """Width and height in pixels that a page's content takes in a window of this width.

    Raises:
        DataError: there is no Chromium, or it fails.
    """
    with _framed(page, width, HEIGHT) as frame:
        dumped = _chromium(["--dump-dom", "--virtual-time-budget=2000"], frame, dark=False)
    found = re.search(r"<title>(\d+) (\d+)</title>", dumped)
    if found is None:
        raise DataError(f"{page} could not be measured")
    return int(found[1]), int(found[2])


def _framed(page: Path, width: int, height: int) -> tempfile._TemporaryFileWrapper[str]:
    """A page that shows another in a frame of a given size, and writes the size of its content into its title."""
    source = html.escape(page.resolve().as_uri())
    frame = f"<iframe src='{source}' onload=\"{MEASURE}\" style='width:{width}px;height:{height}px;border:0'></iframe>"
    file = tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    file.write(f"<!doctype html><title></title><body style='margin:0'>{frame}")
    file.flush()
    return file


def _chromium(flags: Sequence[str], file: tempfile._TemporaryFileWrapper[str], *, dark: bool) -> str:
    program = browser()
    if program is None:
        raise DataError(f"no Chromium found: install one of {', '.join(BROWSERS)}")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme]
        command += ["--allow-file-access-from-files", f"--user-data-dir={profile}", *flags, Path(file.name).as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise DataError(f"{program} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/images"), show_default=True, help="Folder.")
@click.option("--narrow", is_flag=True, help="As a telephone shows it.")
@click.option("--dark", is_flag=True, help="As a dark desktop shows it.")
@click.option("--height", default=HEIGHT, show_default=True, help="Of the picture, in pixels.")
def main(pages: Sequence[Path], out: Path, narrow: bool, dark: bool, height: int) -> None:
    """Writes a picture of each page: <stem>.png, or <stem>-narrow.png, <stem>-dark.png, <stem>-narrow-dark.png."""
    for page in pages:
        name = page.stem + "-narrow" * narrow + "-dark" * dark + ".png"
        take_picture(page, out / name, width=NARROW if narrow else WIDE, height=height, dark=dark)
        click.echo(out / name)


if __name__ == "__main__":
    main()
