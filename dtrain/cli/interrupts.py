"""Ctrl-C: the first one asks for an orderly end, the second one for the quickest.

Python's own KeyboardInterrupt would strike anywhere, in the middle of taking things down as well. Here the
first signal cancels the work, which then leaves through its own ``finally``; a second one calls ``hurry``.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import TypeVar

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_BASE = 128  # a shell's convention for "ended by a signal"


class Interrupted(Exception):
    """The work was ended by a signal, in order."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = _EXIT_BASE + number


async def interruptible(
    work: Coroutine[object, object, Result], *, first: Callable[[], None], hurry: Callable[[], None]
) -> Result:
    """Return what ``work`` returns, or raise :class:`Interrupted` when a signal ended it.

    ``first`` is called at the first signal, before the work is cancelled; ``hurry`` at each further one.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work)
    seen: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        seen.append(number)
        if len(seen) == 1:
            first()
            task.cancel()
        else:
            hurry()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        if seen:
            raise Interrupted(seen[0]) from None
        raise
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
