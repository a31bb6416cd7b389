"""Trying again, within bounds: the one policy for every call to storage.

Waits grow and are drawn at random, so that the ranks of a job, which all failed at the same moment, do not
all come back at the same moment. A deadline bounds the time without any advance, since what stands still is
better given up than pursued; an event ends the waiting at once, when the attempt is no longer wanted.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from dtrain.common.errors import DtrainError, RetryableError, ShardDamagedError

WAIT_FIRST_S = 0.1  # upper end of the first wait's range; it doubles with each try
WAIT_MAX_S = 5.0  # upper end of any wait's range
# A network may damage what it carries, and what is called damaged is not trusted again: so many reads in a row must
# have found it so.
DAMAGED_READS = 3

_T = TypeVar("_T")


class GaveUp(DtrainError):
    """The caller's event was set: what was tried is no longer wanted. Chained to the last failure, if any."""


def with_retries(
    call: Callable[[], _T],
    *,
    deadline_s: float,
    give_up: threading.Event | None = None,
    advance: Callable[[], int] = lambda: 0,
) -> _T:
    """Return ``call()``, tried again on :class:`RetryableError` until ``deadline_s`` seconds have passed.

    It is called at least once, for the last time at the deadline; a call under way is not cut short. After the
    deadline the last error is raised; when ``give_up`` is set, :class:`GaveUp`. Other errors pass at once.
    ``advance`` says how far the tries have come; one that came further than all before begins the time anew.
    """
    given_up = give_up or threading.Event()
    deadline, furthest = time.monotonic() + deadline_s, advance()

    failures: list[RetryableError] = []  # the last one only

    def attempt() -> _T:
        if given_up.is_set():
            raise GaveUp("no longer wanted") from (failures[0] if failures else None)
        try:
            return call()
        except RetryableError as error:
            nonlocal deadline, furthest
            failures[:] = [error]
            if (now := advance()) > furthest:
                deadline, furthest = time.monotonic() + deadline_s, now
            raise

    def is_over(_: RetryCallState) -> bool:
        return given_up.is_set() or time.monotonic() >= deadline

    def wait(seconds: float) -> None:
        given_up.wait(min(seconds, max(0.0, deadline - time.monotonic())))

    retrying = Retrying(
        retry=retry_if_exception_type(RetryableError),
        wait=wait_random_exponential(multiplier=WAIT_FIRST_S, max=WAIT_MAX_S),
        stop=is_over,
        sleep=wait,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except RetryableError as error:
        if given_up.is_set():
            raise GaveUp("no longer wanted") from error
        raise


def read_again_if_damaged(read: Callable[[], _T]) -> _T:
    """Return ``read()``. What came damaged is read again: its way may have done that."""
    for _ in range(DAMAGED_READS - 1):
        with contextlib.suppress(ShardDamagedError):
            return read()
    return read()
