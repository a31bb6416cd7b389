"""Services as child processes that never outlive the run that started them.

- Each child leads its own session: Ctrl-C at the terminal reaches the run alone, which takes its services
  down in the right order.
- Each child has the kernel send it SIGTERM when its parent dies, however it dies (see parents.py), so that a
  worker can end its trainers.
- Each child carries a mark in its environment that its own children inherit. What still carries the mark
  when the run leaves, or when the next one starts, is ended by it.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from dtrain.standalone.parents import PARENT

MARK = "_DTRAIN_DATA_FOLDER"  # not DTRAIN_...: workers keep those from their trainers
_LEFTOVER_WAIT_S = 5.0  # the kernel needs a moment to end a process with much memory


async def start_child(
    argv: Sequence[str], *, log: Path, folder: Path, keep_fds: Sequence[int] = ()
) -> asyncio.subprocess.Process:
    """Start a service; what it prints is appended to ``log``."""
    # A service is told everything by its arguments; what the person set for the run's verb is not for it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DTRAIN_")}
    environment = {**inherited, MARK: str(folder), PARENT: str(os.getpid())}
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=tuple(keep_fds),
        )


def leftovers(folder: Path) -> list[psutil.Process]:
    """Processes other than this one that carry the mark of ``folder``."""
    wanted = str(folder)
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARK) == wanted:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's: never ours
    return found


def end_leftovers(folder: Path) -> int:
    """SIGKILL everything that carries the mark of ``folder``; return how many processes that were."""
    ended = 0
    while found := leftovers(folder):  # again, in case one of them was just starting another
        for process in found:
            try:
                process.kill()
            except psutil.Error:
                continue
            ended += 1
        _, alive = psutil.wait_procs(found, timeout=_LEFTOVER_WAIT_S)
        if alive:
            break  # beyond a signal (stuck in the kernel); waiting longer would not help
    return ended
