"""The warm process of a node: it has imported torch, and forks keepers whose trainers need not.

Run as ``python -u zygote.py <agent's pid> <control socket> <module> <priority> <padding>``. Importing what a first
step needs takes longer than everything else of a recovery together; a fork of a process that has imported it takes
milliseconds.

    agent --exec--> zygote --fork--> keeper --fork--> trainer

Two forks and the end of a keeper that is as large as its zygote still take longer than all else that a recovery does.
So it forks spares when it is asked to, in time: a trainer that waits for its rank folder, and its keeper, which then
executes the small keeper program. Who asks for a keeper gets a spare, or where there is none a fork.

On the control socket, one JSON object a message:

    zygote: {"ready": seconds} or {"cannot": reason}, once
    agent:  {"number": n, "folder": rank folder}
    zygote: {"number": n, "pid": keeper's pid}, with a pidfd of it: that stays its own even when the number is reused
    agent:  {"spares": how many are to wait}; what is taken is not made anew until it is said again
    zygote: {"spares": how many wait}, when that changed for another reason than being taken

Rules:
- one thread, always: a fork copies the calling thread only, and locks of the others would stay shut in the child;
- low priority while it imports, of its thread and of its session, ordinary when it serves; a thread's only if this
  user may go back. With the priority ``ordinary``, because nobody trains yet or somebody waits for it, at no time;
- it dies with its agent, and its spares with it; keepers that have a rank folder, and their trainers, live in sessions
  of their own, and survive both;
- low priority for the fork of a spare: others train meanwhile;
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

import contextlib
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
from dataclasses import dataclass
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
ORDINARY, LOW = "ordinary", "low"  # priorities of the imports
NICENESS = 15
SESSION_NICENESS = 5  # a third of a trainer's share of a core; by much less it would never be ready where all are busy


@dataclass(slots=True)
class Spare:
    """A keeper that waits, with its trainer."""

    pid: int
    orders: socket.socket  # on which it says that it waits, and is told its rank folder; closed: it is not needed
    waits: bool = False


class Zygote:
    """The loop, and what its children begin with."""

    def __init__(self, control: socket.socket, settle_module: str, *, gives_way: bool) -> None:
        self._control = control
        self._kept: dict[int, int] = {}  # pidfd -> pid of a keeper that has a rank folder, or is to end
        self._spares: dict[int, Spare] = {}  # by pidfd
        self._coming: dict[int, int] = {}  # of those that do not wait yet: descriptor of their orders -> pidfd
        self._wanted = 0  # spares
        self._ordinary = os.getpriority(os.PRIO_PROCESS, 0)
        self._yields = False  # whether this process may lower its priority and take it back
        self._looks = select.poll()
        self._module = settle_module
        self._gives_way = gives_way  # to those that train while it imports
        self._origin: Origin

    def load(self) -> str:
        """Import everything. Return why this process cannot serve; empty if it can."""
        began = time.monotonic()
        environment = dict(os.environ)
        self._yields = _may_come_back(self._ordinary)
        yields = self._gives_way and self._yields and _set_niceness(NICENESS)
        lowered = self._gives_way and lower_session(SESSION_NICENESS)
        importlib.import_module(self._module).preload()
        if (yields and not _set_niceness(self._ordinary)) or (lowered and not raise_session()):
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
        self._looks.register(self._control, select.POLLIN)
        while True:
            # One at a time: what is done about one may close the descriptor of the next.
            ready = self._looks.poll(0 if len(self._spares) != self._wanted else None)[:1]
            if not ready:  # a request need not wait for more than one fork
                self._fork_spare() if len(self._spares) < self._wanted else self._drop_spare()
                continue
            ((descriptor, _),) = ready
            if descriptor in self._coming:
                self._hear_spare(descriptor)
            elif descriptor != self._control.fileno():
                self._reap(descriptor)
            elif not (request := self._control.recv(MESSAGE_BYTES)):
                return
            elif "spares" in (asked := json.loads(request)):
                self._wanted = asked["spares"]
            else:
                self._give_keeper(asked)
                if self._origin.is_outdated():
                    return  # the agent starts a new one

    def _hear_spare(self, orders: int) -> None:
        """It waits, or is gone, which its pidfd tells as well."""
        self._looks.unregister(orders)
        spare = self._spares[self._coming.pop(orders)]
        if spare.orders.recv(MESSAGE_BYTES):
            spare.waits = True
            self._tell_spares()

    def _tell_spares(self) -> None:
        self._tell({"spares": sum(spare.waits for spare in self._spares.values())})

    def _forget_spare(self, pidfd: int) -> Spare:
        spare = self._spares.pop(pidfd)
        if self._coming.pop(spare.orders.fileno(), None) is not None:
            self._looks.unregister(spare.orders.fileno())
        return spare

    def _reap(self, pidfd: int) -> None:
        self._looks.unregister(pidfd)
        spare = None
        if pidfd in self._spares:  # somebody killed it: whoever wants another one asks
            spare = self._forget_spare(pidfd)
            spare.orders.close()
            self._wanted = min(self._wanted, len(self._spares))
            self._tell_spares()
        os.waitpid(spare.pid if spare else self._kept.pop(pidfd), 0)
        os.close(pidfd)

    def _give_keeper(self, asked: dict[str, Any]) -> None:
        pidfd = self._release_spare(asked["folder"])
        if pidfd < 0:
            pid = os.fork()
            if pid == 0:
                self._be_keeper(asked["folder"])
            pidfd = self._watch(pid)
            self._kept[pidfd] = pid
        self._tell({"number": asked["number"], "pid": self._kept[pidfd]}, pidfd)

    def _release_spare(self, folder: str) -> int:
        """Have a spare keep this folder; return its pidfd, below 0 if there is none."""
        for pidfd in [pidfd for pidfd, spare in self._spares.items() if spare.waits]:
            spare = self._forget_spare(pidfd)
            self._kept[pidfd] = spare.pid
            self._wanted = min(self._wanted, len(self._spares))
            with spare.orders, contextlib.suppress(OSError):  # it was killed just now
                spare.orders.send(os.fsencode(folder))
                return pidfd
        return -1

    def _drop_spare(self) -> None:
        pidfd = next(reversed(self._spares))
        spare = self._forget_spare(pidfd)
        self._kept[pidfd] = spare.pid
        spare.orders.close()
        self._tell_spares()

    def _watch(self, pid: int) -> int:
        pidfd = os.pidfd_open(pid)  # nobody but this loop reaps it, so the number is still its own
        self._looks.register(pidfd, select.POLLIN)
        return pidfd

    def _fork_spare(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self._yields:
            _set_niceness(NICENESS)
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be_spare(its)
        if self._yields:
            _set_niceness(self._ordinary)
        its.close()
        pidfd = self._watch(pid)
        self._spares[pidfd] = Spare(pid, ours)
        self._coming[ours.fileno()] = pidfd
        self._looks.register(ours, select.POLLIN)

    def _be_spare(self, orders: socket.socket) -> NoReturn:
        """Fork the trainer that waits; then be a small process, which ends fast."""
        try:
            os.setsid()
            self._let_go()
            waits, names = os.pipe()
            me = os.getpid()
            trainer = os.fork()
            if trainer == 0:
                orders.close()
                os.close(names)
                self._be_spare_trainer(me, waits)
            for descriptor in (orders.fileno(), names):
                os.set_inheritable(descriptor, True)
            numbers = (orders.fileno(), names, trainer, self._ordinary)
            os.execv(sys.executable, [sys.executable, "-I", "-S", keeper.__file__, "--spare", *map(str, numbers)])
        except keeper.Born:
            raise
        except BaseException:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        os._exit(keeper.EXIT_CANNOT_RUN)

    def _be_spare_trainer(self, its_keeper: int, waits: int) -> NoReturn:
        keeper.die_with(its_keeper, ctypes.CDLL(None))
        show_arguments(("dtrain-spare",))
        if self._yields:
            _set_niceness(self._ordinary)
        folder = os.read(waits, keeper.FOLDER_MAX_BYTES).decode()
        if not folder:
            os._exit(0)
        os.close(waits)
        plan = json.loads((Path(folder) / "keeper.json").read_bytes())
        keeper.be_trainer(plan, self._begin)

    def _let_go(self) -> None:
        """In a child: close everything that is the zygote's."""
        self._control.close()
        for spare in self._spares.values():
            spare.orders.close()
        for pidfd in (*self._kept, *self._spares):
            os.close(pidfd)

    def _be_keeper(self, folder: str) -> NoReturn:
        code = keeper.EXIT_CANNOT_RUN
        try:
            os.setsid()
            self._let_go()
            keeper.say_into(folder)
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


def serve_until_born(agent: int, control: int, module: str, *, gives_way: bool) -> dict[str, Any]:
    """Serve; return only in a process that is to be a trainer, with its plan."""
    ctypes.CDLL(None).prctl(keeper.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:  # it died before the line above
        os._exit(0)
    os.environ.pop(PADDING, None)
    move_environment()
    show_arguments(("dtrain-zygote",))
    zygote = Zygote(socket.socket(fileno=control), module, gives_way=gives_way)
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
    _plan = serve_until_born(int(sys.argv[1]), int(sys.argv[2]), _module, gives_way=sys.argv[4] != ORDINARY)
    _zygote_module = sys.modules["__main__"]  # kept: the frames below still use it
    _code = None
    try:
        _code, _space = become(_plan, importlib.import_module(_module).settle)
        exec(_code, _space)
    except BaseException:
        hide_frames(_code)
        raise
