"""The agent's side of the zygote: starts it, asks it for keepers, and says when it cannot be asked.

Nothing depends on it. Whoever asks while no zygote serves, or asks one that dies or does not answer, starts a keeper
of its own: if both keepers come, the lock in the rank folder lets one go on.

Rules:
- it begins with its agent, and the first ranks wait for it, for it imports but once what each of them would import.
  Where ranks are here already, it is started late, when none is still coming up: its imports would slow theirs down;
- one that died is started again in the background, after a pause that doubles;
- one that lacks what the jobs here want of their libraries is replaced by one that has it, when all is quiet or a
  start lasts very long: of a script that counts no steps nobody knows when it has started;
- spares are made when all is quiet: as many as this node has slots, for a failure may take all of its ranks at once;
- one that says it cannot serve here is believed, and not started again for the same needs;
- it never outlives its agent (the kernel sees to it), and the keepers it forked always do.
"""

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.worker import zygote
from dtrain.worker.core.states import GenerationStage, NodeState
from dtrain.worker.environment import zygote_environment
from dtrain.worker.warm_trainers import is_worth_a_wait, needs_of

logger = logging.getLogger(__name__)

WARM_MODULE = "dtrain.trainer.warm"  # by its name: this process must never import torch
COMING_MAX_S = 60.0  # whoever waits for it to be ready starts cold after that
STARTS_LAST_S = 60.0  # a rank that says nothing for so long is no reason to wait any more
ANSWER_MAX_S = 5.0  # a fork takes milliseconds: one that takes longer is stuck
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 60.0
STEADY_S = 60.0  # one that served for so long was no failure
PADDING_BYTES = 65536  # how much longer a trainer's environment may be; one variable has at most 128 KiB
TITLE_BYTES = 1024  # room for a trainer's arguments, as the process list shows them
SPARES_MAX = 16  # a spare costs some 10 MB; ranks beyond these are forked when they are needed
REFUSED_MAX = 16  # needs remembered: as many as an agent remembers jobs
LOG_MAX_BYTES = 1_000_000  # its log is begun anew beyond this

Needs = Mapping[str, str]  # variables that libraries read when they are loaded (warm_trainers.needs_of)


def needs_here(state: NodeState) -> list[Needs]:
    """What each job on this node wants of its libraries."""
    return [
        needs_of(assignment.spec.env)
        for assignment in state.assignments.values()
        if assignment.spec is not None and assignment.stage is not GenerationStage.OVER
    ]


