"""Threads that give way to the trainers: on Linux a thread has a nice value of its own.

A low nice value is a low claim on the disk too, as long as nobody set an I/O priority: the kernel derives one.
"""

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10  # below every trainer: about a tenth of a core that a trainer wants too


def yielding_threads(name: str, count: int) -> ThreadPoolExecutor:
    """Return a pool of ``count`` threads that give way to every ordinary thread."""
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid even this; then they compete, and still work
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
