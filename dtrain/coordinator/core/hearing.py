"""For how long workers have been reaching this leader: the only time that counts against one that does not.

A leader that is cut off, or asleep, hears of nobody, and learns nothing about anybody by it.
"""

from dataclasses import dataclass

# Of a silence of all workers together only so much counts: two heartbeats. With it a worker that is alone, or slow,
# is still heard, and a leader that is cut off finds that out before it has waited for anybody for long.
GAP_S = 1.0


@dataclass(slots=True, kw_only=True)
class Hearing:
    """When snapshots reached this leader, whoever sent them. Times are monotonic."""

    last_s: float  # the newest; before the first of them, the begin of the leadership
    began: bool = False
    _total_s: float = 0.0

    def note(self, now_s: float) -> None:
        """A snapshot is here."""
        self._total_s = self.heard_s(now_s)
        self.last_s = now_s
        self.began = True

    def heard_s(self, now_s: float) -> float:
        """How much of the time until now counts, in seconds: none before the first snapshot."""
        return self._total_s + min(now_s - self.last_s, GAP_S) if self.began else 0.0
