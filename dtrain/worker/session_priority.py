"""The priority of a whole session, which many kernels weigh before that of its threads (autogroup, in sched(7)).

There a nice value counts only among the threads of one session. Trainers have sessions of their own, so whoever is to
give way to them must lower the claim of its session too. Where the kernel does not do so, nice values are enough.
Unlike a nice value, a session's may be raised to the ordinary 0 again by anybody.
"""

import os
import time
from pathlib import Path

_FILE = Path("/proc/self/autogroup")
_AGAIN_S = 0.1  # the kernel lets ordinary users, all together, change a session's value ten times a second
_TRIES_MAX = 50


def lower_session(niceness: int) -> bool:
    """Lower the claim of this process's session, if it is its alone; return whether that was done."""
    if os.getsid(0) != os.getpid():  # others are in it that should not suffer
        return False
    try:
        _set(niceness)
    except OSError:  # a kernel without it, a sandbox that forbids it, or not just now
        return False
    return True


def raise_session() -> bool:
    """Give this process's session its ordinary claim back; return whether it has it."""
    for _ in range(_TRIES_MAX):
        try:
            _set(0)
        except BlockingIOError:
            time.sleep(_AGAIN_S)
        except OSError:
            return False
        else:
            return True
    return False


def _set(value: int) -> None:
    with _FILE.open("r+b", buffering=0) as file:
        file.write(b"%d" % value)
