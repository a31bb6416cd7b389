"""One asyncio loop on virtual time, in which processes of several machines live, pause and die.

Each callback belongs to the process in whose context it was made. A process that was killed is one whose callbacks
are never run again: no `finally` of it runs, as after kill -9. A paused one has its callbacks kept until it goes on.
Time jumps from one timer to the next, so a schedule of minutes takes as long as its Python takes.

A thread of the product (an upload, a journal write) is a greenlet: when it blocks, virtual time passes for it.
"""

import asyncio
import contextvars
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from tests.sim.machines import Process

CURRENT: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)
WORLD = contextvars.Context()  # of what happens outside of all processes
_numbers = itertools.count(1)


class SimFuture(asyncio.Future):  # type: ignore[type-arg]
    """A future whose place in a set does not depend on where it lies in memory: numbered when it is first asked."""

    _number = 0

    def __hash__(self) -> int:
        if not self._number:
            self._number = next(_numbers)
        return self._number


class SimTask(asyncio.Task):  # type: ignore[type-arg]
    """The same for a task."""

    _number = 0

    def __hash__(self) -> int:
        if not self._number:
            self._number = next(_numbers)
        return self._number


class Handle:
    """One callback to be."""

    __slots__ = ("args", "call", "cancelled_", "context", "process", "when_s")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context) -> None:
        self.call = call
        self.args = args
        self.context = context
        self.process: Process | None = context.get(CURRENT)
        self.cancelled_ = False
        self.when_s = 0.0  # virtual

    def cancel(self) -> None:
        self.cancelled_ = True

    def cancelled(self) -> bool:
        return self.cancelled_

    def when(self) -> float:
        return self.when_s


class SimLoop(asyncio.AbstractEventLoop):
    """See the module's text. Everything that production code asks of its loop, and nothing else."""

    def __init__(self) -> None:
        self.now_s = 0.0  # virtual seconds since the beginning
        self.over = False  # the schedule has ended: nothing is taken any more
        self.errors: list[BaseException] = []  # raised by callbacks: bugs, ours or the product's
        self.thread_delay_s: Callable[[], float] = lambda: 0.0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._order = itertools.count()
        self._threads: set[greenlet] = set()  # those that have not ended

    # -- what asyncio asks ---------------------------------------------------------------------------

    def time(self) -> float:
        process = CURRENT.get()
        return self.now_s if process is None else process.machine.mono(self.now_s)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.over

    def is_closed(self) -> bool:
        return self.over

    def create_future(self) -> SimFuture:
        return SimFuture(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> SimTask:
        if self.over:
            coro.close()  # or Python would say that nobody awaited it
        return SimTask(coro, loop=self, name=name, context=context)

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, context if context is not None else contextvars.copy_context())
        if not self.over:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """``delay`` is on the clock of the context's machine."""
        handle = Handle(callback, args, context if context is not None else contextvars.copy_context())
        rate = 1.0 if handle.process is None else handle.process.machine.rate
        return self._at(self.now_s + max(0.0, delay) / rate, handle)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def _at(self, when_s: float, handle: Handle) -> Handle:
        handle.when_s = when_s
        if not self.over:
            heapq.heappush(self._timers, (when_s, next(self._order), handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        process = CURRENT.get()
        if error is not None and not self.over and process is not None and process.alive:
            self.errors.append(error)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        """The process in which this is called hears ``sig`` (:meth:`Process.signal`)."""
        process = CURRENT.get()
        if process is not None:
            process.handlers[sig] = lambda: callback(*args)

    def remove_signal_handler(self, sig: int) -> bool:
        return True

    # -- threads -------------------------------------------------------------------------------------

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        future = self.create_future()
        context = contextvars.copy_context()

        def done(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def body() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except Exception as raised:
                error = raised
            self.call_later(self.thread_delay_s(), done, result, error, context=context)
            self._threads.discard(getcurrent())

        def begin() -> None:
            thread = greenlet(body)
            self._threads.add(thread)
            thread.gr_context = context.copy()
            thread.switch()

        self.call_later(self.thread_delay_s(), begin, context=context)
        return future

    def block(self, delay_s: float) -> None:
        """In a thread of the product: let virtual time pass."""
        thread = getcurrent()
        if thread.parent is None:
            raise AssertionError("blocking in the event loop")
        if self.over:
            return
        self.call_later(delay_s, thread.switch, context=contextvars.copy_context())
        thread.parent.switch()

    # -- running -------------------------------------------------------------------------------------

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> Handle:
        """Have the world do something, outside of all processes."""
        return self.call_later(delay_s, call, *args, context=WORLD.copy())

    def give_back(self, handles: list[Handle]) -> None:
        """Run these soon: their process goes on after a pause."""
        self._ready.extend(handles)

    def run_while(self, wanted: Callable[[], bool], *, until_s: float) -> None:
        """Run until ``wanted()`` is false, time is ``until_s``, or nothing is left to happen."""
        outside = events._get_running_loop()
        events._set_running_loop(self)
        ready = self._ready
        try:
            while wanted() and self.now_s < until_s:
                if not ready and not self._next_timer():
                    return
                for _ in range(len(ready)):
                    handle = ready.popleft()
                    process = handle.process
                    if handle.cancelled_ or (process is not None and process.holds_back(handle)):
                        continue
                    try:
                        handle.context.run(handle.call, *handle.args)
                    except Exception as error:
                        self.errors.append(error)
        finally:
            events._set_running_loop(outside)

    def _next_timer(self) -> bool:
        timers = self._timers
        while timers and timers[0][2].cancelled_:
            heapq.heappop(timers)
        if not timers:
            return False
        self.now_s = max(self.now_s, timers[0][0])
        while timers and timers[0][0] <= self.now_s:
            self._ready.append(heapq.heappop(timers)[2])
        return True

    def end(self) -> None:
        """Forget everything that was to happen."""
        self.over = True
        self._ready.clear()
        self._timers.clear()
        # The collector does not see what a thread's stack holds, so one that waits for ever would keep its whole world.
        for thread in tuple(self._threads):
            thread.throw()
        self._threads.clear()
