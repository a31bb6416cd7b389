"""The keeper as a real process: what it records, what it ends, and that it is there once."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dtrain.storage.control_groups import MemoryGroup, memory_groups
from dtrain.worker import keeper
from dtrain.worker.rank_dirs import KeeperPlan, Started, forbid, read_exited, read_started
from tests.support.facts import wait_for
from tests.support.processes import MARK, end_all, marked, new_mark
from tests.worker.nodes import alive

DEADLINE_S = 20.0


class Rank:
    """A rank folder, the agent's lock beside it, and the keepers that were started on it."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder = folder / "rank0"
        self.folder.mkdir()
        self.log = folder / "rank-0.log"
        self.error_file = self.folder / "error.json"
        self.agent_lock = folder / "agent.lock"
        self._env = {**os.environ, MARK: mark}

    def keep(
        self,
        script: str,
        *,
        program: str = sys.executable,
        grace_s: float = 10.0,
        orphan_after_s: float = 60.0,
        kills_file: Path | None = None,
        group: Path | None = None,
    ) -> "subprocess.Popen[bytes]":
        plan = KeeperPlan(
            argv=[program, "-u", "-c", script],
            cwd=str(self.folder),
            env=self._env,
            log=str(self.log),
            error_file=str(self.error_file),
            grace_s=grace_s,
            agent_lock=str(self.agent_lock),
            orphan_after_s=orphan_after_s,
            kills_file=str(kills_file or ""),
            memory_bound="and its limit is 64 MiB",
        )
        (self.folder / "keeper.json").write_bytes(msgspec.json.encode(plan))
        return self.another(group)

    def another(self, group: Path | None = None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-I", "-S", keeper.__file__, str(self.folder)]
        if group is not None:  # the shell moves itself, and becomes the keeper
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        return subprocess.Popen(command, env=self._env)

    def started(self) -> Started:
        def look() -> Started | None:
            found = read_started(self.folder)
            return found if found is not None and found.trainer_pid else None

        return wait_for("the trainer was started", look, deadline_s=DEADLINE_S)

    def said(self, text: str) -> bool:
        return wait_for(
            f"the trainer said {text}",
            lambda: self.log.exists() and text in self.log.read_text(),
            deadline_s=DEADLINE_S,
        )


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    mark = new_mark()
    try:
        yield Rank(tmp_path, mark)
    finally:
        end_all(mark)


@contextlib.contextmanager
def living_agent(rank: Rank) -> Iterator[None]:
    with rank.agent_lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("script", "code", "error"),
    [
        ("print('all well')", 0, ""),
        ("import sys; print('one'); print('two\\n\\n'); sys.exit(3)", 3, "two"),
        ("raise ValueError('no luck')", 1, "ValueError: no luck"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_the_exit_is_recorded_with_its_code_and_last_words(rank: Rank, script: str, code: int, error: str) -> None:
    before = time.time()
    assert rank.keep(script).wait(DEADLINE_S) == 0
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.error, fact.ended_for) == (code, error, "")
    assert before <= fact.at_unix_s <= time.time()


def test_the_error_file_is_preferred_to_the_log(rank: Rank) -> None:
    rank.error_file.write_text('{"message": {"message": "RuntimeError: the real cause", "extraInfo": {}}}')
    rank.keep("import sys; print('noise'); sys.exit(1)").wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert fact.error == "RuntimeError: the real cause"


def test_the_traceback_is_taken_from_the_error_file(rank: Rank) -> None:
    record = {"message": {"message": "ValueError: x", "extraInfo": {"py_callstack": "Traceback ...\nValueError: x\n"}}}
    rank.error_file.write_text(json.dumps(record))
    rank.keep("import sys; sys.exit(1)").wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.error, fact.traceback) == ("ValueError: x", "Traceback ...\nValueError: x\n")


def test_the_traceback_of_a_plain_script_is_found_in_its_log_before_what_it_printed_at_its_end(rank: Rank) -> None:
    script = "import atexit\natexit.register(print, 'good bye')\ndef f(): raise ValueError('no luck')\nf()"
    rank.keep(script).wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert fact.error == "ValueError: no luck"
    lines = fact.traceback.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ValueError: no luck")


def test_a_group_of_exceptions_is_named_by_its_own_line_and_kept_whole(rank: Rank) -> None:
    script = (
        "import atexit\natexit.register(print, 'good bye')\n"
        "def f():\n    inner = ExceptionGroup('in', [OSError('x')])\n"
        "    raise ExceptionGroup('two of them\\nfailed', [inner, ValueError('y')])\n"
        "try: 1 / 0\nexcept ZeroDivisionError: f()"
    )
    rank.keep(script).wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert fact.error == "ExceptionGroup: two of them"
    lines = fact.traceback.splitlines()
    assert lines[0] == "  + Exception Group Traceback (most recent call last):"
    assert lines[-2:] == ["    | ValueError: y", "    +------------------------------------"]


def test_a_traceback_that_was_survived_is_not_what_ended_the_trainer(rank: Rank) -> None:
    script = (
        "import sys, traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()\n"
        f"for n in range({keeper.NOISE_MAX_LINES}): print('step', n, file=sys.stderr)\nsys.exit('gave up')"
    )
    rank.keep(script).wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.error, fact.traceback) == (1, "gave up", "")


