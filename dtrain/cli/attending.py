"""Follow a run on this machine for as long as it is there.

The etcd of such a run ends with it, and a follower would wait for ever for one that never comes back. So the
data folder is looked at beside: when no run is active in it any more, following is over.
"""

import asyncio
from collections.abc import Coroutine

from dtrain.standalone.data_folder import DataFolder

LOOK_S = 0.5  # how long a follower may outlive its run


async def while_active(folder: DataFolder | None, follow: Coroutine[object, object, None]) -> None:
    """Run ``follow`` until it ends, or until no run is active in ``folder``; None: a cluster, which is for ever."""
    await until(_until_inactive(folder), follow)


async def until(end: Coroutine[object, object, None], follow: Coroutine[object, object, None]) -> None:
    """Run ``follow`` until it or ``end`` has ended; raise what ended it."""
    tasks = [asyncio.create_task(follow, name="follow"), asyncio.create_task(end, name="end")]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_inactive(folder: DataFolder | None) -> None:
    if folder is None:
        await asyncio.Event().wait()
        return
    while folder.active() is not None:
        await asyncio.sleep(LOOK_S)
