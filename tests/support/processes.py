"""Finding what a test left behind: every process it starts inherits a mark in its environment."""

import contextlib
import os
import secrets
import shutil
import signal
import sqlite3
import time
from pathlib import Path

MARK = "DTRAINTEST_MARK"  # not DTRAIN_*: a worker keeps its own settings from its trainers
SESSION_MARK = "TESTSESSION_MARK"  # inherited by every process that a test starts, however far down


def new_mark() -> str:
    return secrets.token_hex(8)


def marked(mark: str, *, name: str = MARK) -> dict[int, str]:
    """Pid and command line of every process with this mark."""
    wanted = f"{name}={mark}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has just ended, or is another user's
    return found


def end_all(mark: str, *, deadline_s: float = 10.0) -> dict[int, str]:
    """Kill every process with this mark; return those that were there."""
    first = marked(mark)
    end_s = time.monotonic() + deadline_s
    while left := marked(mark):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end_s:
            raise AssertionError(f"processes that cannot be killed: {left}")
        time.sleep(0.02)
    return first


def shared_folders(folder: Path, agent: str = "*") -> list[Path]:
    """What ``agent``, or all agents with their data folders in ``folder``, have in shared memory."""
    found: list[Path] = []
    for journal in folder.glob(f"{agent}/journal.sqlite"):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(journal)) as database:
            for (name,) in database.execute("select value from meta where name = 'journal'"):
                found += Path("/dev/shm").glob(f"dtrain-{name[:8]}*")
    return found


def free_shared_memory(folder: Path) -> None:
    """Remove what those agents have in shared memory. They must have ended."""
    for path in shared_folders(folder):
        shutil.rmtree(path, ignore_errors=True)
