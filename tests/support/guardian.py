"""Tidies up after a run that was killed: nobody can do that for himself.

A run that ends, fails or is interrupted tidies up by itself. ``kill -9`` leaves it no moment for it, so a process of
its own waits for the end of a pipe that only the run holds. If the run has not said before that all is well, the
guardian ends every process with the run's mark, and removes what they had in shared memory and the run's folders.

It carries no such mark, has a session of its own, so that no terminal and no signal to a group reaches it, and imports
the standard library only.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import remove_sockets
from tests.support.processes import end_all, free_shared_memory

WELL = b"all is well"
DONE_S = 30.0
_PORT = re.compile(r"-\w+\.port(?:\.grpc)?=(\d+)")


@contextmanager
def guarded(mark: str, folder: Path, *, remove: Path | None = None) -> Iterator[None]:
    """Guard the processes with ``mark`` whose agents have their data folders in ``folder``; maybe ``remove`` a folder.

    Leaving by an exception is no reason to step in: whoever opened the context tidies up first.
    """
    argv = [sys.executable, "-m", __name__, mark, str(folder), *([str(remove)] if remove else [])]
    root = Path(__file__).parents[2]
    guardian = subprocess.Popen(argv, cwd=root, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guardian.communicate(WELL, DONE_S)


def main() -> None:
    mark, folder, *remove = sys.argv[1:]
    if sys.stdin.buffer.read() == WELL:
        return
    ended = end_all(mark)
    remove_sockets(port for command in ended.values() for port in _PORT.findall(command))
    free_shared_memory(Path(folder))
    for path in remove:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
