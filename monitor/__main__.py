"""`python -m monitor`: starts Prometheus with this project's rules, looking at local runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from monitor.program import CACHE, find_program

CONFIG = Path(__file__).resolve().parent / "prometheus.yml"


@click.command()
@click.option("--listen", default="127.0.0.1:9090", show_default=True, help="Address of Prometheus itself.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("build/prometheus"),
    show_default=True,
    help="Folder for its data.",
)
def main(listen: str, data: Path) -> None:
    """Starts Prometheus and stays until Ctrl-C."""
    program = find_program("prometheus")
    if isinstance(program, str):
        sys.exit(program)
    data.mkdir(parents=True, exist_ok=True)
    click.echo(f"Prometheus: http://{listen}   data: {data}   runs: moe-asr run --metrics-port 9470")
    click.echo(f"pictures:   python -m dashboards.draw http://{listen} plots/dashboards")
    if program.is_relative_to(CACHE):
        click.echo("its own web page needs the installed package: apt-get install prometheus")
    arguments = [f"--config.file={CONFIG}", f"--storage.tsdb.path={data}", f"--web.listen-address={listen}"]
    os.execv(program, [str(program), *arguments, "--log.level=warn"])


if __name__ == "__main__":
    main()
