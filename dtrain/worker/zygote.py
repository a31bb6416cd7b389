"""The warm process of a node: it has imported torch, and forks keepers whose trainers need not.

Run as ``python -u zygote.py <agent's pid> <control socket> <module> <padding>``. Importing what a first step needs
takes longer than everything else of a recovery together; a fork of a process that has imported it takes milliseconds.

    agent --exec--> zygote --fork--> keeper --fork--> trainer

On the control socket, one JSON object a message:

    zygote: {"ready": seconds} or {"cannot": reason}, once
    agent:  {"number": n, "folder": rank folder}
    zygote: {"number": n, "pid": keeper's pid}, with a pidfd of it: that stays its own even when the number is reused

Rules:
- one thread, always: a fork copies the calling thread only, and locks of the others would stay shut in the child;
- low priority while it imports, of its thread and of its session, ordinary when it serves; a thread's only if this
  user may go back;
- it dies with its agent; keepers and their trainers live in sessions of their own, and survive both;
- a keeper and a trainer let go of everything of the zygote's at once: of its socket above all, whose end tells the
  agent that the zygote is gone;
- a trainer leaves all these frames (``Born``), so that it ends as any script does, by the interpreter's own rules.
"""

# The interpreter's own modules, before ours: what a cold start has too.
# ruff: noqa: E402
import sys

COLD_MODULES = frozenset(sys.modules)
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # this file's folder: no module is to be found there

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

if importlib.util.find_spec("dtrain") is None:  # the agent was started from its source folder
    sys.path.append(str(Path(__file__).parents[2]))

from dtrain.worker import keeper
from dtrain.worker.exec_memory import move_environment, show_arguments, show_environment
from dtrain.worker.session_priority import lower_session, raise_session
from dtrain.worker.warm_trainers import Origin, become, can_show, hide_frames

PADDING = "_DTRAIN_PADDING"  # room for a trainer's longer environment
MESSAGE_BYTES = 65536  # a folder's name is far shorter
NICENESS = 15
SESSION_NICENESS = 5  # a third of a trainer's share of a core; by much less it would never be ready where all are busy


class Zygote:
    """The loop, and what its children begin with."""

    def __init__(self, control: socket.socket, settle_module: str) -> None:
        self._control = control
        self._kept: dict[int, int] = {}  # pidfd -> keeper's pid
        self._module = settle_module
        self._origin: Origin

    def load(self) -> str:
        """Import everything. Return why this process cannot serve; empty if it can."""
        began = time.monotonic()
        environment = dict(os.environ)
        ordinary = os.getpriority(os.PRIO_PROCESS, 0)
        yielding = _may_come_back(ordinary) and _set_niceness(NICENESS)
        lowered = lower_session(SESSION_NICENESS)
        importlib.import_module(self._module).preload()
        if (yielding and not _set_niceness(ordinary)) or (lowered and not raise_session()):
            return "it cannot get its priority back"
        if len(list(Path("/proc/self/task").iterdir())) != 1:
            return "an import left a thread running"
        self._origin = Origin(environment=environment, cold_modules=COLD_MODULES)
        if not show_environment(environment) or Path("/proc/self/environ").read_bytes().rstrip(b"\0").split(b"\0") != [
            os.fsencode(f"{name}={value}") for name, value in environment.items()
        ]:
            return "the kernel does not show what a process writes as its environment"
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page that it looks at
        self._tell({"ready": round(time.monotonic() - began, 3)})
        return ""

    def serve(self) -> None:
        """Fork keepers until the agent is gone. Raises Born, in a trainer only."""
        looks = select.poll()
        looks.register(self._control, select.POLLIN)
        while True:
            for descriptor, _ in looks.poll():
                if descriptor in self._kept:
                    looks.unregister(descriptor)
                    os.waitpid(self._kept.pop(descriptor), 0)
                    os.close(descriptor)
                    continue
                request = self._control.recv(MESSAGE_BYTES)
                if not request:
                    return
                asked = json.loads(request)
                pidfd = self._fork_keeper(asked)
                looks.register(pidfd, select.POLLIN)
                if self._origin.is_outdated():
                    return  # the agent starts a new one

    def _fork_keeper(self, asked: dict[str, Any]) -> int:
        pid = os.fork()
        if pid == 0:
            self._be_keeper(asked["folder"])
        pidfd = os.pidfd_open(pid)  # nobody but this loop reaps it, so the number is still its own
        self._kept[pidfd] = pid
        self._tell({"number": asked["number"], "pid": pid}, pidfd)
        return pidfd

    def _be_keeper(self, folder: str) -> NoReturn:
        code = keeper.EXIT_CANNOT_RUN
        try:
            os.setsid()
            self._control.close()
            for pidfd in self._kept:
                os.close(pidfd)
            log = os.open(f"{folder}/keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            show_arguments(("dtrain-keeper", folder))
            code = keeper.keep(folder, self._begin)
        except keeper.Born:
            raise
        except SystemExit as error:
            os.write(2, f"{error}\n".encode())
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        os._exit(code)  # nothing of the zygote's own end may run in a keeper

    def _begin(self, plan: dict[str, Any]) -> None:
        reason = self._origin.why_cold(plan)
        if not reason and not can_show(plan):
            reason = "its environment is longer than there is room for"
        if reason:
            os.write(2, f"dtrain: a cold start: {reason}\n".encode())
            keeper.execute(plan)
        raise keeper.Born(plan)

    def _tell(self, message: dict[str, Any], *descriptors: int) -> None:
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the agent is gone


def _set_niceness(value: int) -> bool:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, value)
    except OSError:
        return False
    return True


def _may_come_back(ordinary: int) -> bool:
    """Whether this user may raise a priority again; a child tries, since a failed try would last."""
    pid = os.fork()
    if pid == 0:
        os._exit(not (_set_niceness(NICENESS) and _set_niceness(ordinary)))
    return os.waitpid(pid, 0)[1] == 0


def serve_until_born(agent: int, control: int, module: str) -> dict[str, Any]:
    """Serve; return only in a process that is to be a trainer, with its plan."""
    ctypes.CDLL(None).prctl(keeper.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:  # it died before the line above
        os._exit(0)
    os.environ.pop(PADDING, None)
    move_environment()
    show_arguments(("dtrain-zygote",))
    zygote = Zygote(socket.socket(fileno=control), module)
    try:
        if reason := zygote.load():
            zygote._tell({"cannot": reason})
        else:
            zygote.serve()
    except keeper.Born as born:
        return born.plan
    except ImportError as error:
        zygote._tell({"cannot": f"{type(error).__name__}: {error}"})
    os._exit(0)


if __name__ == "__main__":
    _module = sys.argv[3]
    _plan = serve_until_born(int(sys.argv[1]), int(sys.argv[2]), _module)
    _zygote_module = sys.modules["__main__"]  # kept: the frames below still use it
    _code = None
    try:
        _code, _space = become(_plan, importlib.import_module(_module).settle)
        exec(_code, _space)
    except BaseException:
        hide_frames(_code)
        raise
