"""`python -m bench.store`: what a store moves in a second, against plain boto3 and against the disk itself.

    python -m bench.store                                        a server on loopback, made for it; a folder in /tmp
    python -m bench.store --bucket B --endpoint-url URL          a server of yours
    python -m bench.store --folder /mnt/disk --mib 1024          another disk, a larger file

On AWS with `awscrt` installed there is one more column, boto3 with its native transfer threads.
Both sides take turns and medians are printed. The disk's own speed is a write and fsync, or a read, of the same bytes.
Processor seconds are this process's: with a server on the same machine, they tell more of the client than rates do.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.storage import open_store
from common.storage.store import Store

BLOCK = 16 * 2**20
SMALL_FILES, SMALL_BYTES = 300, 32 * 1024
ROUNDS = 5

Step = Callable[[], object]
Times = dict[str, tuple[float, float]]  # side → seconds, processor seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="bench.store", description="Throughput of stores, side by side.")
    parser.add_argument("--folder", type=Path, help="on the disk to measure  [a temporary one]")
    parser.add_argument("--bucket", help="of an S3 server  [one started for this]")
    parser.add_argument("--endpoint-url")
    parser.add_argument("--mib", type=int, default=256, help="size of the large file  [%(default)s]")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        bucket, endpoint = options.bucket, options.endpoint_url
        if bucket is None:
            bucket, endpoint = stack.enter_context(own_server(folder))
        print(table(measure(folder, bucket, endpoint, options.mib)))


@contextmanager
def own_server(folder: Path) -> Iterator[tuple[str, str]]:
    """A server on loopback with one bucket: its name and endpoint."""
    from tests.servers import ACCESS, SECRET, running_server

    (folder / "server").mkdir()
    with running_server(folder / "server") as server:
        os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
        boto3_client(server.endpoint).create_bucket(Bucket="bench")
        yield "bench", server.endpoint


def boto3_client(endpoint: str | None) -> Any:
    """The peer: boto3 with its own defaults."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint, region_name=os.environ.get("AWS_REGION", "us-east-1"))


def measure(folder: Path, bucket: str, endpoint: str | None, mib: int) -> list[list[str]]:
    """Rows of the table."""
    large, small = folder / "large", folder / "small"
    large.write_bytes(os.urandom(2**20) * mib)
    small.mkdir()
    for number in range(SMALL_FILES):
        (small / f"{number:05d}").write_bytes(secrets.token_bytes(SMALL_BYTES))
    prefix = f"bench-{secrets.token_hex(4)}"
    remote = open_store(f"s3://{bucket}/{prefix}", endpoint_url=endpoint)
    try:
        rows = folder_rows(folder, large, small) + s3_rows(folder, remote, boto3_client(endpoint), bucket, large, small)
    finally:
        for entry in list(remote.list("")):
            remote.delete(entry.key)
    amount = {"large": mib * 2**20 / 1e6, "small": SMALL_FILES}
    return [cells(name, {"large": "MB/s", "small": "files/s"}[kind], amount[kind], times) for name, kind, times in rows]


def folder_rows(folder: Path, large: Path, small: Path) -> list[tuple[str, str, Times]]:
    """A folder store against plain writes, each followed by an fsync, and plain reads."""
    store = open_store(folder / "store")
    out = folder / "out"
    return [
        (
            "folder: put a large file",
            "large",
            rounds({"ours": lambda: store.put("large", large), "disk": lambda: lasting_copy(large, out)}),
        ),
        (
            "folder: get it",
            "large",
            rounds({"ours": lambda: store.get("large", out), "disk": lambda: shutil.copyfile(large, out)}),
        ),
        (
            "folder: put small files",
            "small",
            rounds({"ours": lambda: store.put_folder(small, "s"), "disk": lambda: copy_all(small, folder / "plain")}),
        ),
    ]


