"""A zygote that serves, with the agent's side of it, and rank folders to try it on."""

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.worker import zygotes
from dtrain.worker.environment import zygote_environment
from dtrain.worker.rank_dirs import Started, read_exited, read_started
from dtrain.worker.zygotes import Zygotes
from tests.support.facts import wait_for
from tests.support.processes import MARK, end_all, new_mark
from tests.worker.nodes import alive

DEADLINE_S = 60.0
TRAINER_MARK = "journal/job/1/0"
WAITS = "import os, sys, time\nprint('up')\ntime.sleep(600)"  # a script


class Nursery:
    """A zygote that serves, and rank folders to try it on."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop, mark: str) -> None:
        self.folder = folder
        self.loop = loop
        self.env = {**zygote_environment(os.environ, {}), MARK: mark, "DTRAIN_TRAINER": TRAINER_MARK}
        self.zygotes = Zygotes(folder / "zygote.log", enabled=True)
        self._lock = (folder / "agent.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._ranks = 0
        self.wanted: list[dict[str, str]] = []
        self.quiet = True
        self.spares = 1  # trainers that wait; 0: each is forked when it is needed

    def until(self, what: str, look: Any) -> Any:
        """Wait for a fact while the agent's loop runs."""

        def turn() -> Any:
            async def once() -> Any:
                self.zygotes.tend(quiet=self.quiet, wanted=self.wanted, spares=self.spares)
                await asyncio.sleep(0.005)
                return look()

            return self.loop.run_until_complete(once())

        return wait_for(what, turn, deadline_s=DEADLINE_S)

    def ready(self) -> int:
        self.until("a zygote is ready", lambda: self.zygotes.is_ready)
        return self.zygotes.pid

    def rank(self, source: str, *args: str, env: Mapping[str, str] | None = None, argv: Any = None) -> "Rank":
        self._ranks += 1
        place = self.folder / f"r{self._ranks}"
        (place / "rank0").mkdir(parents=True)
        script = place / "script.py"
        script.write_text(source)
        plan = {
            "argv": argv or [sys.executable, "-u", str(script), *args],
            "cwd": str(place),
            "env": {**self.env, **(env or {})},
            "log": str(place / "log"),
            "error_file": str(place / "error.json"),
            "grace_s": 10.0,
            "agent_lock": str(self.folder / "agent.lock"),
            "orphan_after_s": 60.0,
        }
        (place / "rank0" / "keeper.json").write_text(json.dumps(plan))
        return Rank(self, place, plan)

    def close(self) -> None:
        async def close() -> None:
            self.zygotes.close()

        self.loop.run_until_complete(close())
        self._lock.close()


class Rank:
    def __init__(self, nursery: Nursery, place: Path, plan: dict[str, Any]) -> None:
        self.nursery, self.place, self.plan = nursery, place, plan
        self.folder = place / "rank0"

    def fork(self) -> "Rank":
        self.nursery.ready()
        if self.nursery.spares and self.nursery.quiet:
            self.nursery.until("spares wait", lambda: self.nursery.zygotes.spares == self.nursery.spares)

        async def ask() -> None:
            assert self.nursery.zygotes.fork_keeper(self.folder) is not None

        self.nursery.loop.run_until_complete(ask())
        return self

    def started(self) -> Started:
        def look() -> Started | None:
            found = read_started(self.folder)
            return found if found is not None and found.trainer_pid else None

        found: Started = self.nursery.until("the trainer was started", look)
        return found

    def said(self, text: str) -> None:
        self.nursery.until(f"the trainer said {text}", lambda: text in self.log())

    def log(self) -> str:
        path = self.place / "log"
        return path.read_text() if path.exists() else ""

    def end(self) -> tuple[int | None, str]:
        """Run to the end, warm; return the exit code and what was printed."""
        keeper_pid = self.fork().started().keeper_pid
        self.nursery.until("the keeper is gone", lambda: not alive(keeper_pid))
        fact = read_exited(self.folder)
        assert fact is not None, (self.folder / "keeper.log").read_text()
        return fact.code, self.log()

    def cold(self) -> tuple[int, str]:
        """The same by an interpreter of its own."""
        done = subprocess.run(
            self.plan["argv"],
            cwd=self.plan["cwd"],
            env=self.plan["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        return done.returncode, done.stdout


@contextlib.contextmanager
def nursery_in(folder: Path, modules: Mapping[str, str], *, wanted: Sequence[dict[str, str]] = ()) -> Iterator[Nursery]:
    """``wanted``: the needs of jobs that are there before the zygote is."""
    mark = new_mark()
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(asyncio.new_event_loop()) as loop:
        patch.setattr(zygotes, "BACKOFF_FIRST_S", 0.05)
        patch.setenv(MARK, mark)
        (folder / "site-packages").mkdir()
        for name, source in modules.items():
            (folder / "site-packages" / f"{name}.py").write_text(source)
            patch.setattr(zygotes, "WARM_MODULE", name)
        patch.setenv("PYTHONPATH", str(folder / "site-packages"))
        it = Nursery(folder, loop, mark)
        it.wanted = list(wanted)
        try:
            it.ready()
            yield it
        finally:
            it.close()
            end_all(mark)