def _is_stopped(pid: int) -> bool:
    """Whether somebody stopped the process: it would be noticed only when a rank waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


class ForkedKeeper:
    """A keeper that the zygote was asked for."""

    def __init__(self, asked_at: float) -> None:
        self.asked_at = asked_at
        self.lost = False  # the zygote died before it answered: nobody knows whether there is such a keeper
        self._pidfd = -1
        self._closed = False

    def is_here(self, pidfd: int) -> None:
        if self._closed:
            os.close(pidfd)
        else:
            self._pidfd = pidfd

    def poll(self) -> int | None:
        """None while the keeper lives, or may be on its way."""
        if self._pidfd < 0:
            return 0 if self.lost else None
        look = select.poll()
        look.register(self._pidfd, select.POLLIN)
        return 0 if look.poll(0) else None

    def close(self) -> None:
        self._closed = True
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Zygotes:
    """The node's zygote: one at a time. Used in the event loop only."""

    def __init__(self, log: Path, *, enabled: bool, after_s: float = 0.0) -> None:
        """``after_s``: how long the agent runs before the first is started."""
        self._log = log
        self._enabled = enabled
        self._needs: Needs = {}  # of the job that the one at hand serves
        self._differ_since = time.monotonic()  # when they were last what some job here wants
        self._refused: list[Needs] = []  # needs that none can serve; Invariant: not those of the one at hand
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready = False
        self._asked: dict[int, ForkedKeeper] = {}
        self._asked_spares = 0  # how many it was asked for, since the last was taken
        self.spares = 0  # how many keepers wait, with their trainers
        self._number = 0
        self._began_at = 0.0
        self._is_awaited = False  # begun while no job was here: so that the next one may wait for it
        self._start_at = time.monotonic() + after_s
        self._insist_at = self._start_at + STARTS_LAST_S
        self._backoff_s = BACKOFF_FIRST_S

    @property
    def pid(self) -> int:
        """The process; 0 if there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_ready(self) -> bool:
        return self._ready

    def is_coming(self) -> bool:
        """Whether to wait for it takes no longer than to import what it imports."""
        begun = self._process is not None and not self._ready and self._is_awaited
        return begun and time.monotonic() - self._began_at < COMING_MAX_S

    def is_for(self, folder: Path) -> bool:
        """Whether the trainer of this rank folder is better off with the one at hand than with a cold start."""
        try:
            plan = json.loads((folder / "keeper.json").read_bytes())
        except (OSError, ValueError):  # its keeper will say so
            return False
        return is_worth_a_wait(plan, zygote_environment(os.environ, self._needs))

    def why_not(self) -> str:
        """Why nobody can be asked now."""
        if not self._enabled:
            return "the worker has no warm process here"
        return "" if self._ready else "the worker's warm process is not ready yet"

    def tend(self, *, quiet: bool, wanted: Sequence[Needs] = (), spares: int = 0) -> None:
        """Look after it.

        ``quiet``: no rank of this node is coming up. ``wanted``: the needs of each job here. ``spares``: how many
        trainers may be needed at once; 0: none is made.
        """
        now, spares = time.monotonic(), min(spares, SPARES_MAX)
        served = [needs for needs in wanted if needs not in self._refused]
        if not served or self._needs in served:
            self._differ_since = now
        elif quiet or now - self._differ_since >= STARTS_LAST_S:
            self._needs = served[-1]
            if self._process is not None:
                logger.info("the warm process is replaced: a job needs %s", ", ".join(self._needs) or "none of its own")
                self._end()
            self._start_at = self._insist_at = now
            self._backoff_s = BACKOFF_FIRST_S
        if any(now - asked.asked_at > ANSWER_MAX_S for asked in self._asked.values()):
            logger.warning("the warm process does not answer: replaced")
            self._end()
        elif self._process is not None and _is_stopped(self._process.pid):
            logger.warning("the warm process is stopped: replaced")
            self._end()
        due = quiet or now >= self._insist_at
        if self._enabled and self._process is None and now >= self._start_at and due:
            self._start(is_awaited=not wanted)
        if self._ready and quiet and spares and spares != self._asked_spares:
            self._asked_spares = spares
            self._send({"spares": spares})

    def fork_keeper(self, folder: Path) -> ForkedKeeper | None:
        """Have a keeper of this rank folder forked; None if nobody can be asked."""
        if not self._ready or self._control is None:
            return None
        self._number += 1
        asked = ForkedKeeper(time.monotonic())
        if not self._send({"number": self._number, "folder": str(folder)}):
            return None
        self._asked[self._number] = asked
        self._asked_spares = 0  # if that took one, it is missed when all is quiet again
        self.spares = max(self.spares - 1, 0)
        return asked

    def _send(self, message: Mapping[str, object]) -> bool:
        assert self._control is not None
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:  # it is gone, or so far behind that its socket is full
            self._end()
            return False
        return True

    def _start(self, *, is_awaited: bool) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        if self._log.exists() and self._log.stat().st_size > LOG_MAX_BYTES:
            self._log.unlink()
        env = {**zygote_environment(os.environ, self._needs), zygote.PADDING: "." * PADDING_BYTES}
        priority = zygote.ORDINARY if is_awaited else zygote.LOW
        command = [sys.executable, "-u", zygote.__file__, str(os.getpid()), str(its.fileno()), WARM_MODULE, priority]
        try:
            with its, self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*command, "." * TITLE_BYTES],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=env,
                    pass_fds=(its.fileno(),),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            logger.warning("the warm process cannot be started: %s", error)
            self._pause()
            return
        self._control = ours
        self._is_awaited = is_awaited
        self._began_at = time.monotonic()
        asyncio.get_running_loop().add_reader(ours, self._hear)

    def _hear(self) -> None:
        assert self._control is not None
        try:
            text, descriptors, _, _ = socket.recv_fds(self._control, zygote.MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            text, descriptors = b"", []
        if not text:
            logger.warning("the warm process ended; it is started again")
            self._end()
            return
        answer = json.loads(text)
        if "ready" in answer:
            self._ready = True
            logger.info("the warm process is ready: imported in %.1f s", answer["ready"])
        elif "spares" in answer:
            self.spares = answer["spares"]
            if 0 < self.spares == self._asked_spares:
                logger.info("%d trainers wait, forked in advance", self.spares)
        elif "cannot" in answer:
            logger.warning("no warm process here: %s; ranks start cold", answer["cannot"])
            self._refused = [*self._refused, self._needs][-REFUSED_MAX:]
            self._enabled = bool(self._needs)  # without any of their own, nothing can be changed
            self._needs = {}
            self._end()
        else:
            asked = self._asked.pop(answer["number"], None)
            if asked is not None:
                asked.is_here(descriptors.pop())
            for descriptor in descriptors:
                os.close(descriptor)

    def _end(self) -> None:
        """Let go of it; whoever still waits for its answer is told."""
        self._ready = False
        self._asked_spares = self.spares = 0
        for asked in self._asked.values():
            asked.lost = True
        self._asked.clear()
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None
        self._pause()

    def _pause(self) -> None:
        now = time.monotonic()
        if now - self._began_at >= STEADY_S:
            self._backoff_s = BACKOFF_FIRST_S
        self._start_at = now + self._backoff_s
        self._insist_at = self._start_at + STARTS_LAST_S
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)

    def close(self) -> None:
        """End it; the keepers it forked go on."""
        self._enabled = False
        self._end()
