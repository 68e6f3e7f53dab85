"""A bucket of AWS S3 or of an S3-compatible server as a store.

Endpoint, region and credentials come from the usual AWS variables, profile or role. Requests are retried with backoff
on throttling, server errors and dropped connections; other errors become one clear line, built only from the error's
code so that it cannot contain credentials.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from common.errors import DataError, RetryableError, StoreError
from common.files import MAX_DOCUMENT, MAX_FILE, NotFound, check_size, explained, moment, new_file
from common.storage.local import folder_files
from common.storage.s3_errors import broke_off, error_code, explain, is_connection, malformed
from common.storage.s3_parts import download, upload
from common.storage.s3_replies import refuse_cut_replies, whole
from common.storage.store import Entry, check_key

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

CONNECTIONS = 10
ATTEMPTS = 10  # of one request: about a minute of patience with botocore's backoff
OPENING_SECONDS = 120
READ_SECONDS = 60.0  # between two packets of an answer
STREAM_PAUSES = (0.3, 1.0, 3.0, 9.0)  # seconds between tries of a reply that broke off
UPLOAD_MARK = "?upload="  # in keys of unfinished uploads

T = TypeVar("T")


class S3Store:
    """Keys below a prefix of a bucket. May be used after a fork: each process opens its own connections."""

    def __init__(self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None) -> None:
        prefix = prefix.strip("/")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.endpoint_url = endpoint_url
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._opened: tuple[int, S3Client, ThreadPoolExecutor] | None = None
        self._opening = threading.Lock()

    def read(self, key: str, limit: int = MAX_DOCUMENT) -> bytes:
        return self._read(key, limit)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._read(key, length, Range=f"bytes={start}-{start + length - 1}")
        if len(data) != length:
            raise DataError(f"{self._name(key)} ends before byte {start + length:,}: it is truncated")
        return data

    def get(self, key: str, path: Path) -> None:
        full = self._full(key)
        with explained(path), new_file(path) as temporary:
            try:
                download(self._client, self._pool, partial(self._ask, key), self.bucket, full, temporary)
            except Exception as error:
                raise explain(error, self._name(key), self._endpoint) from None

    def put(self, key: str, path: Path) -> None:
        if not path.is_file():
            raise NotFound(f"{path} does not exist")
        with explained(path):
            self._ask(key, lambda: upload(self._client, self._pool, self.bucket, self._full(key), path))

    def write(self, key: str, data: bytes) -> None:
        self._ask(key, lambda: self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store.

        A reply may be lost although the write was done. The repeated request then finds its own result, so after a
        retry the stored bytes are compared.
        """
        from botocore.exceptions import ClientError

        client, repeated = self._client, False
        for pause in (*STREAM_PAUSES, None):
            try:
                client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                repeated = repeated or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                code = error_code(error)
                if code in ("PreconditionFailed", "412"):
                    return repeated and self.read(key, MAX_FILE) == data
                if code in ("NotImplemented", "501"):  # no conditions here: the best that is left
                    return self._put_if_none_seen(key, data)
                if code not in ("ConditionalRequestConflict", "OperationAborted", "409") or pause is None:
                    raise explain(error, self._name(key), self._endpoint) from None
            except Exception as error:
                if pause is None or not broke_off(error):
                    raise explain(error, self._name(key), self._endpoint) from None
                repeated = True
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _put_if_none_seen(self, key: str, data: bytes) -> bool:
        if self.size(key) is not None:
            return False
        self.write(key, data)
        return True

    def move_aside(self, key: str, to: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        full = self._full(key)

        def look() -> tuple[bytes, str]:
            reply = whole(self._client.get_object(Bucket=self.bucket, Key=full), "ContentLength", "ETag")
            with closing(reply["Body"]) as body:
                return body.read() if reply["ContentLength"] == len(data) else b"", reply["ETag"]

        try:
            content, tag = self._ask(key, look)
        except NotFound:
            return False
        if content != data:
            return False
        self.write(to, data)
        try:
            self._client.delete_object(Bucket=self.bucket, Key=full, IfMatch=tag)
        except Exception as error:
            code = error_code(error) if isinstance(error, ClientError) else ""
            if code in ("NotImplemented", "501"):
                self.delete(key)
                return True
            if code in ("NoSuchKey", "404"):  # another process was faster, and gave it the same name
                return False
            if code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                self.delete(to)
                return False
            raise explain(error, self._name(key), self._endpoint) from None
        return True

    def list(self, prefix: str, *, follow: bool = True) -> Iterator[Entry]:
        """See Store; a bucket has no links."""
        ask = partial(self._client.list_objects_v2, Bucket=self.bucket, Prefix=self._full(prefix))
        for page in self._pages(prefix, ask, {"ContinuationToken": "NextContinuationToken"}):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # consoles make such objects to show folders
                    yield Entry(item["Key"][len(self.prefix) :], item["Size"], item["LastModified"].timestamp())

    def leftovers(self) -> Iterator[Entry]:
        """See Store: uploads in parts that nobody completed; their size is not known."""
        ask = partial(self._client.list_multipart_uploads, Bucket=self.bucket, Prefix=self.prefix)
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for page in self._pages("", ask, markers):
            for item in page.get("Uploads", ()):
                key = item["Key"][len(self.prefix) :]
                yield Entry(f"{key}{UPLOAD_MARK}{item['UploadId']}", 0, item["Initiated"].timestamp())

    def _pages(self, key: str, ask: Callable[..., Any], markers: Mapping[str, str]) -> Iterator[Any]:
        """All pages of a listing; botocore's paginator would end early if a page has to be requested again.

        Args:
            markers: argument for the next page → field of the page before that has its value.
        """
        at: dict[str, str] = {}
        while True:
            page = self._ask(key, lambda at=at: whole(ask(**at), "IsTruncated"))  # type: ignore[misc]
            yield page
            if not page["IsTruncated"]:
                return
            before, at = at, {name: page[field] for name, field in markers.items() if page.get(field)}
            if at in ({}, before):
                raise StoreError(f"{self._name(key)} at {self._endpoint}: the server's listing does not come to an end")

    def delete(self, key: str) -> None:
        name, _, upload = key.partition(UPLOAD_MARK)
        full = self._full(name)
        try:
            if upload:
                self._ask(
                    name, lambda: self._client.abort_multipart_upload(Bucket=self.bucket, Key=full, UploadId=upload)
                )
            else:
                self._ask(name, lambda: self._client.delete_object(Bucket=self.bucket, Key=full))
        except NotFound:
            return

    def size(self, key: str) -> int | None:
        try:
            ask = partial(self._client.head_object, Bucket=self.bucket, Key=self._full(key))
            return self._ask(key, lambda: whole(ask(), "ContentLength"))["ContentLength"]
        except NotFound:
            return None

    def now(self) -> float:
        """See Store: the date of a reply."""
        reply = self._ask("", lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1))
        date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def local_path(self, key: str, *, to_write: bool = False) -> None:
        return

    def put_folder(self, folder: Path, prefix: str) -> None:
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        with ThreadPoolExecutor(CONNECTIONS) as files:
            list(files.map(lambda name: self.put(prefix + name, folder / name), folder_files(folder)))

    def _full(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    @property
    def _client(self) -> S3Client:
        return self._open()[1]

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """Thread pool for the parts of large files; whole files use other pools, so that no thread waits for its own
        pool.
        """
        return self._open()[2]

    @property
    def _endpoint(self) -> str:
        """The server's address without credentials."""
        url = self.endpoint_url or (self._opened[1].meta.endpoint_url if self._opened else "") or "AWS"
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else url

    def _open(self) -> tuple[int, S3Client, ThreadPoolExecutor]:
        if self._opened is not None and self._opened[0] == os.getpid():
            return self._opened
        got = self._opening.acquire(timeout=OPENING_SECONDS)  # a fork may have copied it locked
        try:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = self._connect()
            return self._opened
        except ValueError:
            raise malformed(f"{self.url} at {self._endpoint}") from None
        except Exception as error:
            raise explain(error, self.url, self._endpoint) from None
        finally:
            if got:
                self._opening.release()

    def _connect(self) -> tuple[int, S3Client, ThreadPoolExecutor]:
        """Opens connections, and makes a first request with short timeouts, so that a wrong address is reported in
        seconds.
        """
        import boto3

        session = boto3.session.Session()
        client = make_client(self.endpoint_url, attempts=3, session=session)
        try:
            whole(client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1), "IsTruncated")
        except Exception as error:
            explanation = explain(error, self.url, self._endpoint)
            if not isinstance(explanation, RetryableError) or is_connection(error):  # a busy server is left to later
                raise explanation from None
        client = make_client(self.endpoint_url, session=session)
        return os.getpid(), client, ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="s3")

    def _ask(self, key: str, request: Callable[[], T]) -> T:
        """The reply to a request; if the reply breaks off after it began, which botocore does not retry, the request is
        repeated.

        Raises:
            MoeAsrError: as `explain` says.
        """
        for pause in (*STREAM_PAUSES, None):
            try:
                return request()
            except Exception as error:
                if pause is None or not broke_off(error):
                    raise explain(error, self._name(key), self._endpoint) from None
            time.sleep(pause * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _read(self, key: str, limit: int, **options: Any) -> bytes:
        def read() -> bytes:
            reply = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **options)
            with closing(whole(reply, "ContentLength", "ETag")["Body"]) as body:
                check_size(reply["ContentLength"], limit, self._name(key))
                return body.read()

        return self._ask(key, read)


