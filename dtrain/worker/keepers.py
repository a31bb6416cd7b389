"""Starts keepers, finds those that a dead agent left, and turns their ends into facts.

A keeper is detached: neither a Ctrl-C at the agent's terminal nor the agent's death reaches it. What is known of
it lies in its rank folder, so a restarted agent needs no memory of its own to go on:

- no folder: shared memory was lost with the node; an unknown exit is reported;
- nothing in it: no keeper has forked, and one may be on its way: another is started, the lock lets one go on;
- started.json, and the keeper lives: the trainer runs; the keeper is watched;
- started.json, and the keeper is gone: exited.json says how it ended, or nobody saw it; that is reported.

The first ranks of a node may wait for the warm process before a keeper is asked for. Only this process knows of that:
an agent that is restarted meanwhile finds nothing in the folder, and starts one.

A keeper that is stopped or stuck says nothing: it is killed a while after its trainer's end.
An exit is reported when the keeper is gone too, since it leaves last: then no descendant of the trainer holds a
port, a device or a lock any more. A keeper that was itself killed takes its trainer along (the kernel does it);
what the trainer had started is found by the mark in its environment, and killed before the exit is reported.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dtrain.common import failpoints
from dtrain.common.failpoints import Point
from dtrain.worker import keeper
from dtrain.worker.core.inputs import TrainerExited, TrainerStarted
from dtrain.worker.core.states import ExitFact
from dtrain.worker.environment import trainer_mark
from dtrain.worker.rank_dirs import RankId, Started, forbid, read_exited, read_started
from dtrain.worker.tasks import Begin
from dtrain.worker.zygotes import ForkedKeeper, Zygotes

logger = logging.getLogger(__name__)

# A keeper whose trainer is gone or was to be killed ends with its descendants, for which it waits 10 s at most.
KEEPER_ENDS_S = 15.0
STRAYS_S = 10.0  # how long killed processes may take to vanish before the exit is reported all the same
STRAYS_PAUSE_S = 0.02


class _Kept:
    """One keeper as this agent knows it."""

    def __init__(self, of: RankId, folder: Path) -> None:
        self.of = of
        self.folder = folder
        self.child: subprocess.Popen[bytes] | ForkedKeeper | None = None  # the keeper that this process asked for
        self.waits = False  # for the warm process, which is on its way
        self.started: Started | None = None
        self.pidfd = -1
        self.trainer_pidfd = -1
        self.told_started = False
        self.warned = False  # that it cannot be ended yet
        self.end_grace_s: float | None = None  # asked to end before its keeper was known
        self.kill_timer: asyncio.TimerHandle | None = None


class Keepers:
    """All keepers of the agent. Used in the event loop only."""

    def __init__(
        self,
        emit: Callable[[TrainerStarted | TrainerExited], None],
        read_last: Callable[[RankId], None],
        journal_id: str,
        begin: Begin,
        zygotes: Zygotes,
    ) -> None:
        self._zygotes = zygotes
        self._emit = emit
        self._begin = begin
        self._read_last = read_last
        self._journal_id = journal_id
        self._kept: dict[RankId, _Kept] = {}

    def ensure(self, of: RankId, folder: Path, *, start: bool) -> None:
        """Have the rank kept, or its end reported; never started twice, never at all unless ``start``."""
        if of in self._kept:
            return
        kept = self._kept[of] = _Kept(of, folder)
        if not folder.is_dir():  # nobody can say any more what lives: see to it that nothing does
            kept.told_started = True  # nothing is left to look for
            self._begin(self._end_unseen(kept, "its folder in shared memory is gone"))
        elif read_started(folder) is not None or read_exited(folder) is not None:
            self._look(kept)
        elif start:
            kept.waits = self._zygotes.is_coming() and self._zygotes.is_for(folder)
            if kept.waits:
                logger.info("%s generation %d rank %d waits for the warm process", of.job, of.generation, of.rank)
            else:
                self._spawn(kept)
        else:
            self._look(kept)

    def _look_waiting(self, kept: _Kept) -> None:
        if kept.end_grace_s is not None:
            kept.waits = False
            self._end_never_started(kept)
        elif not self._zygotes.is_coming():  # it is ready, or lost, or takes too long
            kept.waits = False
            self._spawn(kept)

    def _spawn(self, kept: _Kept) -> None:
        failpoints.hit(Point.SPAWN_BEFORE)
        kept.child = self._zygotes.fork_keeper(kept.folder)
        if kept.child is None:
            of = kept.of
            logger.info(
                "%s generation %d rank %d starts cold: %s", of.job, of.generation, of.rank, self._zygotes.why_not()
            )
            self._execute(kept)
        failpoints.hit(Point.SPAWN_AFTER)

    def _execute(self, kept: _Kept) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(kept.folder / "keeper.log", flags, 0o600), "wb") as log:
                kept.child = subprocess.Popen(
                    [sys.executable, "-I", "-S", keeper.__file__, str(kept.folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    # Without its trainer's mark, so that a sweep never takes a keeper for a stray.
                    env={name: value for name, value in os.environ.items() if not name.startswith("DTRAIN_")},
                    start_new_session=True,
                )
        except OSError as error:
            self._finish(kept, ExitFact(code=None, at_unix_s=time.time(), error=f"its keeper cannot run: {error}"))

    def poll(self) -> None:
        """Look after keepers that have not said yet who they are. The others wake the loop themselves."""
        for kept in tuple(self._kept.values()):
            if kept.waits:
                self._look_waiting(kept)
            elif not kept.told_started:
                self._look(kept)

    def _look(self, kept: _Kept) -> None:
        started = read_started(kept.folder)
        if started is None:
            if isinstance(kept.child, ForkedKeeper) and kept.child.lost:
                # It may have been forked all the same: then the lock lets one of the two go on.
                self._execute(kept)
                return
            if kept.child is None or kept.child.poll() is not None:
                self._end_never_started(kept)
            return
        kept.started = started
        if kept.pidfd < 0 and not self._watch(kept, started):
            return
        if started.trainer_pid and not kept.told_started:
            kept.told_started = True
            self._watch_trainer(kept, started)
            of = kept.of
            self._emit(TrainerStarted(job=of.job, generation=of.generation, rank=of.rank, pid=started.trainer_pid))
        if kept.end_grace_s is not None:
            grace_s, kept.end_grace_s = kept.end_grace_s, None
            self._end_one(kept, grace_s)

    def _end_never_started(self, kept: _Kept) -> None:
        """Nobody of ours is on the way. If no other keeper holds the lock, none will ever start here."""
        why = self._why_never_started(kept)
        try:
            fact = read_exited(kept.folder) or forbid(kept.folder, why)
        except OSError as error:  # shared memory is full: an agent that ended by that would end again at each start
            if kept.child is None:  # one that another agent started may be on its way: it has to be forbidden
                self._warn_once(kept, error)
                return
            fact = ExitFact(code=None, at_unix_s=time.time(), error=f"{why} ({error})")
        if fact is not None:
            self._finish(kept, fact)

    @staticmethod
    def _warn_once(kept: _Kept, error: OSError) -> None:
        of = kept.of
        if not kept.warned:
            logger.warning("%s generation %d rank %d cannot be ended yet: %s", of.job, of.generation, of.rank, error)
        kept.warned = True

    def _why_never_started(self, kept: _Kept) -> str:
        if kept.child is None:
            return "it was ended before it was started"
        with contextlib.suppress(OSError):
            lines = (kept.folder / "keeper.log").read_text(errors="replace").split("\n")
            return next((f"its keeper failed: {line}" for line in reversed(lines) if line), "its keeper failed")
        return "its keeper failed"

    def _watch(self, kept: _Kept, started: Started) -> bool:
        """Have the loop woken when the keeper is gone; return whether it lives."""
        try:
            pidfd = os.pidfd_open(started.keeper_pid)
        except ProcessLookupError:
            self._begin_end(kept)
            return False
        # Only now the number is pinned: if it is still the same process, it stays the same.
        if keeper.start_time(started.keeper_pid) != started.keeper_start:
            os.close(pidfd)
            self._begin_end(kept)
            return False
        kept.pidfd = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._keeper_gone, kept)
        return True

    def _watch_trainer(self, kept: _Kept, started: Started) -> None:
        """Have the loop woken when the trainer is gone, in case its keeper does not say so."""
        with contextlib.suppress(ProcessLookupError):
            kept.trainer_pidfd = os.pidfd_open(started.trainer_pid)
            if keeper.start_time(started.trainer_pid) == started.trainer_start:
                asyncio.get_running_loop().add_reader(kept.trainer_pidfd, self._trainer_gone, kept)

    def _trainer_gone(self, kept: _Kept) -> None:
        self._forget_trainer(kept)
        self._later(kept, KEEPER_ENDS_S, self._kill_keeper)

    @staticmethod
    def _forget_trainer(kept: _Kept) -> None:
        if kept.trainer_pidfd >= 0:
            asyncio.get_running_loop().remove_reader(kept.trainer_pidfd)
            os.close(kept.trainer_pidfd)
            kept.trainer_pidfd = -1

    def _keeper_gone(self, kept: _Kept) -> None:
        asyncio.get_running_loop().remove_reader(kept.pidfd)
        os.close(kept.pidfd)
        kept.pidfd = -1
        if kept.child is not None:
            kept.child.poll()  # it ended: this only takes its entry out of the process table
        kept.started = read_started(kept.folder) or kept.started
        self._begin_end(kept)

    def _begin_end(self, kept: _Kept) -> None:
        kept.told_started = True  # nothing is left to look for
        fact = read_exited(kept.folder)
        if fact is not None:
            self._finish(kept, fact)
            return
        self._begin(self._end_unseen(kept, "its keeper was killed: nobody saw the exit"))

    async def _end_unseen(self, kept: _Kept, why: str) -> None:
        """Nobody saw it end: see to it that nothing of the trainer lives, then report."""
        mark = trainer_mark(kept.of, self._journal_id)
        deadline = time.monotonic() + STRAYS_S
        dying: dict[int, int] = {}  # pid -> start time
        if kept.started is not None and kept.started.trainer_pid:
            dying[kept.started.trainer_pid] = kept.started.trainer_start
        while time.monotonic() < deadline:
            dying |= kill_strays(lambda found: found == mark)
            # A process that is being killed loses its mark before it lets go of its ports and files.
            dying = {pid: start for pid, start in dying.items() if is_alive(pid, start)}
            if not dying:
                break
            await asyncio.sleep(STRAYS_PAUSE_S)
        self._finish(kept, ExitFact(code=None, at_unix_s=time.time(), error=why))

    def _finish(self, kept: _Kept, fact: ExitFact) -> None:
        if kept.kill_timer is not None:
            kept.kill_timer.cancel()
        self._forget_trainer(kept)
        if isinstance(kept.child, ForkedKeeper):
            kept.child.close()
        self._kept.pop(kept.of, None)
        self._read_last(kept.of)
        self._emit(TrainerExited(job=kept.of.job, generation=kept.of.generation, rank=kept.of.rank, exit=fact))

    def end(self, job: str, generation: int, grace_s: float) -> None:
        """End the trainers of one generation: SIGTERM, SIGKILL after ``grace_s``; 0: SIGKILL at once."""
        for kept in tuple(self._kept.values()):
            if kept.of.job == job and kept.of.generation == generation:
                self._end_one(kept, grace_s)

    def _end_one(self, kept: _Kept, grace_s: float) -> None:
        if kept.pidfd < 0:
            kept.end_grace_s = grace_s  # until it has said who it is, its signals are not blocked
        elif grace_s <= 0:
            self._kill_trainer(kept)
        else:
            self._signal(kept, signal.SIGTERM)
            self._later(kept, grace_s, self._kill_trainer)

    def _kill_trainer(self, kept: _Kept) -> None:
        self._signal(kept, signal.SIGQUIT)
        self._later(kept, KEEPER_ENDS_S, self._kill_keeper)

    def _kill_keeper(self, kept: _Kept) -> None:
        """It is stopped, or stuck: it would hold the next generation up for ever. Its trainer dies with it."""
        of = kept.of
        logger.warning("%s generation %d rank %d: its keeper does not end: killed", of.job, of.generation, of.rank)
        self._signal(kept, signal.SIGKILL)

    @staticmethod
    def _later(kept: _Kept, seconds: float, what: Callable[[_Kept], None]) -> None:
        if kept.kill_timer is not None:
            kept.kill_timer.cancel()
        kept.kill_timer = asyncio.get_running_loop().call_later(seconds, what, kept)

    def _signal(self, kept: _Kept, number: signal.Signals) -> None:
        if kept.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(kept.pidfd, number)

    def close(self) -> None:
        """Let go of all keepers; they keep their trainers."""
        for kept in self._kept.values():
            if kept.kill_timer is not None:
                kept.kill_timer.cancel()
            self._forget_trainer(kept)
            if kept.pidfd >= 0:
                asyncio.get_running_loop().remove_reader(kept.pidfd)
                os.close(kept.pidfd)
            if isinstance(kept.child, ForkedKeeper):
                kept.child.close()
            elif kept.child is not None:
                kept.child.returncode = kept.child.returncode or 0  # it outlives us on purpose
        self._kept.clear()


def kill_strays(is_stray: Callable[[str], bool]) -> dict[int, int]:
    """Kill every process whose mark is a stray's; return their pids and start times."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_stray(mark_of(int(entry.name))):
            pid = int(entry.name)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                start = keeper.start_time(pid)
                os.kill(pid, signal.SIGKILL)
                found[pid] = start
    return found


def is_alive(pid: int, start: int) -> bool:
    """Whether this very process still runs, or holds what it held; a zombie holds nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()
    except OSError:
        return False
    return int(fields[19]) == start and fields[0] not in (b"Z", b"X")


def mark_of(pid: int) -> str:
    """The process's trainer mark; empty if it has none, is a zombie, or is not ours to read."""
    try:
        variables: Iterable[bytes] = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next(
        (v.partition(b"=")[2].decode(errors="replace") for v in variables if v.startswith(b"DTRAIN_TRAINER=")), ""
    )
