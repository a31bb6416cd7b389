"""A cap on what the agent sends to storage, all its uploads together, so that training keeps its share of the network.

A token bucket: it fills at the cap's rate up to what one second brings, and every slice takes its bytes out before it
is sent. A slice may take more than there is; then it waits until the debt is paid, and whoever comes next queues
behind it. So a large slice needs no room of its size, and the average never exceeds the cap by more than one second's
worth.
"""

import threading
import time
from collections.abc import Callable

from dtrain.common.errors import UserError

MIB_BYTES = 1024 * 1024
# Below this a slice would wait so long within a request that servers take its sender for dead.
CAP_MIN_MIB_PER_S = 1.0


class TokenBucket:
    """The arithmetic; time is an argument. Not for several threads."""

    def __init__(self, *, bytes_per_s: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._tokens = bytes_per_s  # bytes that may go at once; below 0: owed
        self._at_s = now_s

    def take(self, count_bytes: int, now_s: float) -> float:
        """Take so many bytes; return the seconds to wait before they may be sent."""
        filled = self._tokens + (now_s - self._at_s) * self._bytes_per_s
        self._tokens = min(filled, self._bytes_per_s) - count_bytes
        self._at_s = now_s
        return max(0.0, -self._tokens / self._bytes_per_s)


class BandwidthCap:
    """The agent's cap, for any thread."""

    def __init__(self, mib_per_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``mib_per_s``: None for none. Raises :class:`UserError` below CAP_MIN_MIB_PER_S."""
        if mib_per_s is not None and not mib_per_s >= CAP_MIN_MIB_PER_S:
            raise UserError(f"upload-mib-per-s {mib_per_s:g} is too low: give {CAP_MIN_MIB_PER_S:g} or more.")
        self._clock = clock
        self._lock = threading.Lock()
        self._bucket = (
            None if mib_per_s is None else TokenBucket(bytes_per_s=mib_per_s * MIB_BYTES, now_s=self._clock())
        )

    def wait_for(self, count_bytes: int, give_up: threading.Event) -> None:
        """Return when so many bytes may be sent, or at once when ``give_up`` is set."""
        if self._bucket is None:
            return
        with self._lock:
            wait_s = self._bucket.take(count_bytes, self._clock())
        if wait_s > 0:
            give_up.wait(wait_s)
