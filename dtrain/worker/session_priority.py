"""The priority of a whole session, which many kernels weigh before that of its threads (autogroup, in sched(7)).

There a nice value counts only among the threads of one session. Trainers have sessions of their own, so whoever is to
give way to them must lower the claim of its session too. Where the kernel does not do so, nice values are enough.
"""

import os
from pathlib import Path

AGAIN_S = 0.2  # the kernel lets ordinary users, all together, change a session's value ten times a second


def is_own_session() -> bool:
    """Whether this process began its session: if not, others are in it that should not suffer."""
    return os.getsid(0) == os.getpid()


def set_session_niceness(value: int) -> None:
    """Set the nice value of this process's session. Raises BlockingIOError: not just now; OSError: not at all."""
    with Path("/proc/self/autogroup").open("r+b", buffering=0) as file:
        file.write(b"%d" % value)
