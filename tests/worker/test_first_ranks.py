"""The first ranks of a node wait for the warm process that imports what they need; others do not, and none for ever."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dtrain.common.names import Generation, JobName
from dtrain.worker import zygotes
from dtrain.worker.core.inputs import TrainerExited, TrainerStarted
from dtrain.worker.environment import trainer_mark, zygote_environment
from dtrain.worker.keepers import Keepers
from dtrain.worker.rank_dirs import KeeperPlan, RankId
from dtrain.worker.zygotes import Zygotes
from tests.support.processes import MARK, end_all, new_mark

DEADLINE_S = 30.0
LOOK_S = 0.005
OF = RankId(job=JobName("job"), generation=Generation(1), rank=0)
JOURNAL = "journal-of-this-test"
SAYS_WARM = "import sys; print('slowly' in sys.modules)  # torch"
# Imports until it is let go on; what is in the file then is run.
SLOWLY = """
import pathlib, time
def preload():
    path = pathlib.Path({let!r})
    while not path.exists() or not path.read_text():
        time.sleep(0.005)
    exec(path.read_text())
def settle(environment): pass
"""


class Node:
    """A rank folder, a warm process that imports until ``let`` is written, and the agent's side of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = folder / "rank0"
        self.let = folder / "let"
        self.facts: list[TrainerStarted | TrainerExited] = []
        self.zygotes: Zygotes
        self.keepers: Keepers
        self.wanted: list[dict[str, str]] = []
        self.quiet = True

    def plan(self, source: str, env: dict[str, str] | None = None) -> None:
        (self.folder / "script.py").write_text(source)
        plan = KeeperPlan(
            argv=[sys.executable, "-u", "script.py"],
            cwd=str(self.folder),
            env={**zygote_environment(os.environ, {}), "DTRAIN_TRAINER": trainer_mark(OF, JOURNAL), **(env or {})},
            log=str(self.folder / "log"),
            error_file=str(self.folder / "error.json"),
            grace_s=10.0,
            agent_lock=str(self.folder / "agent.lock"),
            orphan_after_s=60.0,
        )
        (self.rank / "keeper.json").write_bytes(msgspec.json.encode(plan))

    async def turn(self) -> None:
        """What the agent does again and again."""
        self.zygotes.tend(quiet=self.quiet, wanted=self.wanted)
        self.keepers.poll()
        await asyncio.sleep(LOOK_S)

    async def until(self, look: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not look():
                await self.turn()

    async def begins(self) -> None:
        """The agent has started, and is told to start the rank while the warm process imports."""
        await self.until(lambda: self.zygotes.pid)
        self.wanted, self.quiet = [{}], False
        self.keepers.ensure(OF, self.rank, start=True)

    async def ends(self) -> TrainerExited:
        await self.until(lambda: self.facts and isinstance(self.facts[-1], TrainerExited))
        exited = self.facts[-1]
        assert isinstance(exited, TrainerExited)
        return exited

    def said(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    mark = new_mark()
    monkeypatch.setenv(MARK, mark)
    it = Node(tmp_path)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "slowly.py").write_text(SLOWLY.format(let=str(it.let)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site-packages"))
    monkeypatch.setattr(zygotes, "WARM_MODULE", "slowly")
    it.rank.mkdir()
    it.plan(SAYS_WARM)
    try:
        yield it
    finally:
        end_all(mark)


def play(node: Node, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        node.zygotes = Zygotes(node.folder / "zygote.log", enabled=True)
        node.keepers = Keepers(node.facts.append, lambda of: None, JOURNAL, asyncio.create_task, node.zygotes)
        try:
            await story()
        finally:
            node.keepers.close()
            node.zygotes.close()

    asyncio.run(run())


def test_the_first_rank_waits_for_what_it_would_import_itself(node: Node) -> None:
    async def story() -> None:
        await node.begins()
        for _ in range(20):
            await node.turn()
        assert node.facts == []
        node.let.write_text("pass")
        exited = await node.ends()
        assert isinstance(node.facts[0], TrainerStarted)
        assert (exited.exit.code, node.said()) == (0, "True\n")

    play(node, story)


@pytest.mark.parametrize("reason", ["it names no torch", "it needs another library setting", "ranks were here before"])
def test_who_gains_nothing_by_it_does_not_wait(node: Node, reason: str) -> None:
    if reason == "it names no torch":
        node.plan("import sys; print('slowly' in sys.modules)")
    elif reason == "it needs another library setting":
        node.plan(SAYS_WARM, {"OMP_WAIT_POLICY": "passive"})

    async def story() -> None:
        if reason == "ranks were here before":  # it gives way to them, so it may take long
            node.wanted = [{}]
        await node.begins()
        assert (await node.ends()).exit.code == 0
        assert node.said() == "False\n"

    play(node, story)


@pytest.mark.parametrize("end", ["fails", "dies", "is killed", "takes too long"])
def test_a_warm_process_that_never_comes_costs_a_cold_start_and_no_rank(
    node: Node, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    async def story() -> None:
        await node.begins()
        await node.turn()
        assert node.facts == []
        if end == "fails":
            node.let.write_text("raise ImportError('no such thing')")
        elif end == "dies":
            node.let.write_text("import os; os._exit(1)")
        elif end == "is killed":
            os.kill(node.zygotes.pid, signal.SIGKILL)
        else:
            monkeypatch.setattr(zygotes, "COMING_MAX_S", 0.0)
        assert (await node.ends()).exit.code == 0
        assert node.said() == "False\n"

    play(node, story)


def test_a_rank_that_is_ended_while_it_waits_never_starts(node: Node) -> None:
    async def story() -> None:
        await node.begins()
        node.keepers.end(OF.job, OF.generation, 0.0)
        exited = await node.ends()
        assert exited.exit.code is None and "ended before it was started" in exited.exit.error
        node.let.write_text("pass")
        await node.until(lambda: node.zygotes.is_ready)
        assert node.facts == [exited]

    play(node, story)
