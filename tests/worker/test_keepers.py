"""The agent's side of keepers: whatever becomes of one, the end of its rank is told, and nothing of it lives on."""

import asyncio
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dtrain.common.names import Generation, JobName
from dtrain.worker import keepers, rank_dirs
from dtrain.worker.core.inputs import TrainerExited, TrainerStarted
from dtrain.worker.environment import trainer_mark
from dtrain.worker.keepers import Keepers
from dtrain.worker.rank_dirs import KeeperPlan, RankId, Started, read_started
from dtrain.worker.zygotes import Zygotes
from tests.support.processes import MARK, end_all, new_mark
from tests.worker.nodes import alive

DEADLINE_S = 30.0
OF = RankId(job=JobName("job"), generation=Generation(1), rank=0)
JOURNAL = "journal-of-this-test"
LOOK_S = 0.01


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    mark = new_mark()
    monkeypatch.setenv(MARK, mark)
    folder = tmp_path / "rank0"
    folder.mkdir()
    plan = KeeperPlan(
        argv=[sys.executable, "-u", "-c", "import time; time.sleep(600)"],
        cwd=str(tmp_path),
        env={**os.environ, "DTRAIN_TRAINER": trainer_mark(OF, JOURNAL)},
        log=str(tmp_path / "log"),
        error_file=str(tmp_path / "error.json"),
        grace_s=10.0,
        agent_lock=str(tmp_path / "agent.lock"),
        orphan_after_s=60.0,
    )
    (folder / "keeper.json").write_bytes(msgspec.json.encode(plan))
    try:
        yield folder
    finally:
        end_all(mark)


Told = asyncio.Queue[TrainerStarted | TrainerExited]


async def first_word(them: Keepers, facts: Told) -> TrainerStarted | TrainerExited:
    async with asyncio.timeout(DEADLINE_S):
        while facts.empty():
            them.poll()
            await asyncio.sleep(LOOK_S)
    return facts.get_nowait()


def keep(folder: Path, play: Callable[[Keepers, Told, Started], Coroutine[Any, Any, None]]) -> None:
    """Have a rank kept, and play with it once its trainer runs."""

    async def run() -> None:
        facts: Told = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        def begin(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            tasks.append(asyncio.create_task(work))
            return tasks[-1]

        them = Keepers(facts.put_nowait, lambda of: None, JOURNAL, begin, Zygotes(folder / "zygote.log", enabled=False))
        them.ensure(OF, folder, start=True)
        async with asyncio.timeout(DEADLINE_S):
            assert isinstance(await first_word(them, facts), TrainerStarted)
            started = read_started(folder)
            assert started is not None
            await play(them, facts, started)
            await asyncio.gather(*tasks)

    asyncio.run(run())


def test_an_end_is_told_by_the_kernel_and_not_found_by_looking(folder: Path) -> None:
    async def play(them: Keepers, facts: Told, started: Started) -> None:
        os.kill(started.trainer_pid, signal.SIGKILL)
        exited = await facts.get()  # nobody calls poll
        assert isinstance(exited, TrainerExited) and exited.exit.code == -signal.SIGKILL
        assert not alive(started.keeper_pid)

    keep(folder, play)


@pytest.mark.parametrize("trainer", ["is to be ended", "dies"])
def test_a_keeper_that_is_stopped_holds_no_rank_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    monkeypatch.setattr(keepers, "KEEPER_ENDS_S", 0.3)

    async def play(them: Keepers, facts: Told, started: Started) -> None:
        os.kill(started.keeper_pid, signal.SIGSTOP)
        if trainer == "dies":
            os.kill(started.trainer_pid, signal.SIGKILL)
        else:
            them.end(OF.job, OF.generation, 0.0)
        exited = await facts.get()
        assert isinstance(exited, TrainerExited) and exited.exit.code is None
        assert not alive(started.keeper_pid) and not alive(started.trainer_pid)

    keep(folder, play)


def never_started(folder: Path, *, start: bool = True, looks: int = 0, mend: Callable[[], None] = lambda: None) -> str:
    """Have a rank kept whose trainer cannot begin, look so often before ``mend``, and return why it ended."""

    async def run() -> str:
        facts: Told = asyncio.Queue()
        zygotes = Zygotes(folder / "zygote.log", enabled=False)
        them = Keepers(facts.put_nowait, lambda of: None, JOURNAL, asyncio.create_task, zygotes)
        them.ensure(OF, folder, start=start)
        for _ in range(looks):
            them.poll()
        mend()
        exited = await first_word(them, facts)
        assert isinstance(exited, TrainerExited) and exited.exit.code is None
        return exited.exit.error

    return asyncio.run(run())


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_end_that_cannot_be_written_is_told_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "keeper.json").write_text("no plan")  # its keeper fails
    monkeypatch.setattr(rank_dirs, "write_whole", full)
    why = never_started(folder)
    assert why.startswith("its keeper failed: ") and "No space left on device" in why


def test_a_rank_that_another_agents_keeper_may_yet_start_is_ended_when_there_is_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rank_dirs, "write_whole", full)
        assert never_started(folder, start=False, looks=3, mend=patch.undo) == "it was ended before it was started"
    assert caplog.text.count("rank 0 cannot be ended yet: [Errno 28]") == 1


def test_a_keeper_whose_log_cannot_be_opened_is_an_end_with_that_reason(folder: Path) -> None:
    (folder / "keeper.log").mkdir()
    assert never_started(folder).startswith("its keeper cannot run: [Errno 21]")


def test_a_rank_whose_folder_is_gone_is_ended_before_its_end_is_told(folder: Path) -> None:
    async def play(them: Keepers, facts: Told, started: Started) -> None:
        them.close()
        shutil.rmtree(folder)  # a cleaner, a person, or what removes a user's shared memory at logout
        zygotes = Zygotes(folder / "zygote.log", enabled=False)
        again = Keepers(facts.put_nowait, lambda of: None, JOURNAL, asyncio.create_task, zygotes)
        again.ensure(OF, folder, start=False)
        exited = await first_word(again, facts)
        assert isinstance(exited, TrainerExited) and "shared memory is gone" in exited.exit.error
        assert not alive(started.trainer_pid), "the next generation would begin beside it"

    keep(folder, play)
