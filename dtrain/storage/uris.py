"""From the words a person writes after ``--store`` to a store, and the test whether it can be used at all.

A wrong store must be found when a job is submitted, not at its first checkpoint: :func:`probe` does what a
checkpoint would do, and says in one sentence what stands in the way and how to mend it.
"""

import contextlib
import secrets
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from dtrain.common.errors import PermanentError, RetryableError, UserError
from dtrain.storage.objects import AlreadyExists, NotFound, ObjectStore

PROBE_PREFIX = "dtrain-probe-"
_S3_PARAMETERS = ("endpoint", "region")
_PROBE_BYTES = b"dtrain writes this to see whether it can, and deletes it again\n"
_FORMS = "give a folder's path, file:///absolute/path, or s3://bucket/prefix?endpoint=http://host:port&region=name."


def open_store(uri: str) -> ObjectStore:
    """Return the store that ``uri`` names, without touching it. Raises :class:`UserError`.

    ``/a/path``, ``a/path`` (relative to the working directory) and ``file:///a/path`` are folders;
    ``s3://bucket/prefix?endpoint=...&region=...`` is S3 or what speaks like it, with the usual AWS credentials.
    """
    if not uri or "\x00" in uri:
        raise UserError(f"store {uri!r} is not valid: {_FORMS}")
    if "://" not in uri and not uri.startswith("file:"):
        return _open_folder(Path(uri))
    match uri.partition(":")[0].lower():
        case "file":
            return _open_file_uri(uri)
        case "s3":
            return _open_s3(uri)
        case _:
            raise UserError(f"store {uri!r} is not valid: {_FORMS}")


def probe(store: ObjectStore) -> None:
    """Write a small object that must not be there, read it back and delete it.

    Raises :class:`UserError` with the mend if that fails.
    """
    key = PROBE_PREFIX + secrets.token_hex(8)
    try:
        try:
            with contextlib.suppress(AlreadyExists):  # a try before, whose answer was lost
                store.put(key, _PROBE_BYTES, if_absent=True)
            found = store.get(key)
        finally:
            store.delete(key)
    except NotFound as error:
        raise UserError(
            f"store {store.uri} does not give back what was just written: name a store that reads its own writes."
        ) from error
    except RetryableError as error:
        raise UserError(f"store {store.uri} cannot be used now: {error}") from error
    except PermanentError as error:
        raise UserError(f"store {store.uri} cannot be used: {error}") from error
    if found != _PROBE_BYTES:
        raise UserError(f"store {store.uri} gives back other bytes than were written: name another store.")


def _open_folder(path: Path) -> ObjectStore:
    from dtrain.storage.local import LocalFolder

    return LocalFolder(path)


def _open_file_uri(uri: str) -> ObjectStore:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise UserError(f"store {uri!r} is not valid: write file:///absolute/path, with three slashes.")
    path = unquote(parts.path, errors="strict")
    if "\x00" in path:
        raise UserError(f"store {uri!r} is not valid: {_FORMS}")
    return _open_folder(Path(path))


def _open_s3(uri: str) -> ObjectStore:
    parts = urlsplit(uri)
    parameters = parse_qs(parts.query, keep_blank_values=True)
    if "@" in parts.netloc or ":" in parts.netloc or not parts.netloc or parts.fragment:
        raise UserError(
            f"store {parts.scheme}://{parts.netloc.rpartition('@')[2]} is not valid: write s3://bucket/prefix; "
            "credentials come from the environment or ~/.aws, a host from endpoint=."
        )
    if parameters.keys() - set(_S3_PARAMETERS) or any(len(values) > 1 for values in parameters.values()):
        raise UserError(
            f"store s3://{parts.netloc} has {', '.join(sorted(parameters))} after '?': "
            "only endpoint= and region= may stand there, once each."
        )
    endpoint, region = (parameters[name][0] if name in parameters else None for name in _S3_PARAMETERS)
    if endpoint is not None:
        _check_endpoint(endpoint)
    # boto3 takes 0.2 s to import: only whoever uses S3 pays for it.
    from dtrain.storage.s3 import S3Store

    try:
        return S3Store(
            bucket=parts.netloc,
            prefix=unquote(parts.path).strip("/"),
            endpoint=endpoint,
            region=region,
        )
    except PermanentError as error:
        raise UserError(f"store {uri!r} is not valid: {error}") from error


def _check_endpoint(endpoint: str) -> None:
    where = urlsplit(endpoint)
    try:
        port_is_possible = where.port != 0
    except ValueError:  # not a number, or too large
        port_is_possible = False
    if "@" in endpoint:
        raise UserError("credentials in endpoint= are not used: leave them to the environment or ~/.aws.")
    if where.scheme not in ("http", "https") or not where.hostname or where.query or not port_is_possible:
        raise UserError(f"endpoint {endpoint!r} is not valid: write endpoint=http://host:port or https://host.")
