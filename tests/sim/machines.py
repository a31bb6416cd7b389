"""Machines with clocks of their own, and the processes on them."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from tests.sim.loop import CURRENT, Handle, SimLoop

EPOCH_S = 1_760_000_000.0  # unix time at which every schedule begins
BOOTED_S = 10_000.0  # what the monotonic clock of a machine shows then, or more


@dataclass(eq=False)
class Machine:
    """A host. ``rate`` and ``skew_s`` are its clocks' faults."""

    name: str
    rate: float = 1.0  # monotonic seconds a true second: drift
    boot_offset_s: float = BOOTED_S
    skew_s: float = 0.0  # of the wall clock; jumps
    jumped: list[tuple[float, float]] = field(default_factory=list)  # when, and how far it was ahead before
    dark: bool = False  # without power: it does not even refuse
    processes: "list[Process]" = field(default_factory=list)

    def mono(self, now_s: float) -> float:
        return self.boot_offset_s + now_s * self.rate

    def wall(self, now_s: float) -> float:
        return EPOCH_S + now_s + self.skew_s

    def jump(self, now_s: float, by_s: float) -> None:
        """Set the wall clock forward, or back if ``by_s`` is negative."""
        self.jumped.append((now_s, self.skew_s))
        self.skew_s += by_s

    def when(self, wall_s: float) -> list[float]:
        """All moments at which the wall clock showed this, rounded to milliseconds; it may have been set back."""
        found, since_s = [], 0.0
        for until_s, skew_s in (*self.jumped, (float("inf"), self.skew_s)):
            at_s = wall_s - EPOCH_S - skew_s
            if since_s - 0.001 <= at_s <= until_s + 0.001:
                found.append(at_s)
            since_s = until_s
        return found

    @property
    def living(self) -> "list[Process]":
        return [process for process in self.processes if process.alive]


class Process:
    """One life of a program."""

    def __init__(self, loop: SimLoop, machine: Machine, name: str, pid: int) -> None:
        self.loop = loop
        self.machine = machine
        self.name = name
        self.pid = pid
        self.alive = True
        self.paused = False
        self.at_end: list[Callable[[], None]] = []  # what the kernel does when it is gone
        self.handlers: dict[int, Callable[[], None]] = {}  # of signals
        self.main: asyncio.Task[None] | None = None
        self._kept: list[Handle] = []
        self.context = Context()
        self.context.run(CURRENT.set, self)
        machine.processes.append(self)

    def __repr__(self) -> str:
        return self.name

    def holds_back(self, handle: Handle) -> bool:
        """Whether the callback must not run now."""
        if not self.alive:
            return True
        if self.paused:
            self._kept.append(handle)
            return True
        return False

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call something as this process."""
        return self.context.copy().run(call, *args)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run its main task."""
        self.main = self.loop.create_task(work, name=self.name, context=self.context.copy())

    def pause(self) -> None:
        self.paused = self.alive

    def go_on(self) -> None:
        if self.paused:
            self.paused = False
            self.loop.give_back(self._kept)
            self._kept = []

    def signal(self, sig: int) -> None:
        """Have it hear the signal soon; one that does not listen yet ends by it."""
        if not self.alive:
            return
        handler = self.handlers.get(sig, self.kill)
        self.loop.call_soon(handler, context=self.context.copy())

    def kill(self) -> None:
        """kill -9: nothing of it runs again, and the kernel closes what it held."""
        if not self.alive:
            return
        self.alive = self.paused = False
        self._kept.clear()
        for act in self.at_end:
            act()
        self.machine.processes.remove(self)