def test_the_room_for_the_exit_is_taken_before_the_trainer_begins(rank: Rank) -> None:
    """It may end because shared memory is full, which must not hide how it ended."""
    rank.keep("import pathlib, time\nwhile not pathlib.Path('end').exists(): time.sleep(0.01)\nraise ValueError('x')")
    rank.started()
    room = (rank.folder / ".exited.json.new").stat()
    assert room.st_blocks * 512 >= keeper.EXITED_MAX_BYTES
    (rank.folder / "end").touch()
    exited = rank.folder / "exited.json"
    wait_for("the exit is recorded", exited.exists, deadline_s=DEADLINE_S)
    assert exited.stat().st_ino == room.st_ino
    fact = read_exited(rank.folder)
    assert fact is not None
    assert fact.error == "ValueError: x"


def test_the_longest_record_of_an_exit_fits_into_its_room() -> None:
    longest = "\N{PILE OF POO}"
    said = {"error": longest * keeper.ERROR_MAX_CHARS, "traceback": longest * keeper.TRACEBACK_MAX_CHARS}
    assert len(json.dumps(said)) < keeper.EXITED_MAX_BYTES - 4096


def test_a_program_that_cannot_be_run_is_named(rank: Rank) -> None:
    assert rank.keep("", program="/no/such/python").wait(DEADLINE_S) == 0
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.error) == (127, "dtrain: cannot run /no/such/python: No such file or directory")


def test_a_second_keeper_leaves_at_once_while_the_first_lives_and_after_it(rank: Rank) -> None:
    first = rank.keep("import pathlib, time\nwhile not pathlib.Path('end').exists(): time.sleep(0.01)")
    trainer = rank.started()
    assert rank.another().wait(DEADLINE_S) == keeper.EXIT_USED
    assert read_started(rank.folder) == trainer
    (rank.folder / "end").touch()
    assert first.wait(DEADLINE_S) == 0
    assert rank.another().wait(DEADLINE_S) == keeper.EXIT_USED
    assert read_started(rank.folder) == trainer


def test_a_forbidden_rank_never_starts(rank: Rank) -> None:
    assert forbid(rank.folder, "stopped first") is not None
    assert rank.keep("print('ran')").wait(DEADLINE_S) == keeper.EXIT_USED
    assert not rank.log.exists()
    assert read_started(rank.folder) is None


def test_a_rank_that_was_started_cannot_be_forbidden(rank: Rank) -> None:
    rank.keep("import time; time.sleep(60)")
    rank.started()
    assert forbid(rank.folder, "too late") is None


def test_sigterm_goes_to_the_trainer_which_may_end_well(rank: Rank) -> None:
    process = rank.keep(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('up')\ntime.sleep(60)"
    )
    rank.said("up")
    process.terminate()
    process.wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.ended_for) == (5, keeper.TOLD)


DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up')\ntime.sleep(60)"


def test_a_trainer_that_ignores_sigterm_is_killed_after_the_grace(rank: Rank) -> None:
    process = rank.keep(DEAF, grace_s=0.2)
    rank.said("up")
    process.terminate()
    process.wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.ended_for) == (-signal.SIGKILL, keeper.TOLD)


def test_sigquit_kills_at_once(rank: Rank) -> None:
    process = rank.keep(DEAF, grace_s=60)
    rank.said("up")
    process.send_signal(signal.SIGQUIT)
    process.wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.ended_for) == (-signal.SIGKILL, keeper.TOLD)


def test_a_keeper_killed_with_9_takes_its_trainer_along(rank: Rank) -> None:
    process = rank.keep("import time; time.sleep(60)")
    trainer = rank.started().trainer_pid
    process.kill()
    process.wait()
    wait_for("the trainer is gone", lambda: not alive(trainer), deadline_s=DEADLINE_S)
    assert read_exited(rank.folder) is None


def test_whatever_the_trainer_started_is_ended_even_in_a_session_of_its_own(rank: Rank) -> None:
    process = rank.keep(
        "import subprocess, sys\n"
        "for _ in range(3):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "    print('child', child.pid)\n"
    )
    assert process.wait(DEADLINE_S) == 0
    pids = [int(line.split()[1]) for line in rank.log.read_text().splitlines()]
    assert len(pids) == 3
    assert all(not alive(pid) for pid in pids)


