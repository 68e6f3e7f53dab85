"""`python -m bench.run`: every row, one table, one JSON file.

python -m bench.run                       this machine's CPU, or its GPU where there is one
python -m bench.run --only joint dense    some groups; the file's other rows stay
python -m bench.run --quick               micro sizes: does everything run?
"""

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bench import between_epochs, decoding, dense, encoding, joint, options
from bench.measure import Measurement, device_name, versions
from bench.setting import THREADS, Setting, cpu_setting, gpu_setting, quick_setting
from bench.table import RESULTS, rows_table
from common.json_files import read_object, write_object

# Names for --only, in the table's order.
GROUPS: Mapping[str, Callable[[Setting], list[Measurement]]] = {
    "joint": joint.rows,
    "short": joint.short_rows,
    "adapters": joint.adapter_rows,
    "dense": dense.rows,
    "extract": encoding.rows,
    "log-mel": encoding.mel_rows,
    "generate": decoding.rows,
    "options": options.rows,
    "between-epochs": lambda _: between_epochs.rows(),
}
FULL_SIZE_ONLY = ("between-epochs",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="bench.run", description="Measures moe-asr against peers, side by side.")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="ROW", help=", ".join(GROUPS)
    )
    parser.add_argument("--quick", action="store_true", help="micro sizes: figures mean nothing, but every row runs")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--out", type=Path, help="JSON file  [bench/results/<device>.json]")
    given = parser.parse_args(arguments)
    quieten()
    setting = choose(given.device, quick=given.quick)
    path = given.out or (None if given.quick else RESULTS / f"{slug(setting)}.json")
    rows_by_group = earlier(path, setting) if path is not None else {}
    if rows_by_group is None and set(given.only) < set(GROUPS):
        parser.error(f"{path} holds rows of another device or of other versions: name another file with --out")
    rows_by_group = rows_by_group or {}
    for name in given.only:
        if rows := measure(name, setting):
            rows_by_group[name] = [row | {"group": name} for row in rows]
        if path is not None:  # after each group: what is cut off leaves what it had
            write(in_order(rows_by_group), setting, path)
    print("\n".join(rows_table(in_order(rows_by_group))))
    if path is not None:
        print(f"\n{path} is written")


def earlier(path: Path, setting: Setting) -> dict[str, list[Measurement]] | None:
    """Rows by group of an earlier run, each kept until its group is measured again; None where device or versions
    differ.
    """
    if not path.is_file():
        return {}
    report = read_object(path)
    if (report["device"], report["versions"]) != (device_name(setting), versions()):
        return None
    return {name: [row for row in report["rows"] if row["group"] == name] for name in GROUPS}


def in_order(rows_by_group: Mapping[str, Sequence[Measurement]]) -> list[Measurement]:
    """All rows, in the table's order."""
    return [row for name in GROUPS for row in rows_by_group.get(name, ())]


def write(rows: Sequence[Measurement], setting: Setting, path: Path) -> None:
    """The JSON file."""
    report = {"device": device_name(setting), "versions": versions(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_object(path, report)


def quieten() -> None:
    """Warnings and logs of the peers would bury the table."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def choose(device: str, *, quick: bool) -> Setting:
    """The sizes for this machine; on a CPU always on the same number of threads."""
    if quick:
        torch.set_num_threads(1)
        return quick_setting()
    if device == "gpu" or (device == "auto" and torch.cuda.is_available()):
        return gpu_setting()
    torch.set_num_threads(THREADS)
    return cpu_setting()


def measure(name: str, setting: Setting) -> list[Measurement]:
    """The rows of a group; none where it fails, which is named."""
    if setting.name == "quick" and name in FULL_SIZE_ONLY:
        return []
    started, rows = time.monotonic(), []
    print(f"{name} …", end=" ", file=sys.stderr, flush=True)
    try:
        rows = GROUPS[name](setting)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        print(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", end=" ", file=sys.stderr)
    if setting.on_gpu:
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return rows


def slug(setting: Setting) -> str:
    """The results' file name: `cpu`, or the GPU's name in lower case."""
    if not setting.on_gpu:
        return setting.name
    return re.sub(r"[^a-z0-9]+", "-", device_name(setting).lower()).strip("-")


if __name__ == "__main__":
    main()
