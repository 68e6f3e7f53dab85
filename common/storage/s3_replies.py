"""Detection of incomplete replies of an S3 server.

Python's HTTP client treats the end of a connection as the end of the headers, and botocore accepts a body that is
shorter than announced unless it is that of an object. A truncated reply would then be an empty listing, an empty file
or a write that may not have happened. Connections made here raise an error for such a reply, which is retried.
"""

from __future__ import annotations

import http.client
import io
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Reply = TypeVar("Reply")


class IncompleteReplyError(Exception):
    """A reply without a field that every server sends."""


def whole(reply: Reply, *fields: str) -> Reply:
    """The reply itself.

    Args:
        reply: reply as parsed by botocore.
        fields: fields that every complete reply of this kind has.

    Raises:
        IncompleteReplyError: a field is missing.
    """
    missing = [field for field in fields if field not in reply]  # type: ignore[operator]
    if missing:
        raise IncompleteReplyError(", ".join(missing))
    return reply


def refuse_cut_replies(client: S3Client) -> None:
    """Makes a client accept a reply only if headers and body have the length announced by the server."""
    session: Any = client._endpoint.http_session  # type: ignore[attr-defined] # botocore has no option for this
    session._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)


class _WholeLines(io.BufferedReader):
    """A connection's input in which a line that does not end is an error: headers and chunk sizes are lines."""

    def readline(self, limit: int | None = -1, /) -> bytes:
        line = super().readline(limit)
        at_limit = limit is not None and 0 <= limit <= len(line)
        if not line.endswith(b"\n") and not at_limit:
            raise http.client.RemoteDisconnected("the connection ended inside a reply's headers")
        return line


class _Response(http.client.HTTPResponse):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = _WholeLines(self.fp.detach())


class _Connection(AWSHTTPConnection):
    response_class = _Response  # type: ignore[assignment] # botocore's stubs say more than its code

    def request(self, *args: Any, **options: Any) -> Any:
        return super().request(*args, **options | {"enforce_content_length": True})


class _SecureConnection(AWSHTTPSConnection):
    response_class = _Response  # type: ignore[assignment] # botocore's stubs say more than its code

    def request(self, *args: Any, **options: Any) -> Any:
        return super().request(*args, **options | {"enforce_content_length": True})


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection
