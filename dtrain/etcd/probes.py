"""What listens at an address: an etcd, something else, or nothing; and whether that etcd is safe to trust.

Asked once, before anything else is begun, so that a wrong address is one clear sentence and not a retry that
never ends.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence

from dtrain.common.errors import PermanentError, RetryableError, UserError
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.errors import EtcdUnavailable
from dtrain.etcd.transport import parse_endpoint

_LOSSY = frozenset({"3.5.0", "3.5.1", "3.5.2"})  # mended in 3.5.3

# What gRPC says when the other side answers, but not as a gRPC server does.
_OTHER_PROTOCOL = ("http1", "HTTP", "Http2", "settings frame", "Socket closed", "reset by peer", "Connection reset")


async def probe(endpoints: Sequence[str], timeout_s: float) -> str:
    """Return the version of the first of ``endpoints`` that is a working etcd, as in ``"3.5.16"``.

    Raises :class:`UserError` that says of each address what is wrong, and the mend. Each address is given
    ``timeout_s`` seconds, all at the same time.
    """
    outcomes = await asyncio.gather(*(_probe_one(parse_endpoint(text), timeout_s) for text in endpoints))
    problems = []
    for version, problem in outcomes:
        if version is not None:
            return version
        problems.append(problem)
    if not problems:
        raise UserError("no etcd endpoint is given: give HOST:PORT, as in --etcd 127.0.0.1:2379.")
    raise UserError(" ".join(problems))


def known_lossy(version: str) -> str | None:
    """Return a sentence of warning if etcd of this version can lose what it acknowledged, else None."""
    if version not in _LOSSY:
        return None
    return (
        f"etcd {version} can lose acknowledged writes when it is killed: "
        "use 3.5.3 or newer where the job history matters."
    )


async def _probe_one(endpoint: str, timeout_s: float) -> tuple[str | None, str]:
    """Return (version, "") of an etcd, or (None, a sentence with the mend)."""
    problem = await _cannot_connect(endpoint, timeout_s)
    if problem:
        return None, problem
    try:
        async with EtcdClient([endpoint], timeout_s=timeout_s) as client:
            status = await client.status()
    except EtcdUnavailable as error:
        if any(words in str(error) for words in _OTHER_PROTOCOL):
            return None, _not_etcd(endpoint)
        return None, (
            f"{endpoint} accepts connections but does not answer as etcd within {timeout_s:g} s: "
            "check that it is etcd's client address (port 2379 by default) and that etcd is healthy."
        )
    except (RetryableError, PermanentError):
        return None, _not_etcd(endpoint)
    if not status.version:
        return None, _not_etcd(endpoint)
    if not status.has_leader:
        return None, (
            f"etcd at {endpoint} has no leader and takes no writes: start the missing members of its cluster."
        )
    return status.version, ""


def _not_etcd(endpoint: str) -> str:
    return (
        f"what listens at {endpoint} is not etcd's client API: "
        "give etcd's client address (port 2379 by default) with --etcd or DTRAIN_ETCD."
    )


async def _cannot_connect(endpoint: str, timeout_s: float) -> str:
    """Return a sentence if no connection can be made, else an empty text."""
    host, _, port = endpoint.rpartition(":")
    mend = "start etcd there, or give its address with --etcd or DTRAIN_ETCD."
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return f"{endpoint} cannot be reached within {timeout_s:g} s: {mend}"
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else "the name is not known"
        return f"nothing listens at {endpoint} ({reason}): {mend}"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""
