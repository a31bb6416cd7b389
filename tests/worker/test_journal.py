"""The journal: what was committed is there after any death, and nothing else is."""

import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.common.names import WorkerId
from dtrain.worker.core.actions import JournalEntry
from dtrain.worker.core.inputs import Input, RestoreReady
from dtrain.worker.core.machine import step
from dtrain.worker.core.states import (
    COMMANDS_MAX,
    GenerationStage,
    NodeState,
    RankStage,
    RestoreStage,
    RetiringRank,
    ShardStage,
)
from dtrain.worker.journal import Journal
from tests.worker.facts_of_trainers import (
    JOB,
    command,
    exited,
    node_state,
    ready,
    stage,
    staged,
    start,
    started,
    stop,
    uploaded,
)
from tests.worker.scripts import journal_process

ROOT = Path(__file__).parents[2]


def _load(journal: Journal) -> NodeState:
    return journal.load(worker=WorkerId("w1"), slots=4, fence_after_s=100.0)


def _tell(journal: Journal, *story: Input) -> NodeState:
    state = node_state()
    for fact in story:
        state, actions = step(state, fact, 0.0)
        journal.write([action for action in actions if isinstance(action, JournalEntry)])
    return state


def _reopened(path: Path, *story: Input) -> tuple[NodeState, NodeState]:
    """The state that the agent had, and the one that its successor reads."""
    journal = Journal(path)
    had = _tell(journal, *story)
    journal.close()
    journal = Journal(path)
    read = _load(journal)
    journal.close()
    return had, read


def test_commands_term_spec_and_position_come_back(tmp_path: Path) -> None:
    had, read = _reopened(tmp_path / "j", start(term=7, seq=3, restore=True), stage(term=7, seq=9))
    assert (read.term, read.commands) == (7, had.commands)
    mine, theirs = read.assignments[JOB], had.assignments[JOB]
    assert (mine.generation, mine.spec, mine.checkpoint, mine.position, mine.restore) == (
        theirs.generation,
        theirs.spec,
        theirs.checkpoint,
        theirs.position,
        theirs.restore,
    )


def test_spawned_ranks_come_back_as_spawning_and_exits_as_facts(tmp_path: Path) -> None:
    had, read = _reopened(tmp_path / "j", start(), ready(), started(0), started(1), exited(1, code=3))
    assignment = read.assignments[JOB]
    assert assignment.stage is GenerationStage.LIVE
    assert [run.stage for run in assignment.ranks] == [RankStage.SPAWNING, RankStage.EXITED]
    assert assignment.ranks[1].exit == had.assignments[JOB].ranks[1].exit


def test_what_was_accepted_and_not_spawned_comes_back_as_accepted(tmp_path: Path) -> None:
    _, read = _reopened(tmp_path / "j", start())
    assert read.assignments[JOB].stage is GenerationStage.ACCEPTED


def test_an_ack_comes_back_and_an_upload_that_was_not_confirmed_begins_again(tmp_path: Path) -> None:
    had, read = _reopened(
        tmp_path / "j", start(), ready(), started(0), started(1), stage(), staged(0), staged(1), uploaded(0)
    )
    shards = read.assignments[JOB].shards
    assert [shard.stage for shard in shards] == [ShardStage.DURABLE, ShardStage.REQUESTED]
    assert shards[0] == had.assignments[JOB].shards[0]


def test_acks_of_an_older_attempt_are_forgotten(tmp_path: Path) -> None:
    _, read = _reopened(tmp_path / "j", start(), ready(), started(0), stage(1), staged(0), uploaded(0), stage(2, 20))
    assert {(shard.attempt, shard.stage) for shard in read.assignments[JOB].shards} == {(2, ShardStage.REQUESTED)}


def test_a_stop_comes_back_with_its_grace(tmp_path: Path) -> None:
    _, read = _reopened(tmp_path / "j", start(), ready(), started(0), stop(grace_s=7.0))
    assignment = read.assignments[JOB]
    assert (assignment.stage, assignment.grace_s, assignment.stopped) == (GenerationStage.ENDING, 7.0, True)


