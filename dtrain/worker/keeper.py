"""The small process between an agent and one trainer: it waits, so that an exit status outlives the agent.

Run as ``python -I -S keeper.py <rank folder>``. It is a program of its own, with the standard library only, that
starts in milliseconds. A zygote (zygote.py) runs the same code in a process that it forked; or it has keepers wait,
each with a forked trainer, for a rank folder: ``keeper.py --spare <socket> <pipe> <trainer's pid> <nice value>``.

Rules:
- at most one trainer a rank folder, ever: the lock is taken first, and whoever finds that the folder was used
  before leaves at once. So an agent that does not know whether its predecessor started a keeper starts another;
- ``started.json`` is written before the fork and again after it: a trainer that ran without this file saying so
  cannot be, however early the keeper dies;
- the room for ``exited.json`` is taken first: shared memory that a failing trainer leaves full hides no exit;
- no trainer outlives its keeper (PR_SET_PDEATHSIG), no descendant its trainer (the keeper is their subreaper);
- no trainer outlives its agent by more than ``orphan_after_s``: the agent's lock file tells whether it lives;
- an end that followed an order is told from one that came by itself, whoever reads of it, and however late.
"""

# pathlib would be a third of the start-up time:
# ruff: noqa: PTH104, PTH110, PTH118, PTH123, PTH208
import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable

TYPE_CHECKING = False  # importing typing would take half of the start-up time
if TYPE_CHECKING:
    from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
EXIT_USED = 75  # this folder had its keeper, or has it now
EXIT_CANNOT_RUN = 127  # as a shell says when a program cannot be run
TOLD = "it was told to end"
WATCH_S = 1.0  # how often the agent's lock is tried
KILLS_REMEMBERED = 10  # looks, a second apart: a large process takes seconds from its kill to its end
SWEEP_S = 0.02  # pause between two looks for descendants that are being killed
SWEEPS_MAX = 500  # ten seconds: only a process stuck in the kernel lasts longer
LOG_TAIL_BYTES = 32 * 1024  # of the log's end, read for its last words: room for a deep traceback
ERROR_MAX_CHARS = 500  # of one line, kept
TRACEBACK_MAX_CHARS = 4000  # of its end, where the error is
EXITED_MAX_BYTES = 64 * 1024  # more than exited.json takes where JSON writes each character as twelve
NOISE_MAX_LINES = 20  # what exit handlers may print after a traceback; one further back was survived
UNCAUGHT = 1  # exit code of a Python program that an exception ended
TRACEBACK_START = "Traceback (most recent call last):"
GROUP_START = "  + Exception Group Traceback (most recent call last):"
FOLDER_MAX_BYTES = 4096  # PATH_MAX
CHILD_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGHUP}


class Born(BaseException):
    """Leaves every frame of the keeper in a process that goes on as the trainer without an exec."""

    def __init__(self, plan: dict) -> None:  # type: ignore[type-arg]
        super().__init__()
        self.plan = plan


