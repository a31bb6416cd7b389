"""The agent's side of the zygote: renewed when it must be, with as many trainers waiting as may be needed."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dtrain.worker import zygotes
from dtrain.worker.rank_dirs import read_exited
from dtrain.worker.warm_trainers import needs_of
from tests.support.facts import wait_for
from tests.worker.nodes import alive
from tests.worker.nursery import DEADLINE_S, WAITS, Nursery


def test_trainer_and_keeper_outlive_the_zygote_and_another_one_serves_after_it(nursery: Nursery) -> None:
    rank = nursery.rank(WAITS).fork()
    first = rank.started()
    rank.said("up")
    zygote = nursery.ready()
    os.kill(zygote, signal.SIGKILL)
    nursery.until("another zygote", lambda: nursery.zygotes.is_ready and nursery.zygotes.pid != zygote)
    assert alive(first.keeper_pid)
    assert alive(first.trainer_pid)
    assert nursery.rank("print('served')").end() == (0, "served\n")
    os.kill(first.keeper_pid, signal.SIGQUIT)
    nursery.until("the exit is recorded", lambda: read_exited(rank.folder))


def waiting(nursery: Nursery) -> list[int]:
    """The processes that wait, each keeper before its trainer."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_bytes().rsplit(b")", 1)[1].split()[1])
                if b"--spare" in command and parent == nursery.zygotes.pid:
                    trainer = int(command[command.index(b"--spare") + 3])
                    if Path(f"/proc/{trainer}/cmdline").read_bytes().startswith(b"dtrain-spare"):
                        found += [int(entry.name), trainer]
    return found