def s3_rows(
    folder: Path, store: Store, peer: Any, bucket: str, large: Path, small: Path
) -> list[tuple[str, str, Times]]:
    """A server against boto3 in its default settings; one file after the other, as its documentation shows."""
    prefix = f"{store.url.rpartition('/')[2]}/peer"
    out, names = folder / "out", sorted(path.name for path in small.iterdir())
    (folder / "got").mkdir()

    def put_each() -> None:
        for name in names:
            peer.upload_file(str(small / name), bucket, f"{prefix}/{name}")

    def get_each() -> None:
        for name in names:
            peer.download_file(bucket, f"{prefix}/{name}", str(folder / "got" / name))

    def get_ours() -> None:
        shutil.rmtree(folder / "got-ours", ignore_errors=True)  # else nothing would be fetched again
        store.get_folder("s/", folder / "got-ours")

    def read_disk() -> None:
        with large.open("rb") as file:
            while file.read(BLOCK):
                pass

    puts: dict[str, Step] = {
        "ours": lambda: store.put("large", large),
        "boto3": lambda: peer.upload_file(str(large), bucket, f"{prefix}/large"),
        "disk": lambda: lasting_copy(large, out),
    }
    gets: dict[str, Step] = {
        "ours": lambda: store.get("large", out),
        "boto3": lambda: peer.download_file(bucket, f"{prefix}/large", str(out)),
        "disk": read_disk,
    }
    if (native := native_transfer(peer)) is not None:
        puts["native"] = lambda: peer.upload_file(str(large), bucket, f"{prefix}/large", Config=native)
        gets["native"] = lambda: peer.download_file(bucket, f"{prefix}/large", str(out), Config=native)
    steps: list[tuple[str, str, Mapping[str, Step]]] = [
        ("S3: put a large file", "large", puts),
        ("S3: get it", "large", gets),
        ("S3: put small files", "small", {"ours": lambda: store.put_folder(small, "s"), "boto3": put_each}),
        ("S3: get small files", "small", {"ours": get_ours, "boto3": get_each}),
    ]
    return [(name, kind, rounds(sides)) for name, kind, sides in steps]


def native_transfer(peer: Any) -> Any:
    """boto3's setting for its native transfer threads; None where they are not installed or do not reach the server."""
    from boto3.s3.transfer import TransferConfig

    if not (urlsplit(peer.meta.endpoint_url).hostname or "").endswith(".amazonaws.com"):
        return None  # boto3 makes them without the endpoint: they would send to AWS
    try:
        import awscrt  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        return None
    return TransferConfig(preferred_transfer_client="crt")


def lasting_copy(source: Path, target: Path) -> None:
    """What the disk can do: write in large blocks and wait for it."""
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(BLOCK):
            writing.write(block)
        writing.flush()
        os.fsync(writing.fileno())


def copy_all(source: Path, target: Path) -> None:
    """The same for each file of a folder."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        lasting_copy(path, target / path.name)


def rounds(sides: Mapping[str, Step]) -> Times:
    """Medians of each side, in turns after one round to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(ROUNDS + 1):
        for side, step in sides.items():
            started, processor = time.perf_counter(), time.process_time()
            step()
            if number:
                taken[side].append((time.perf_counter() - started, time.process_time() - processor))
    medians = {
        side: [statistics.median(column) for column in zip(*found, strict=True)] for side, found in taken.items()
    }
    return {side: (wall, processor) for side, (wall, processor) in medians.items()}


def cells(name: str, unit: str, amount: float, times: Times) -> list[str]:
    """One row: rates, ratio to boto3, processor seconds."""
    rates = {side: amount / wall for side, (wall, _) in times.items()}
    shown = [f"{rates[side]:,.0f}" if side in rates else "" for side in ("ours", "boto3", "native", "disk")]
    ratio = f"{rates['ours'] / rates['boto3']:.2f}×" if "boto3" in rates else ""
    processor = " / ".join(f"{times[side][1]:.2f}" for side in ("ours", "boto3") if side in times)
    return [name, *shown, unit, ratio, processor]


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    head = ["", "ours", "boto3", "boto3, native", "disk", "unit", "ours/boto3", "processor s, ours / boto3"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
