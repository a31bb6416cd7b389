"""Looks at stores before jobs are admitted. One that hangs holds up nobody but those who ask for it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from dtrain.common.errors import UserError

DEADLINE_S = 60.0  # a store that takes longer for a few small objects serves no training
THREADS_MAX = 2  # for each store
STORES_MAX = 16  # whose threads are kept, for the next who asks


class StoreLooks:
    """Used in the event loop only."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}  # by store; the one used last is last

    async def look(self, store: str, call: Callable[[], None]) -> None:
        """Run ``call``, which raises what it finds wrong. Raises UserError if it takes too long."""
        threads = self._threads.pop(store, None) or ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="look")
        self._threads[store] = threads
        while len(self._threads) > STORES_MAX:
            self._threads.pop(next(iter(self._threads))).shutdown(wait=False)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.get_running_loop().run_in_executor(threads, call)
        except TimeoutError as error:
            raise UserError(
                f"store {store} has not answered the coordinator within {DEADLINE_S:.0f} s: see whether it runs, "
                "or give another --store."
            ) from error