class Spare:
    """A trainer that was forked before anybody needed it. It waits for the name of its rank folder."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe

    def release(self, folder: str) -> bool:
        """Have it begin; return False if it is gone."""
        try:
            if os.waitpid(self.pid, os.WNOHANG) != (0, 0):
                return False
            os.write(self._pipe, folder.encode())
        except BrokenPipeError:
            pass  # it ended right here: as any trainer that was killed at its start
        finally:
            os.close(self._pipe)
        return True


def keep(folder: str, begin: Callable[[dict], None], spare: Spare | None = None) -> int:  # type: ignore[type-arg]
    """Run and keep the trainer of this rank folder; return the keeper's exit code.

    ``begin`` is called with the plan in the trainer's process. It executes a program, or raises ``Born``. A ``spare``
    trainer that lives needs no ``begin``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, CHILD_SIGNALS)  # from now on they are waited for, never delivered
    lock = os.open(os.path.join(folder, "keeper.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return EXIT_USED
    if any(os.path.exists(os.path.join(folder, name)) for name in ("started.json", "exited.json")):
        return EXIT_USED
    with open(os.path.join(folder, "keeper.json"), encoding="utf-8") as file:
        plan = json.load(file)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    me = {"keeper_pid": os.getpid(), "keeper_start": start_time(os.getpid())}
    reserve(folder, "exited.json", EXITED_MAX_BYTES)
    write_json(folder, "started.json", {**me, "trainer_pid": 0, "trainer_start": 0})
    os.close(open_log(plan))  # a log that cannot be written ends the keeper, which can say so: the trainer could not
    trainer = spare.pid if spare is not None and spare.release(folder) else spawn(plan, libc, lock, begin)
    write_json(folder, "started.json", {**me, "trainer_pid": trainer, "trainer_start": start_time(trainer)})
    ended = wait(trainer, plan)
    # The wall clock may be set between two exits of one node; this one only grows.
    seen = {"code": ended.code, "at_unix_s": time.time(), "at_mono_s": time.monotonic()}
    error, traceback = ("", "") if ended.code == 0 else last_words(plan, ended.code)
    said = {"error": error, "traceback": traceback, "out_of_memory": ended.out_of_memory, "ended_for": ended.ended_for}
    write_json(folder, "exited.json", {**seen, **said})
    end_descendants()
    return 0


def start_time(pid: int) -> int:
    """Ticks since boot at which ``pid`` started: with the pid, the identity of a process. 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rsplit(b")", 1)[1].split()[19])
    except OSError:
        return 0


def write_json(folder: str, name: str, record: dict) -> None:  # type: ignore[type-arg]
    """Write the file so that it is there whole or not at all, into room that was reserved for it if there is some."""
    temporary = os.path.join(folder, f".{name}.new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "w", encoding="utf-8") as file:
        json.dump(record, file)
        file.truncate()
        os.fsync(file.fileno())
    os.rename(temporary, os.path.join(folder, name))


def reserve(folder: str, name: str, size: int) -> None:
    """Take the room that ``write_json`` will need."""
    with open(os.path.join(folder, f".{name}.new"), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def spawn(plan: dict, libc: ctypes.CDLL, lock: int, begin: Callable[[dict], None]) -> int:  # type: ignore[type-arg]
    """Fork the trainer; return its pid."""
    keeper = os.getpid()
    trainer = os.fork()
    if trainer == 0:
        die_with(keeper, libc)
        be_trainer(plan, begin, lock)
    return trainer


def die_with(keeper: int, libc: ctypes.CDLL) -> None:
    """In its child: end when it ends."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:  # it died before the line above
        os._exit(EXIT_CANNOT_RUN)


def open_log(plan: dict) -> int:  # type: ignore[type-arg]
    return os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def be_trainer(plan: dict, begin: Callable[[dict], None], *inherited: int) -> "NoReturn":  # type: ignore[type-arg]
    """Become the trainer, in a session of its own. What keeps it from running is told in its log."""
    try:
        os.setsid()
        log, null = open_log(plan), os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for descriptor in {null, log, *inherited} - {0, 1, 2}:  # nobody else closes them where no program is executed
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.chdir(plan["cwd"])
        begin(plan)
    except Born:
        raise
    except OSError as error:
        where = plan["cwd"] if error.filename == plan["cwd"] else plan["argv"][0]
        os.write(2, f"dtrain: cannot run {where}: {error.strerror}\n".encode())
    except BaseException as error:
        os.write(2, f"dtrain: cannot run {plan['argv'][0]}: {error!r}\n".encode())
    os._exit(EXIT_CANNOT_RUN)


def execute(plan: dict) -> None:  # type: ignore[type-arg]
    """Become the program that the plan names. Raises OSError."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and exec would pass that on
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execvpe(plan["argv"][0], plan["argv"], plan["env"])


class Ended:
    """How the trainer ended."""

    def __init__(self, code: int, out_of_memory: str, ended_for: str) -> None:
        self.code = code
        self.out_of_memory = out_of_memory  # what is known, if the kernel killed for want of memory; else empty
        self.ended_for = ended_for  # why it was told to end; empty if it was not


class MemoryKills:
    """The kernel's count of processes that it killed for want of memory, in the trainer's control group."""

    def __init__(self, plan: dict) -> None:  # type: ignore[type-arg]
        self._file = plan.get("kills_file", "")
        self._bound = plan.get("memory_bound", "")
        self._seen = [self._count()] * KILLS_REMEMBERED  # one for each look, the newest last

    def look(self) -> None:
        self._seen = [*self._seen[1:], self._count()]

    def said_of(self, peak_kib: int) -> str:
        """What is known of a kill that was counted a moment ago; empty if none was."""
        if self._count() <= self._seen[0]:
            return ""
        return f"its process held {peak_kib // 1024} MiB at most" + (f", {self._bound}" if self._bound else "")

    def _count(self) -> int:
        try:
            with open(self._file, encoding="utf-8") as file:
                return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
        except (OSError, ValueError, IndexError):
            return 0


def wait(trainer: int, plan: dict) -> Ended:  # type: ignore[type-arg]
    """Wait for the trainer's end. Meanwhile hand signals on, reap orphans, and watch the agent."""
    kill_at = agent_gone_since = None
    told = ""  # why it was sent a signal that may be what ends it
    kills = MemoryKills(plan)
    next_watch = time.monotonic() + WATCH_S
    while True:
        while True:  # one SIGCHLD may stand for several children
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                raise SystemExit("the trainer was reaped by somebody else") from None
            if pid == trainer:
                code = os.waitstatus_to_exitcode(status)
                return Ended(code, "" if told or code == 0 else kills.said_of(usage.ru_maxrss), told)
            if pid == 0:
                break
        now = time.monotonic()
        wake = min(next_watch, kill_at) if kill_at is not None else next_watch
        received = signal.sigtimedwait(CHILD_SIGNALS, max(0.0, wake - now))
        now = time.monotonic()
        if received is not None and received.si_signo == signal.SIGTERM:
            told = told or TOLD
            send(trainer, signal.SIGTERM)
            kill_at = min(kill_at or float("inf"), now + plan["grace_s"])
        elif (received is not None and received.si_signo == signal.SIGQUIT) or (kill_at is not None and now >= kill_at):
            told = told or TOLD
            send(trainer, signal.SIGKILL)
            kill_at = None
        if now >= next_watch:
            next_watch = now + WATCH_S
            kills.look()
            if agent_lives(plan["agent_lock"]):
                agent_gone_since = None
            elif agent_gone_since is None:
                agent_gone_since = now
            elif now - agent_gone_since >= plan["orphan_after_s"]:
                told = f"its worker was gone for {plan['orphan_after_s']:g} s"
                send(trainer, signal.SIGKILL)
                try:
                    with open(plan["log"], "a", encoding="utf-8") as log:
                        log.write(f"dtrain: ended, because {told}\n")
                except OSError:
                    pass  # the disk is full; exited.json says it


def send(trainer: int, number: int) -> None:
    """Signal the trainer's whole process group; it is not reaped yet, so the number is still its own."""
    try:
        os.killpg(trainer, number)
    except ProcessLookupError:  # it has not reached setsid yet
        os.kill(trainer, number)


def agent_lives(path: str) -> bool:
    """Whether some agent holds the lock. The look takes the lock for microseconds; an agent that starts tries again."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def last_words(plan: dict, code: int) -> tuple[str, str]:  # type: ignore[type-arg]
    """One line on why the trainer failed, and its traceback: from its error file, else from the end of its log."""
    try:
        with open(plan["error_file"], encoding="utf-8") as file:
            message = json.load(file)["message"]
        text, traceback = str(message), ""
        if isinstance(message, dict):
            text, traceback = message["message"], str(message["extraInfo"].get("py_callstack", ""))
        return sayable(text.strip().replace("\n", " "))[:ERROR_MAX_CHARS], sayable(traceback)[-TRACEBACK_MAX_CHARS:]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no error file, or not one that we can read: the log is the next best witness
    try:
        with open(plan["log"], "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            lines = [without_rank(line.rstrip()) for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return "", ""
    found = last_traceback(lines) if code == UNCAUGHT else []
    error = error_in(found) if found else next((line for line in reversed(lines) if line), "")
    return error.strip()[:ERROR_MAX_CHARS], "\n".join(found)[-TRACEBACK_MAX_CHARS:]


def sayable(text: str) -> str:
    """JSON can hold half a character, our wire cannot."""
    return text.encode(errors="replace").decode()


def without_rank(line: str) -> str:
    """The line without the ``[rank0]: `` that torch puts before a traceback."""
    return line.partition("]: ")[2] if line.startswith("[rank") and "]: " in line else line


def last_traceback(lines: list[str]) -> list[str]:
    """The log's last traceback, from its first line to the exception's own; empty if it was not what ended it."""
    starts = [number for number, line in enumerate(lines) if line in (TRACEBACK_START, GROUP_START)]
    if not starts:
        return []
    after = range(starts[-1] + 1, len(lines))
    if lines[starts[-1]] == GROUP_START:  # it ends with a rule, and so may each group within it
        last = max((number for number in after if set(lines[number].strip()) == {"+", "-"}), default=0)
    else:
        last = next((number for number in after if lines[number] and not lines[number].startswith(" ")), 0)
    return lines[starts[-1] : last + 1] if last and len(lines) - last <= NOISE_MAX_LINES else []


def error_in(traceback: list[str]) -> str:
    """The exception's own line; of a group, that of the group itself, which comes before what is in it."""
    if traceback[0] != GROUP_START:
        return traceback[-1]
    return next((line[4:] for line in traceback if line.startswith("  | ") and line[4:5] != " "), traceback[-1])


def end_descendants() -> None:
    """Kill what the trainer left. Orphans become our children, so all are gone when we have no child."""
    for _ in range(SWEEPS_MAX):
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
        except ChildProcessError:
            return
        signal.sigtimedwait({signal.SIGCHLD}, SWEEP_S)


def children() -> list[int]:
    """The processes whose parent is this one."""
    me = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rsplit(b")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == me:
                found.append(int(name))
    return found


def say_into(folder: str) -> None:
    """Have what this keeper prints go to the rank folder's ``keeper.log``."""
    log = os.open(os.path.join(folder, "keeper.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def keep_with_spare(orders: int, pipe: int, trainer: int, niceness: int) -> int:
    """Wait until the zygote names a rank folder on the socket ``orders``, and keep it; return the exit code."""
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    os.write(orders, b"waits")
    folder = os.read(orders, FOLDER_MAX_BYTES).decode()
    os.close(orders)
    if not folder:  # the zygote is gone, or needs fewer: the trainer that waits ends with this process
        return 0
    say_into(folder)
    return keep(folder, execute, Spare(trainer, pipe))


if __name__ == "__main__":
    sys.exit(keep_with_spare(*map(int, sys.argv[2:])) if sys.argv[1] == "--spare" else keep(sys.argv[1], execute))