def make_client(
    endpoint_url: str | None,
    *,
    attempts: int | None = None,
    session: Session | None = None,
) -> S3Client:
    """A client with settings that S3-compatible servers understand, where the server is not AWS itself.

    Args:
        attempts: number of attempts of each request; by default AWS_MAX_ATTEMPTS, otherwise ten.
        session: boto3 session; if clients share a session, only the first takes long to make.
    """
    import boto3
    from botocore.config import Config

    session = session or boto3.session.Session()
    attempts = attempts or int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
    options: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": attempts},
        "connect_timeout": 10,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": 2 * CONNECTIONS,
        "tcp_keepalive": True,
    }
    region = session.region_name or "us-east-1"
    client = session.client("s3", region_name=region, endpoint_url=endpoint_url, config=Config(**options))
    address = client.meta.endpoint_url
    if not (urlsplit(address).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options |= {"signature_version": "s3v4", "s3": {"addressing_style": "path"}}
        options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        client = session.client("s3", region_name=region, endpoint_url=address, config=Config(**options))
    refuse_cut_replies(client)
    if os.environ.get("MOE_ASR_DIE_AT_STORE_OP"):
        client.meta.events.register("before-send.s3", _count_request)
        client.meta.events.register("response-received.s3", _count_answer)
    return client


def _count_request(request: Any, **_: Any) -> None:
    if request.method in ("PUT", "POST", "DELETE"):
        moment()


def _count_answer(event_name: str, **_: Any) -> None:
    if not event_name.rpartition(".")[2].startswith(("Get", "Head", "List")):
        moment()
