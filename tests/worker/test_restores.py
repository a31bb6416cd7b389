"""How restores share the node with what trains on it."""

import asyncio
import os
import threading
from pathlib import Path

from dtrain.worker.rank_dirs import RankDirs
from dtrain.worker.restores import Restores
from dtrain.worker.tasks import Tasks


def test_a_restore_does_not_give_way_for_training_waits_for_it(tmp_path: Path) -> None:
    restores = Restores(lambda fact: None, RankDirs(tmp_path, tmp_path, "journal"), Tasks().begin)
    nice: list[int] = []

    def look() -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    asyncio.run(restores._in_thread(look))
    restores.close()
    assert nice == [os.getpriority(os.PRIO_PROCESS, 0)]
