"""Run the real ``dtrain`` command as a person would, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from dtrain.standalone.children import end_leftovers, leftovers

DTRAIN = (sys.executable, "-m", "dtrain")
DEADLINE_S = 90.0  # two busy cores start a whole cluster and torch in some seconds
POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    code: int
    stdout: str
    stderr: str


def environment(**extra: str) -> dict[str, str]:
    """The environment of a person who has set nothing of dtrain's."""
    kept = {name: value for name, value in os.environ.items() if "DTRAIN" not in name}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def dtrain(*arguments: str, cwd: Path, deadline_s: float = DEADLINE_S, **extra: str) -> Answer:
    """Run one command to its end."""
    done = subprocess.run(
        [*DTRAIN, *arguments],
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    return Answer(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


class Running:
    """A command that runs; its output goes to files, so that it can be read meanwhile."""

    def __init__(self, process: subprocess.Popen[bytes], cwd: Path) -> None:
        self.process = process
        self._cwd = cwd

    @property
    def stdout(self) -> str:
        return (self._cwd / "run.out").read_text()

    @property
    def stderr(self) -> str:
        return (self._cwd / "run.err").read_text()

    def wait_until(self, fact: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Wait for a fact while the command runs."""
        end = time.monotonic() + deadline_s
        while not fact():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < end, f"no {what} within {deadline_s} s:\n{self.stdout}\n{self.stderr}"
            time.sleep(POLL_S)

    def wait_for_line(self, text: str) -> None:
        self.wait_until(lambda: text in self.stdout + self.stderr, f"{text!r}")

    def end(self, deadline_s: float = DEADLINE_S) -> int:
        return self.process.wait(deadline_s)


@contextmanager
def running(*arguments: str, cwd: Path, **extra: str) -> Iterator[Running]:
    """Start ``dtrain`` in ``cwd`` as the leader of a session, as a terminal would."""
    with (cwd / "run.out").open("wb") as out, (cwd / "run.err").open("wb") as err:
        process = subprocess.Popen(
            [*DTRAIN, *arguments],
            cwd=cwd,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        yield Running(process, cwd)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        end_leftovers(cwd / ".dtrain")


def assert_nothing_is_left(cwd: Path, within_s: float = 0.0) -> None:
    """No process that belongs to the data folder of ``cwd`` is alive."""
    end = time.monotonic() + within_s
    while found := leftovers(cwd / ".dtrain"):
        assert time.monotonic() < end, [_words(process) for process in found]
        time.sleep(POLL_S)


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone"
