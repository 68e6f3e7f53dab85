"""Large files to and from S3 in parts, several at once.

Parts are plain bytes, not file objects: Python then passes each to the socket in one call instead of thousands, which
uses less processor time than s3transfer (docs/reliability.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.storage.s3_errors import error_code
from common.storage.s3_replies import whole

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 * 2**20
MOST_PARTS = 10_000  # S3's limit
CHUNK_BYTES = 2**20  # read from a socket at once

Patient = Callable[[Callable[[], None]], None]  # runs a request again when its answer breaks off


def upload(client: S3Client, pool: ThreadPoolExecutor, bucket: str, key: str, path: Path) -> None:
    """Stores a file: in one request up to the size of two parts, otherwise in parts, which are all aborted on
    failure.
    """
    size = path.stat().st_size
    if size <= 2 * PART_BYTES:
        client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return
    length = max(PART_BYTES, -(-size // MOST_PARTS))
    target: dict[str, str] = {"Bucket": bucket, "Key": key}
    target["UploadId"] = whole(client.create_multipart_upload(Bucket=bucket, Key=key), "UploadId")["UploadId"]
    try:
        with _opened(path, os.O_RDONLY) as source:

            def send(number: int) -> Any:
                body = os.pread(source, length, (number - 1) * length)
                answer = client.upload_part(**target, PartNumber=number, Body=body)  # type: ignore[arg-type]
                return {"PartNumber": number, "ETag": whole(answer, "ETag")["ETag"]}

            sent = all_or_none(pool, send, range(1, -(-size // length) + 1))
        _complete(client, target, sent, size)
    except BaseException:
        with suppress(Exception):  # parts that stay are found by `moe-asr gc`
            client.abort_multipart_upload(**target)  # type: ignore[arg-type]
        raise


def _complete(client: S3Client, target: dict[str, Any], sent: list[Any], size: int) -> None:
    """Completes an upload in parts. If the reply was lost, the repeated request finds that the upload no longer
    exists.
    """
    try:
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": sent})
    except client.exceptions.ClientError as error:
        if error_code(error) != "NoSuchUpload":
            raise
        head = client.head_object(Bucket=target["Bucket"], Key=target["Key"])
        if head["ContentLength"] != size:
            raise


def download(client: S3Client, pool: ThreadPoolExecutor, patient: Patient, bucket: str, key: str, path: Path) -> None:
    """Downloads a file: all parts are of the same version, otherwise the server refuses with a failed precondition."""
    first: dict[str, Any] = {}

    def start() -> None:
        answer = whole(client.get_object(Bucket=bucket, Key=key), "ContentLength", "ETag")
        first.update(size=answer["ContentLength"], tag=answer["ETag"])
        if first["size"] <= 2 * PART_BYTES:
            path.write_bytes(answer["Body"].read())
        else:
            answer["Body"].close()

    patient(start)
    if first["size"] <= 2 * PART_BYTES:
        return
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as target:

        def get_part(at: int) -> None:
            span = f"bytes={at}-{min(at + PART_BYTES, first['size']) - 1}"
            answer = whole(client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=first["tag"]), "ContentLength")
            place = at
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                place += os.pwrite(target, chunk, place)

        all_or_none(pool, lambda at: patient(lambda: get_part(at)), range(0, first["size"], PART_BYTES))


def all_or_none(pool: ThreadPoolExecutor, act: Callable[[int], Any], items: range) -> list[Any]:
    """Results in order; after the first failure, tasks that have not begun are cancelled, and running tasks are
    awaited.
    """
    futures = [pool.submit(act, item) for item in items]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
        raise


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
