"""Threads that give way to the trainers, whatever the kernel weighs first.

On Linux a thread has a nice value of its own. A low one is a low claim on the disk too, as long as nobody set an I/O
priority: the kernel derives one. Where the kernel weighs sessions first (session_priority.py), the worker's session
gives way as a whole while such a thread works, if it is the worker's alone. Within it the event loop still comes first.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar

from dtrain.worker.session_priority import AGAIN_S, is_own_session, set_session_niceness

NICENESS = 10  # below every trainer: about a tenth of a core that a trainer wants too

_P = ParamSpec("_P")
_T = TypeVar("_T")


class GivingWay:
    """Lowers the session's claim as long as somebody is inside. From any thread."""

    def __init__(self, set_niceness: Callable[[int], None], *, again_s: float = AGAIN_S) -> None:
        """``set_niceness``: sets the session's nice value, or raises OSError; BlockingIOError: not just now."""
        self._set_niceness = set_niceness
        self._again_s = again_s
        self._lock = threading.Lock()  # guards what follows
        self._inside = 0
        self._lowered = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self._settle()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            self._settle()

    def _settle(self) -> None:
        wanted = self._inside > 0
        if wanted is self._lowered or self._timer is not None:
            return
        try:
            self._set_niceness(NICENESS if wanted else 0)
        except BlockingIOError:
            self._timer = threading.Timer(self._again_s, self._try_again)
            self._timer.daemon = True
            self._timer.start()
        except OSError:
            return  # a kernel without it, or a sandbox that forbids it: then threads compete, and still work
        else:
            self._lowered = wanted

    def _try_again(self) -> None:
        with self._lock:
            self._timer = None
            self._settle()


class YieldingThreads(Executor):
    """Threads that give way to every ordinary thread, and to other sessions while one of them works."""

    def __init__(self, name: str, count: int, giving_way: GivingWay | None) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_give_way)
        self._giving_way = giving_way

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        def work() -> _T:
            with self._giving_way or contextlib.nullcontext():
                return fn(*args, **kwargs)

        return self._pool.submit(work)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)


_WHOLE_SESSION = GivingWay(set_session_niceness)  # one for the process, as its session has one value


def yielding_threads(name: str, count: int) -> YieldingThreads:
    """Return a pool of ``count`` threads that give way."""
    return YieldingThreads(name, count, _WHOLE_SESSION if is_own_session() else None)


def _give_way() -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid even this; then they compete, and still work
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