def test_a_stop_of_a_generation_that_never_came_is_remembered(tmp_path: Path) -> None:
    _, read = _reopened(tmp_path / "j", stop(generation=3))
    assert (read.assignments[JOB].stage, read.assignments[JOB].stopped_through) == (GenerationStage.OVER, 3)


def test_a_restore_that_was_verified_comes_back_as_ready(tmp_path: Path) -> None:
    done = RestoreReady(job=JOB, generation=start().generation)
    _, read = _reopened(tmp_path / "j", start(restore=True), ready(), done)
    assert read.assignments[JOB].restore.stage is RestoreStage.READY


def test_trainers_of_an_older_generation_are_known_until_they_are_gone(tmp_path: Path) -> None:
    first = (start(), ready(), started(0), started(1), start(id="second", generation=2))
    _, read = _reopened(tmp_path / "a", *first, exited(0))
    retiring = RetiringRank(generation=start().generation, rank=1)
    assert read.assignments[JOB].retiring == (retiring,)
    _, read = _reopened(tmp_path / "b", *first, exited(0), exited(1))
    assert read.assignments[JOB].retiring == ()


def test_the_identity_stays_and_differs_between_journals(tmp_path: Path) -> None:
    ids = []
    for name in ("a", "a", "b"):
        journal = Journal(tmp_path / name)
        ids.append(journal.id)
        journal.close()
    assert ids[0] == ids[1] != ids[2]


def test_the_journal_stays_small_however_many_generations_and_commands_pass(tmp_path: Path) -> None:
    path = tmp_path / "j"
    story = [fact for generation in range(1, 200) for fact in journal_process.story(generation)]
    _, read = _reopened(path, *story)
    assert len(read.commands) == COMMANDS_MAX
    with sqlite3.connect(path) as db:
        counts = {table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("commands", "ranks")}
    db.close()
    assert counts == {"commands": COMMANDS_MAX, "ranks": 2}


def test_a_journal_of_an_unknown_version_is_refused_with_the_mend(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE meta SET value = '99' WHERE name = 'version'")
    db.close()
    with pytest.raises(UserError, match=r"version 99.*another --data-dir"):
        Journal(tmp_path / "j")


def test_a_file_that_is_no_journal_is_refused_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("this is not a database, but long enough to be looked at as one" * 100)
    with pytest.raises(UserError, match="move it away"):
        Journal(tmp_path / "j")


def test_a_journal_that_cannot_be_opened_now_is_not_called_broken(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    (tmp_path / "j-wal").mkdir()  # as little can be written as on a full disk
    with pytest.raises(UserError, match="leave it where it is"):
        Journal(tmp_path / "j")


def test_a_step_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    _, actions = step(node_state(), command(start().body, id="x", term=9), 0.0)
    entries = [action for action in actions if isinstance(action, JournalEntry)]
    with pytest.raises(AssertionError):
        journal.write([*entries, object()])  # type: ignore[list-item]
    assert (_load(journal).term, _load(journal).assignments) == (0, {})
    journal.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_killed_with_9_loses_nothing_that_it_was_told_is_written(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "j"
    writer = subprocess.Popen(
        [sys.executable, "-m", journal_process.__name__, str(path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert writer.stdout is not None
    told = 0
    try:
        for _ in range(random.Random(seed).randint(10, 60)):
            told = int(writer.stdout.readline())
    finally:
        writer.kill()
        rest = writer.stdout.read().split()
        writer.wait()
        writer.stdout.close()
    told = int(rest[-1]) if rest else told
    journal = Journal(path)
    read = _load(journal)
    journal.close()
    assignment = read.assignments[JOB]
    assert int(read.term) == int(assignment.generation)  # written by the same step
    assert told <= assignment.generation <= told + 1
    assert read.commands[-1].generation == assignment.generation
