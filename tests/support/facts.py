"""Waiting for facts with a deadline, so that no test ever sleeps for luck."""

import time
from collections.abc import Callable
from typing import TypeVar

_Found = TypeVar("_Found")

POLL_S = 0.02


def wait_for(what: str, look: Callable[[], _Found | None], *, deadline_s: float) -> _Found:
    """Return what ``look`` finds (anything but None and False) within ``deadline_s``; fail naming ``what``."""
    end_s = time.monotonic() + deadline_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(POLL_S)
