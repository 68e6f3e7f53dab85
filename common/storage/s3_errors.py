"""Errors of an S3 server as one line that says what to do, made only from their codes, so that it contains no
credentials.
"""

import socket
from typing import Any

from common.errors import ConfigError, DataError, MoeAsrError, RetryableError, StoreError
from common.files import NotFound

RIGHTS = "s3:ListBucket on the bucket, s3:GetObject and s3:PutObject on its keys"
RIGHTS_TO_CLEAN = "s3:DeleteObject and s3:AbortMultipartUpload on its keys, s3:ListBucketMultipartUploads on the bucket"
MESSAGES = {
    f"access denied; its credentials need {RIGHTS}; to clean up, also {RIGHTS_TO_CLEAN}": (
        "AccessDenied",
        "AllAccessDisabled",
        "403",
    ),
    "the server does not know these credentials; check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY": (
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidClientTokenId",
        "UnrecognizedClientException",
    ),
    "the session's token is no longer valid; sign in again": ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    "there is no such bucket at this endpoint; create it, or check store and endpoint_url": ("NoSuchBucket",),
    "this machine's clock and the server's differ too much; set the clock": ("RequestTimeTooSkewed", "RequestExpired"),
    "the bucket is in another region; set AWS_REGION": (
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "301",
    ),
    "the store is full; free some space": ("QuotaExceeded", "StorageFull", "XMinioStorageFull", "507"),
}
BY_CODE = {code: message for message, codes in MESSAGES.items() for code in codes}
BUSY = (
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "429",
    "RequestTimeout",
    "RequestTimeTooFast",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "OperationAborted",
)


def explain(error: Exception, name: str, endpoint: str) -> MoeAsrError:
    """One line that says what is wrong with which key at which server, and what to do.

    Args:
        error: botocore's error.
        name: full name of the key.
    """
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    from common.storage.s3_replies import IncompleteReplyError

    if isinstance(error, MoeAsrError):
        return error
    where = f"{name} at {endpoint}"
    if isinstance(error, boto.ClientError):
        return _explain_answer(error, where)
    if isinstance(error, boto.EndpointConnectionError) and _is_unknown_host(error.kwargs["error"]):
        return StoreError(f"{where}: this host name is not known; check endpoint_url and AWS_REGION")
    if isinstance(error, boto.SSLError):
        return StoreError(f"{where}: no trusted TLS connection; check https in endpoint_url, and AWS_CA_BUNDLE")
    if isinstance(error, ResponseParserError | IncompleteReplyError):
        return _no_s3(error, where)
    if is_connection(error) or broke_off(error):
        return RetryableError(f"{where}: no connection, or it broke off repeatedly; check endpoint_url, or try later")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StoreError(f"{where}: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, boto.ProfileNotFound):
        return ConfigError(f"{where}: AWS_PROFILE names a profile that is not in the AWS configuration files")
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError):
        return malformed(where)
    if isinstance(error, boto.BotoCoreError):
        return _no_s3(error, where)
    raise error


def _no_s3(error: Exception, where: str) -> StoreError:
    kind = type(error).__name__
    return StoreError(f"{where}: this does not answer like an S3 server ({kind}); check endpoint_url")


def malformed(where: str) -> ConfigError:
    """The error for an address or name of which no request can be made."""
    return ConfigError(f"{where}: endpoint_url, AWS_REGION or the bucket's name is malformed")


def _explain_answer(error: Any, where: str) -> MoeAsrError:
    code, status = error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in BY_CODE:
        return StoreError(f"{where}: {BY_CODE[code]} ({code})")
    if code in ("NoSuchKey", "NoSuchUpload", "404"):
        return NotFound(f"{where} does not exist")
    if code in ("InvalidRange", "416"):
        return DataError(f"{where} is shorter than expected: it is truncated")
    if code in ("PreconditionFailed", "412"):
        return RetryableError(f"{where} was changed by another process meanwhile; run it again")
    if code in BUSY or (status >= 500 and status not in (501, 507)):
        return RetryableError(f"{where}: the server is busy or unavailable ({code}); try later")
    return StoreError(f"{where}: the server refuses with {code} (HTTP {status}); `moe-asr doctor --store` says more")


def error_code(error: Any) -> str:
    """The server's error code, or the HTTP status if there is none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def broke_off(error: Exception) -> bool:
    """Whether a reply began and did not end, or ended with other bytes than the server sent.

    Lost connections are among them: botocore repeats these too, but no more once its quota of repetitions is used up.
    """
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    from common.storage.s3_replies import IncompleteReplyError

    broken = (boto.IncompleteReadError, boto.ReadTimeoutError, boto.ResponseStreamingError, boto.FlexibleChecksumError)
    ours = (HTTPError, ResponseParserError, IncompleteReplyError)
    return isinstance(error, (*broken, *ours, boto.ConnectionClosedError))


def is_connection(error: Exception) -> bool:
    """Whether the connection failed, or was lost before a reply."""
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError

    return isinstance(error, NoConnection | HTTPClientError)


def _is_unknown_host(error: Exception) -> bool:
    """Whether a host name does not exist; false if the name server does not answer at present, for example during a
    restart.
    """
    from urllib3.exceptions import NameResolutionError

    return isinstance(error, NameResolutionError) and getattr(error.__cause__, "errno", None) != socket.EAI_AGAIN
