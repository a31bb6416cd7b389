"""Finds out where a trainer stands: by a signal that it answers into a file, else by py-spy, else not at all.

A trainer is asked only when it is suspected to hang, so nothing may be expected of it: the answer is waited for
within a bound, and one that does not come is an answer too. A process that is stopped, or that the kernel holds,
answers no signal, and its state says so. py-spy reads a process from outside; it is used where it is installed and
the trainer does not answer.

All stacks go into the rank's log, where a person reads them; the main thread's newest frames go to the coordinator.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.common.stacks import STACK_MAX_CHARS, STACKS_FILE, STACKS_SIGNAL
from dtrain.worker.core.inputs import StackTaken
from dtrain.worker.keeper import start_time
from dtrain.worker.rank_dirs import RankId, read_started
from dtrain.worker.tasks import Begin

ANSWER_S = 2.0  # a handler in C answers within milliseconds, unless the process is stopped
QUIET_S = 0.1  # an answer that has not grown for so long is whole
POLL_S = 0.02
PY_SPY_S = 5.0  # it reads the symbols of everything that the process has loaded
ANSWER_MAX_BYTES = 256 * 1024  # of all threads: a data loader may have dozens
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "held by the kernel", "Z": "a zombie"}


class Stacks:
    """Takes stacks of the agent's ranks."""

    def __init__(
        self, emit: Callable[[StackTaken], None], tell_rank: Callable[[RankId, str], None], begin: Begin
    ) -> None:
        self._emit = emit
        self._tell_rank = tell_rank  # into the rank's log
        self._begin = begin

    def take(self, of: RankId, folder: Path, number: int) -> None:
        """Begin to find out where the rank stands; the answer comes as StackTaken, whatever happens."""
        self._begin(self._take(of, folder, number))

    async def _take(self, of: RankId, folder: Path, number: int) -> None:
        try:
            text = await _ask(folder)
        except OSError as error:
            text, stack = "", f"no stack: {error}"
        else:
            stack = newest_frames(text) or f"no stack: the process {_state_of(folder)}"
        self._tell_rank(of, f"asked where it stands, since nothing moves:\n{text.rstrip() or stack}")
        self._emit(StackTaken(job=of.job, generation=of.generation, rank=of.rank, number=number, stack=stack))


async def _ask(folder: Path) -> str:
    """Return what the trainer, or py-spy, says; empty if neither says anything."""
    started = read_started(folder)
    if started is None or not started.trainer_pid:
        return ""
    pidfd = os.pidfd_open(started.trainer_pid)
    try:
        if start_time(started.trainer_pid) != started.trainer_start:
            return ""  # another process has its number
        return await _signal(pidfd, folder / STACKS_FILE) or await _py_spy(started.trainer_pid)
    finally:
        os.close(pidfd)


async def _signal(pidfd: int, answer: Path) -> str:
    """Ask by signal; return what was added to ``answer``."""
    if not answer.exists():
        return ""  # it does not listen, and the signal would end it
    before = answer.stat().st_size
    signal.pidfd_send_signal(pidfd, STACKS_SIGNAL)
    size, grown_at, deadline = before, time.monotonic(), time.monotonic() + ANSWER_S
    while time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
        if answer.stat().st_size != size:
            size, grown_at = answer.stat().st_size, time.monotonic()
        elif size > before and time.monotonic() - grown_at >= QUIET_S:
            break
    with answer.open("rb") as file:
        file.seek(before)
        return file.read(ANSWER_MAX_BYTES).decode(errors="replace")


async def _py_spy(pid: int) -> str:
    program = shutil.which("py-spy")
    if program is None:
        return ""
    process = await asyncio.create_subprocess_exec(
        *(program, "dump", "--nonblocking", "--pid", str(pid)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PY_SPY_S):
            said, _ = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return said[:ANSWER_MAX_BYTES].decode(errors="replace") if process.returncode == 0 else ""


def newest_frames(text: str) -> str:
    """The main thread's frames, newest first, one a line, as many as a report has room for.

    faulthandler prints the main thread last and calls it the current one: the signal reached it. py-spy prints it
    first and names it.
    """
    sections: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith(("Current thread", "Thread ")):
            sections.append((line, []))
        elif sections and line.startswith("  "):
            sections[-1][1].append(line.strip())
    if not sections:
        return ""
    main = [frames for head, frames in sections if head.startswith("Current thread") or "MainThread" in head]
    frames, kept = (main or [sections[-1][1]])[0], ""
    for frame in frames:
        if len(kept) + len(frame) + 1 > STACK_MAX_CHARS:
            break
        kept += f"{frame}\n"
    return kept.rstrip()


def _state_of(folder: Path) -> str:
    started = read_started(folder)
    pid = started.trainer_pid if started is not None else 0
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "is gone"
    return f"is {_STATES[state]}" if state in _STATES else "did not answer"
