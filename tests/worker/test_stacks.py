"""Where a trainer stands: asked by signal, read by py-spy, or told as what keeps it from answering."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dtrain.common.names import Generation, JobName
from dtrain.common.stacks import STACK_MAX_CHARS, STACKS_FILE
from dtrain.worker.core.actions import TakeStack
from dtrain.worker.core.inputs import CommandReceived, StackTaken, TakeStacks
from dtrain.worker.core.states import CommandStage
from dtrain.worker.keeper import start_time
from dtrain.worker.rank_dirs import RankId, Started
from dtrain.worker.stacks import Stacks, newest_frames
from dtrain.worker.tasks import Tasks
from tests.support.facts import wait_for
from tests.worker.facts_of_trainers import JOB, acts, command, node_state, of_kinds, run, start, status, stop, training

RANK = RankId(job=JobName("digits"), generation=Generation(3), rank=1)
LISTENS = """
import sys, threading
from pathlib import Path
from dtrain.trainer.stacks import answer_with_stacks

def stuck():
    threading.Event().wait()

threading.Thread(target=threading.Event().wait, daemon=True).start()
answer_with_stacks(Path(sys.argv[1]))
Path(sys.argv[1], "begun").touch()
stuck()
"""
DEAF = """
import sys, threading
from pathlib import Path
Path(sys.argv[1], "begun").touch()
threading.Event().wait()
"""


class Trainer:
    """A process, and the files by which an agent knows it."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder = folder
        self.told: list[str] = []
        self.process = subprocess.Popen([sys.executable, "-c", program, str(folder)])
        wait_for("the process", (folder / "begun").exists, deadline_s=30)
        pid = self.process.pid
        self.says(pid, start_time(pid))

    def says(self, pid: int, start: int) -> None:
        started = Started(keeper_pid=1, keeper_start=1, trainer_pid=pid, trainer_start=start)
        (self.folder / "started.json").write_bytes(msgspec.json.encode(started))

    def stack(self) -> str:
        """Ask as the agent does."""
        answers: list[StackTaken] = []

        async def turn() -> None:
            tasks = Tasks()
            async with asyncio.TaskGroup() as tasks.group:
                stacks = Stacks(answers.append, lambda _, text: self.told.append(text), tasks.begin)
                stacks.take(RANK, self.folder, 5)

        asyncio.run(turn())
        (answer,) = answers
        assert (answer.job, answer.generation, answer.rank, answer.number) == ("digits", 3, 1, 5)
        assert self.process.poll() is None, "it does not survive being asked"
        return answer.stack


@pytest.fixture
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trainer]:
    it = Trainer(tmp_path, request.param)
    yield it
    it.process.kill()
    it.process.wait()


@pytest.mark.parametrize("trainer", [LISTENS], indirect=True)
def test_a_trainer_says_where_its_main_thread_stands_each_time_it_is_asked(trainer: Trainer) -> None:
    for _ in range(2):
        frames = trainer.stack().splitlines()
        assert "in wait" in frames[0] and "in stuck" in frames[2], frames
        assert "Thread 0x" in trainer.told[-1], "the log has the other threads as well"
        assert trainer.told[-1].count("in stuck") == 1, "an answer holds nothing of an earlier one"


@pytest.mark.parametrize("trainer", [LISTENS], indirect=True)
def test_a_stopped_trainer_is_reported_as_stopped(trainer: Trainer) -> None:
    os.kill(trainer.process.pid, signal.SIGSTOP)
    assert trainer.stack() == "no stack: the process is stopped"


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_a_trainer_that_does_not_listen_gets_no_signal(trainer: Trainer) -> None:
    assert trainer.stack() == "no stack: the process did not answer"


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_another_process_that_has_its_number_gets_no_signal(trainer: Trainer) -> None:
    (trainer.folder / STACKS_FILE).touch()
    trainer.says(trainer.process.pid, start_time(trainer.process.pid) - 1)
    assert "no stack" in trainer.stack()


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_where_py_spy_is_installed_it_says_what_the_trainer_does_not(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "py-spy"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "Thread $4 (idle): \\"MainThread\\""\necho "    wait (threading.py:327)"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert trainer.stack() == "wait (threading.py:327)"
    assert str(trainer.process.pid) in trainer.told[0]


@pytest.mark.parametrize("trainer", [DEAF], indirect=True)
def test_a_trainer_that_was_never_started_is_said_to_be_gone(trainer: Trainer) -> None:
    (trainer.folder / "started.json").unlink()
    assert trainer.stack().startswith("no stack")


def test_a_report_has_room_for_the_newest_frames_only() -> None:
    text = "Current thread 0x1 (most recent call first):\n" + "".join(
        f'  File "{"x" * 50}", line {number} in f\n' for number in range(100)
    )
    kept = newest_frames(text)
    assert len(kept) <= STACK_MAX_CHARS
    assert "line 0 in f" in kept and "line 99 in f" not in kept


# ---- the machine -----------------------------------------------------------------------------------------


def ask(number: int, *, generation: int = 1) -> CommandReceived:
    return command(TakeStacks(number=number), id=f"stacks-{number}", generation=generation)


def taken(rank: int, number: int, stack: str = "f (a.py:1)") -> StackTaken:
    return StackTaken(job=JOB, generation=Generation(1), rank=rank, number=number, stack=stack)


def test_every_running_rank_is_asked_once_and_the_command_is_done_when_all_have_answered() -> None:
    state, actions = run(training(), ask(1), ask(1))
    assert [act.rank for act in of_kinds(acts(actions), TakeStack)] == [0, 1]
    state, _ = run(state, taken(0, 1))
    assert status(state, "stacks-1")[0] is CommandStage.ACCEPTED
    state, _ = run(state, taken(1, 1), taken(1, 0, "an older answer"))
    assert status(state, "stacks-1")[0] is CommandStage.DONE
    assert [rank.stack for rank in state.assignments[JOB].ranks] == ["f (a.py:1)"] * 2


def test_a_generation_that_does_not_run_is_not_asked() -> None:
    for state in (node_state(), run(training(), stop())[0], run(training(), start(id="next", generation=2))[0]):
        state, actions = run(state, ask(1))
        assert status(state, "stacks-1")[0] is CommandStage.REFUSED
        assert not of_kinds(acts(actions), TakeStack)