def test_a_rank_takes_a_trainer_that_waits_and_another_one_waits_when_all_is_quiet_again(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    nursery.ready()
    nursery.until("a spare waits", lambda: nursery.zygotes.spares == 1)
    keeper_pid, trainer_pid = waiting(nursery)
    monkeypatch.setattr(nursery, "quiet", False)
    rank = nursery.rank(WAITS).fork()
    started = rank.started()
    assert (started.keeper_pid, started.trainer_pid) == (keeper_pid, trainer_pid)
    rank.said("up")
    assert waiting(nursery) == [], "another one was forked while a rank came up"
    monkeypatch.setattr(nursery, "quiet", True)
    nursery.until("the next one waits", lambda: nursery.zygotes.spares == 1)
    os.kill(started.keeper_pid, signal.SIGQUIT)
    nursery.until("the exit is recorded", lambda: read_exited(rank.folder))


def test_more_and_fewer_wait_as_they_are_wanted_and_none_when_the_zygote_is_gone(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "spares", 3)
    zygote = nursery.ready()
    nursery.until("three wait", lambda: nursery.zygotes.spares == 3)
    three = waiting(nursery)
    assert len(three) == 6
    monkeypatch.setattr(nursery, "spares", 1)
    nursery.until("one waits", lambda: sum(map(alive, three)) == 2)
    os.kill(zygote, signal.SIGKILL)
    wait_for("none is left", lambda: not any(map(alive, three)), deadline_s=DEADLINE_S)


@pytest.mark.parametrize("which", [0, 1], ids=["its keeper", "the trainer"])
def test_who_waited_and_was_killed_costs_no_start(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    nursery.ready()
    nursery.until("a spare waits", lambda: nursery.zygotes.spares == 1)
    pids = waiting(nursery)
    monkeypatch.setattr(nursery, "quiet", False)
    os.kill(pids[which], signal.SIGKILL)
    wait_for("it is gone", lambda: not alive(pids[which]), deadline_s=DEADLINE_S)
    assert nursery.rank("print('ran')").end() == (0, "ran\n")


def test_where_none_can_wait_the_zygote_serves_without(
    barren_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = barren_nursery
    zygote = it.ready()
    said = it.folder / "zygote.log"
    it.until("it was tried", lambda: "FileNotFoundError" in said.read_text())
    monkeypatch.setattr(it, "quiet", False)
    for _ in range(2):
        code, text = it.rank("print('ran')").end()
        assert (code, text.splitlines()[-1]) == (0, "ran")
    assert it.zygotes.pid == zygote and it.zygotes.is_ready and "KeyError" not in said.read_text()


def test_where_none_waits_one_is_forked(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "spares", 0)
    script = nursery.rank("import os; print(os.getppid())")
    code, said = script.end()
    started = script.started()
    assert (code, said) == (0, f"{started.keeper_pid}\n")


def another_zygote(nursery: Nursery, than: int) -> int:
    nursery.until("another zygote", lambda: nursery.zygotes.is_ready and nursery.zygotes.pid != than)
    return nursery.zygotes.pid


LIBRARIES = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "OMP_WAIT_POLICY": "passive"}
READ_AT_IMPORT = ("AOTINDUCTOR_REPRO_LEVEL", "AOT_PARTITIONER_DEBUG", "SYMPY_USE_CACHE", "CXX", "LOGLEVEL")


def test_a_job_that_wants_something_of_a_library_gets_a_zygote_that_has_it(quick_nursery: Nursery) -> None:
    it = quick_nursery
    script = "import os; print(os.environ['OMP_WAIT_POLICY'])"
    first = it.ready()
    assert "a cold start: OMP_WAIT_POLICY differs" in it.rank(script, env=LIBRARIES).end()[1]
    it.wanted = [LIBRARIES]
    second = another_zygote(it, first)
    assert it.rank(script, env=LIBRARIES).end() == (0, "passive\n")
    it.wanted = [{}, LIBRARIES]
    assert it.rank(script, env=LIBRARIES).end() == (0, "passive\n")
    assert it.zygotes.pid == second, "a second job took the first one's zygote away"
    it.wanted = [{}]
    another_zygote(it, second)
    assert it.rank("print('served')").end() == (0, "served\n")


def test_a_job_that_never_says_that_it_has_started_gets_its_zygote_too(
    quick_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that counts no steps; but one that has just begun is not disturbed by another's imports."""
    first = quick_nursery.ready()
    quick_nursery.quiet, quick_nursery.wanted = False, [LIBRARIES]
    quick_nursery.rank("print('while it comes up')").end()
    assert quick_nursery.zygotes.pid == first
    monkeypatch.setattr(zygotes, "STARTS_LAST_S", 0.5)
    another_zygote(quick_nursery, first)
    script = "import os; print(os.environ['OMP_WAIT_POLICY'])"
    assert quick_nursery.rank(script, env=LIBRARIES).end() == (0, "passive\n")


def test_needs_that_no_zygote_can_serve_are_tried_once_and_the_others_are_served(
    quick_nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quick_nursery.ready()
    quick_nursery.wanted = [LIBRARIES]
    with monkeypatch.context() as patch:
        patch.setattr(zygotes, "WARM_MODULE", "no_such_module")
        quick_nursery.until("it is refused", lambda: quick_nursery.zygotes._refused == [LIBRARIES])
    another_zygote(quick_nursery, first)
    assert quick_nursery.rank("print('served')").end() == (0, "served\n")


def test_only_what_libraries_read_is_a_need() -> None:
    others = {
        "OMP_NUM_THREADS": "2",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "LD_PRELOAD": "x",
        "PYTHONHASHSEED": "1",
        "A": "b",
    }
    assert needs_of({**LIBRARIES, **others}) == LIBRARIES
    assert tuple(needs_of(dict.fromkeys(READ_AT_IMPORT, "1"))) == READ_AT_IMPORT


def test_a_zygote_that_is_stopped_is_replaced_before_anybody_waits_for_it(quick_nursery: Nursery) -> None:
    first = quick_nursery.ready()
    os.kill(first, signal.SIGSTOP)
    another_zygote(quick_nursery, first)
    assert not alive(first)
    assert quick_nursery.rank("print('served')").end() == (0, "served\n")


def test_who_asked_a_zygote_that_does_not_answer_is_told(nursery: Nursery) -> None:
    rank = nursery.rank("print('ran')")
    zygote = nursery.ready()
    os.kill(zygote, signal.SIGSTOP)

    async def ask() -> Any:
        return nursery.zygotes.fork_keeper(rank.folder)

    asked = nursery.loop.run_until_complete(ask())
    assert asked.poll() is None
    nursery.until("it is lost", lambda: asked.lost)
    assert asked.poll() is not None
    assert not alive(zygote)
