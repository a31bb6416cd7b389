"""A service that dies is started again; one that is beyond help ends the run with its own words."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from dtrain.common.errors import UserError
from dtrain.standalone.children import end_leftovers, leftovers
from dtrain.standalone.supervision import (
    BACKOFF_MAX_S,
    YOUNG_DEATHS_MAX,
    Service,
    ServiceFailedError,
    Supervisor,
    backoff_s,
)

DEADLINE_S = 30.0


def supervise(tmp_path: Path, program: str, act: Callable[[Supervisor, list[str]], Awaitable[None]]) -> list[str]:
    """Supervise one service while ``act`` runs; return the notices."""
    notices: list[str] = []
    service = Service(
        name="service", argv=(sys.executable, "-c", program), log=tmp_path / "service.log", stop_grace_s=2.0
    )

    async def main() -> None:
        with (tmp_path / "lock").open("w") as lock:
            supervisor = Supervisor(tmp_path, lock_fd=lock.fileno(), notice=notices.append)
            await supervisor.start(service)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await act(supervisor, notices)
            finally:
                await supervisor.stop(["service"])
        assert supervisor.pids() == {}

    try:
        asyncio.run(main())
    finally:
        end_leftovers(tmp_path)
    return notices


def test_a_killed_service_runs_again_at_once(tmp_path: Path) -> None:
    async def kill_it_twice(supervisor: Supervisor, notices: list[str]) -> None:
        for deaths in (1, 2):
            before = supervisor.pids()["service"]
            os.kill(before, signal.SIGKILL)
            while supervisor.pids().get("service", before) == before or len(notices) < deaths:
                await asyncio.sleep(0.01)

    notices = supervise(tmp_path, "import time; time.sleep(600)", kill_it_twice)
    assert notices == ["service was ended by SIGKILL; starting it again"] * 2


def test_a_service_that_refuses_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    async def wait(supervisor: Supervisor, notices: list[str]) -> None:
        with pytest.raises(UserError, match=r"^the log is damaged at key 7$"):
            await supervisor.failed()

    program = "import sys; print('dtrain: the log is damaged at key 7', file=sys.stderr); sys.exit(2)"
    assert supervise(tmp_path, program, wait) == []


def test_a_service_that_keeps_dying_ends_the_run_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.standalone.supervision.BACKOFF_MAX_S", 0.01)

    async def wait(supervisor: Supervisor, notices: list[str]) -> None:
        with pytest.raises(ServiceFailedError, match=r"service died 11 times in a row .*: ValueError: too bad"):
            await supervisor.failed()

    notices = supervise(tmp_path, "raise ValueError('too bad')", wait)
    assert len(notices) == YOUNG_DEATHS_MAX


def test_a_service_that_is_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )

    async def until_deaf(supervisor: Supervisor, notices: list[str]) -> None:
        while "deaf" not in (tmp_path / "service.log").read_text():
            await asyncio.sleep(0.01)

    began = time.monotonic()
    supervise(tmp_path, program, until_deaf)
    assert time.monotonic() - began < DEADLINE_S
    assert leftovers(tmp_path) == []


def test_the_pause_before_a_restart_grows_up_to_a_bound() -> None:
    pauses = [backoff_s(deaths) for deaths in range(12)]
    assert pauses[:2] == [0.0, 0.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == BACKOFF_MAX_S


PARENT = """
import asyncio, sys
from pathlib import Path
from dtrain.standalone.children import start_child
async def main():
    folder = Path(sys.argv[1])
    child = await start_child(
        [sys.executable, "-c", sys.argv[2]], log=folder / "child.log", folder=folder
    )
    print(child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""
CHILD = """
from dtrain.standalone.parents import bind_to_parent
bind_to_parent()
import os, signal, sys, time
assert "_DTRAIN_PARENT" not in os.environ
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit(0)))
print("bound", flush=True)
while True: time.sleep(0.05)
"""


def test_a_service_is_told_when_its_run_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), CHILD], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        _wait_for(lambda: "bound" in (tmp_path / "child.log").read_text())
        parent.kill()
        _wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        assert "told" in (tmp_path / "child.log").read_text()
    finally:
        parent.kill()
        parent.communicate()
        end_leftovers(tmp_path)


def test_leftovers_are_found_by_their_folders_mark_and_ended(tmp_path: Path) -> None:
    async def start(folder: Path) -> int:
        from dtrain.standalone.children import start_child

        folder.mkdir()
        # The service leaves a child of its own behind and dies: nobody but the mark knows of that child.
        argv = ["/bin/sh", "-c", "sleep 600 & exit 0"]
        child = await start_child(argv, log=folder / "log", folder=folder)
        await child.wait()
        return child.pid

    mine, other = tmp_path / "mine", tmp_path / "other"
    try:
        asyncio.run(start(mine))
        asyncio.run(start(other))
        _wait_for(lambda: len(leftovers(mine)) >= 1 and len(leftovers(other)) >= 1)
        assert end_leftovers(mine) >= 1
        assert leftovers(mine) == []
        assert leftovers(other) != []
    finally:
        end_leftovers(mine)
        end_leftovers(other)


def _wait_for(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.01)