def test_without_its_agent_the_trainer_is_ended_after_the_given_time_and_its_log_says_why(rank: Rank) -> None:
    with living_agent(rank):
        process = rank.keep("import time; time.sleep(60)", orphan_after_s=0.5)
        trainer = rank.started().trainer_pid
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)  # two looks at the lock, and more than the given time
        assert alive(trainer)
    process.wait(DEADLINE_S)
    assert "its worker was gone for 0.5 s" in rank.log.read_text()
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.ended_for) == (-signal.SIGKILL, "its worker was gone for 0.5 s")


COUNTED = "import os, pathlib\npathlib.Path({path!r}).write_text('oom 3\\noom_kill 8\\n')\n"
KILLED = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("counted", "end", "said"), [(True, KILLED, True), (False, KILLED, False), (True, "os._exit(1)", True)]
)
def test_a_kill_that_the_kernel_counted_just_then_is_told(rank: Rank, counted: bool, end: str, said: bool) -> None:
    events = rank.folder.parent / "memory.events"
    events.write_text("oom 3\noom_kill 7\n")
    script = COUNTED.format(path=str(events)) if counted else "import os\n"
    assert rank.keep(script + end, kills_file=events).wait(DEADLINE_S) == 0
    fact = read_exited(rank.folder)
    assert fact is not None
    assert bool(re.fullmatch(r"its process held \d+ MiB at most, and its limit is 64 MiB", fact.out_of_memory)) is said


def test_a_kill_on_order_is_not_taken_for_the_kernels(rank: Rank) -> None:
    events = rank.folder.parent / "memory.events"
    process = rank.keep(
        COUNTED.format(path=str(events)) + "print('up')\nwhile True: os.sched_yield()", kills_file=events
    )
    rank.said("up")
    process.send_signal(signal.SIGQUIT)
    process.wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.out_of_memory) == (-signal.SIGKILL, "")


@pytest.fixture
def small_group() -> Iterator[MemoryGroup]:
    """A control group of 64 MiB below this process's own."""
    own = next(iter(memory_groups()), None)
    if own is None:
        pytest.skip("no control group counts memory here")
    group = MemoryGroup(folder=own.folder / f"dtrain-test-{os.getpid()}", is_unified=own.is_unified)
    try:
        group.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = group.folder / ("memory.max" if group.is_unified else "memory.limit_in_bytes")
        if not limit.exists():
            pytest.skip("the memory of a control group cannot be limited here")
        limit.write_text(str(64 << 20))
        for name, most in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", 64 << 20)):
            if (group.folder / name).exists():
                (group.folder / name).write_text(str(most))
        yield group
    finally:
        wait_for("the group is empty", lambda: not (group.folder / "cgroup.procs").read_text(), deadline_s=DEADLINE_S)
        group.folder.rmdir()


def test_what_the_kernel_kills_for_want_of_memory_is_told(rank: Rank, small_group: MemoryGroup) -> None:
    hoard = "held = []\nwhile True: held.append(bytearray(1 << 20))"
    process = rank.keep(hoard, kills_file=small_group.kills_file, group=small_group.folder)
    assert process.wait(DEADLINE_S) == 0
    fact = read_exited(rank.folder)
    assert fact is not None
    assert fact.code == -signal.SIGKILL
    match = re.match(r"its process held (\d+) MiB at most", fact.out_of_memory)
    assert match is not None and 30 < int(match[1]) <= 70


def test_the_trainer_has_a_clean_slate(rank: Rank) -> None:
    """No signal blocked, standard input empty, a session of its own."""
    rank.keep(
        "import os, signal, sys\n"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []), repr(sys.stdin.read()), os.getsid(0) == os.getpid())"
    ).wait(DEADLINE_S)
    assert rank.log.read_text() == "set() '' True\n"


def test_nothing_is_left_of_a_rank_that_has_ended(rank: Rank) -> None:
    mark = rank._env[MARK]
    assert rank.keep("import os; os.fork(); os.fork()").wait(DEADLINE_S) == 0
    assert marked(mark) == {}


def test_an_orphan_is_ended_and_told_of_where_its_log_takes_nothing_any_more(rank: Rank) -> None:
    with living_agent(rank):
        process = rank.keep("import time; time.sleep(60)", orphan_after_s=0.5)
        rank.started()
        rank.log.unlink()
        rank.log.mkdir()  # whoever writes there gets an OSError, as on a full disk
    process.wait(DEADLINE_S)
    fact = read_exited(rank.folder)
    assert fact is not None
    assert (fact.code, fact.ended_for) == (-signal.SIGKILL, "its worker was gone for 0.5 s")
