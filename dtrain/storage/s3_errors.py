"""What an S3 server or the way to it may answer, as the port's errors, each with its mend.

Servers that speak S3 agree on the HTTP status and much less on the code in the body, so known codes are
looked at first and the status decides the rest: 5xx (but 501, not implemented) and 429 may pass, 4xx will not.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from botocore.model import OperationModel
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from dtrain.common.errors import DtrainError, ShardDamagedError
from dtrain.storage.objects import AlreadyExists, NotFound, StorageFull, StorageRefused, StorageUnavailable

_ABSENT = {"NoSuchKey", "NotFound", "404"}
_PRESENT = {"PreconditionFailed", "412"}
_NO_BUCKET = {"NoSuchBucket", "InvalidBucketName"}
_WRONG_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "InsufficientCapacity", "507"}
_RANGE = {"InvalidRange", "416"}
# Refusals by status that say "again" by their code: a racing writer, a body damaged or late on its way.
_PASSING = {
    "ConditionalRequestConflict",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "NoSuchUpload",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_PASSING_STATUS = {408, 409, 425, 429}
# Operations that are answered by a document, so that an empty body is never the whole answer.
_ANSWERED_IN_BODY = {
    "ListObjectsV2",
    "ListMultipartUploads",
    "ListParts",
    "CreateMultipartUpload",
    "CompleteMultipartUpload",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    """What the sentences about an S3 store name."""

    bucket: str
    endpoint: str  # as a person wrote it, or "AWS"


def refuse_empty_answer(operation_model: OperationModel, response_dict: dict[str, Any], **_: object) -> None:
    """Before botocore reads an answer: let one that broke off before its first byte be a server's error.

    botocore reads a connection that ends between head and body as an answer without a body, and an empty body as a
    list of nothing. Objects that are there would seem not to be.
    """
    if operation_model.name in _ANSWERED_IN_BODY and response_dict["status_code"] == 200 and not response_dict["body"]:
        response_dict["status_code"] = 500


@contextlib.contextmanager
def translated(place: S3Place, key: str, *, reading: bool) -> Iterator[None]:
    """Turn botocore's errors into the port's. ``reading``: a 404 without a name is about the object."""
    try:
        yield
    except DtrainError:
        raise
    except ClientError as error:
        raise _of_answer(error, place, key, reading=reading) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageRefused(
            f"there are no credentials for bucket {place.bucket!r}: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or write them into ~/.aws/credentials."
        ) from error
    except ParamValidationError as error:
        raise StorageRefused(f"S3 cannot have bucket {place.bucket!r} or key {key!r}: {_line(error)}.") from error
    except (EndpointConnectionError, ConnectTimeoutError) as error:
        raise StorageUnavailable(
            f"S3 at {place.endpoint} cannot be reached: see that it runs, and that endpoint= names it."
        ) from error
    except (ConnectionError, HTTPClientError, ResponseStreamingError, IncompleteReadError, HTTPError, OSError) as error:
        raise StorageUnavailable(f"S3 at {place.endpoint} broke off for {key}: {_line(error)}") from error
    except ResponseParserError as error:
        raise StorageUnavailable(f"what answers at {place.endpoint} does not speak S3: mend endpoint=.") from error
    except BotoCoreError as error:
        raise StorageRefused(f"S3 at {place.endpoint} cannot be used for {key}: {_line(error)}.") from error


def _of_answer(error: ClientError, place: S3Place, key: str, *, reading: bool) -> DtrainError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"S3 at {place.endpoint} answered {status} {code} for {key}"
    where = f"bucket {place.bucket!r} at {place.endpoint}"
    if code in _NO_BUCKET or (code in _ABSENT and not reading):
        return StorageRefused(f"{where} does not exist: make it, or mend its name in the store's URI.")
    if code in _ABSENT:
        return NotFound(f"{key} is not in {where}")
    if code in _PRESENT:
        return AlreadyExists(f"{key} is already in {where}")
    if code in _RANGE or status == 416:
        return ShardDamagedError(key, "ends before the bytes that were asked for")
    if code in _WRONG_CREDENTIALS:
        return StorageRefused(
            f"{where} does not know these credentials ({code}): "
            "mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws."
        )
    if code == "RequestTimeTooSkewed":
        return StorageRefused(f"{where} finds this machine's clock wrong: set the clock.")
    if status in (401, 403):
        return StorageRefused(
            f"{where} does not allow this ({code}): give these credentials the right to list, read, write and "
            "delete there, or use others."
        )
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return StorageRefused(f"{where} is in another region ({code}): name it by region= in the store's URI.")
    if code in _FULL or status == 507:
        return StorageFull(f"{where} has no room for {key} ({code})")
    if code in _PASSING or status in _PASSING_STATUS or (status >= 500 and status != 501):
        return StorageUnavailable(said)
    return StorageRefused(f"{said}: see whether what listens there is an S3 server.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
