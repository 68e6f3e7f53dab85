"""Storage of results: folders and buckets, with artifacts and checkpoints."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import ConfigError
from common.storage.local import LocalStore
from common.storage.store import Store


def open_store(url: str | Path, *, endpoint_url: str | None = None) -> Store:
    """The store at a folder's path or an `s3://bucket/prefix`.

    Args:
        endpoint_url: endpoint of an S3-compatible server; by default AWS, or that of the AWS variables and profiles.

    Raises:
        ConfigError: the address has another scheme, no bucket or credentials, or is malformed.
    """
    text = str(url)
    _check_endpoint(endpoint_url or "")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        if not text:
            raise ConfigError("store is empty: give a folder or s3://bucket/prefix")
        return LocalStore(url)
    bucket, _, prefix = text[scheme.end() :].partition("/")
    if scheme[1].lower() != "s3":
        raise ConfigError(f"store {scheme[1]}://…: only folders and s3://bucket/prefix are known (with endpoint_url)")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise ConfigError("store s3://…: what follows s3:// must be a bucket's name, without credentials or port")
    from common.storage.s3 import S3Store

    return S3Store(bucket, prefix, endpoint_url=endpoint_url)


def _check_endpoint(url: str) -> None:
    """Checks that the endpoint is a plain address, for any kind of store, since it is recorded."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("endpoint_url is malformed: write it as http://host:port") from None
    if "@" in url or parts.query:
        raise ConfigError("endpoint_url contains credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
