"""Work that the agent begins and does not wait for.

Every such task belongs to the agent's one group, so none is ever forgotten: what a task did not expect ends the
agent, which is safe at every moment, while a task that died unheard would leave something undone for ever.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from dtrain.common.errors import InvariantError

Begin = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Tasks:
    """The group, from when it is open."""

    def __init__(self) -> None:
        self.group: asyncio.TaskGroup | None = None

    def begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        if self.group is None:
            work.close()
            raise InvariantError("a task was begun outside of the agent's life")
        return self.group.create_task(work)
