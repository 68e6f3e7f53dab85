"""manifest.json: what a finished artifact consists of and how it came about. `artifacts.commit` writes it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from pydantic import TypeAdapter

from common.errors import DataError
from common.json_files import to_json
from common.storage.store import check_key

SCHEMA = 1
MANIFEST = "manifest.json"
STAGE_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
KEY_DIGEST = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"[0-9a-z]{4,64}")
ONE_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{0,1000}")


class Malformed(DataError):  # noqa: N818 - a state more than an error
    """A manifest that is not one."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a finished artifact consists of and how it came about.

    Attributes:
        attempt: the folder below the key that holds the files.
        files: size and sha256 of each file, by path relative to that folder.
        digest: sha256 over names and hashes of all files that are not volatile: equal content, equal digest.
        volatile: patterns of files whose bytes may differ between equal runs.
        inputs: argument name → key and digest of each artifact that was read.
        started: when its first attempt began, in seconds since 1970.
        seconds: wall time of all attempts, excluding the time between them.
    """

    schema: int
    stage: str
    key: str
    shard: int | None
    attempt: str
    files: dict[str, FileRecord]
    digest: str
    volatile: list[str]
    ingredients: dict[str, Any]
    inputs: dict[str, list[dict[str, str]]]
    version: str
    host: str
    started: float
    seconds: float
    metrics: dict[str, Any]

    def to_json(self) -> bytes:
        """The manifest as it is stored."""
        return to_json(asdict(self))

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Reads and checks a manifest.

        Args:
            where: named in errors.

        Raises:
            Malformed: it is damaged.
            DataError: a newer version wrote it.
        """
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError):
            raise Malformed(f"{where} is not JSON") from None
        schema = raw.get("schema") if isinstance(raw, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            written = f"has format {schema}, written by moe-asr {raw.get('version')}; this one knows up to {SCHEMA}"
            raise DataError(f"{where} {written}: upgrade moe-asr, or use another store")
        return _validated(data, where)


def _validated(data: bytes, where: str) -> Manifest:
    from pydantic import ValidationError

    try:
        manifest: Manifest = _MANIFEST.validate_json(data, strict=True)
        _check_names(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise Malformed(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except DataError as error:
        raise Malformed(f"{where}: {error}") from None
    return manifest


def _check_names(manifest: Manifest) -> None:
    """A manifest may come from anywhere: none may point out of its own folder, or write more than a line into a log.

    Raises:
        DataError: a name, digest or version that no stage of ours writes.
    """
    digests = (manifest.digest, *(file.sha256 for file in manifest.files.values()))
    used = [row for rows in manifest.inputs.values() for row in rows]
    checks: list[tuple[re.Pattern[str], Iterable[str]]] = [
        (STAGE_NAME, (manifest.stage, *manifest.inputs)),
        (KEY_DIGEST, (manifest.key, *(row.get("key", "") for row in used))),
        (SHA256, (*digests, *(row.get("digest", "") for row in used))),
        (ATTEMPT, (manifest.attempt,)),
        (ONE_LINE, (manifest.version, manifest.host, *manifest.files)),
    ]
    for pattern, names in checks:
        for name in names:
            if not pattern.fullmatch(name):
                raise DataError(f"{name[:80]!r} is not a name that a manifest may hold")
    for name in manifest.files:
        check_key(name)
    if not all(map(math.isfinite, (manifest.started, manifest.seconds))):
        raise DataError("a time that is not a number")


_MANIFEST = TypeAdapter(Manifest)


def content_digest(files: Mapping[str, FileRecord], volatile: Sequence[str]) -> str:
    """sha256 over sorted names and hashes of the files that match none of the patterns."""
    kept = [[name, file.sha256] for name, file in sorted(files.items()) if not any(fnmatch(name, p) for p in volatile)]
    return hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode()).hexdigest()
