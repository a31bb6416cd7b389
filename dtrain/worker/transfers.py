"""How far uploads and restores are, for people to see.

Threads count while the event loop reads. The counts go into the snapshots that are sent anyway and cause none. What
the coordinator decides by them it decides by their growth, so they are no part of the machine's state, and a restarted
agent counts anew.
"""

import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dtrain.common.names import Generation, JobName
from dtrain.storage.retrying import GaveUp
from dtrain.worker.bandwidth import BandwidthCap
from dtrain.worker.rank_dirs import RankId

_Of = TypeVar("_Of", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How far one is. 0 <= bytes_done <= bytes_total, but for a moment when a slice has to go again."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """What is under way on this node."""

    uploads: Mapping[RankId, Transfer] = field(default_factory=dict)
    # A node fetches what all its ranks need once, so this is no rank's.
    restores: Mapping[tuple[JobName, Generation], Transfer] = field(default_factory=dict)


def sums(transfers: Iterable[tuple[_Of, Transfer]]) -> dict[_Of, Transfer]:
    """Return for each that is named what its transfers come to together."""
    found: dict[_Of, Transfer] = {}
    for of, more in transfers:
        before = found.get(of, Transfer(bytes_done=0, bytes_total=0))
        found[of] = Transfer(
            bytes_done=before.bytes_done + more.bytes_done, bytes_total=before.bytes_total + more.bytes_total
        )
    return found


class UploadMeter:
    """Counts an upload's bytes, keeps them under the cap, and ends it when nobody wants it any more."""

    def __init__(self, cap: BandwidthCap, give_up: threading.Event) -> None:
        self._cap = cap
        self._give_up = give_up
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0
        self._furthest = 0

    @property
    def progress(self) -> Transfer:
        with self._lock:
            return Transfer(bytes_done=self._done, bytes_total=self._total)

    @property
    def furthest(self) -> int:
        """The most bytes that any try has sent: what is sent again is no advance."""
        with self._lock:
            return self._furthest

    def begin(self, total_bytes: int, *, done_bytes: int = 0) -> None:
        """A try begins, after which so many bytes are sent; some of them were before."""
        with self._lock:
            self._done, self._total = done_bytes, total_bytes

    def before(self, count_bytes: int) -> None:
        self._cap.wait_for(count_bytes, self._give_up)
        if self._give_up.is_set():
            raise GaveUp("no longer wanted")

    def moved(self, count_bytes: int) -> None:
        with self._lock:
            self._done += count_bytes
            self._furthest = max(self._furthest, self._done)
