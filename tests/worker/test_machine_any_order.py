"""Whatever happens in whatever order, the agent's invariants hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.common.mailbox import unpack
from dtrain.worker.core.actions import (
    JOURNAL_ENTRIES,
    Action,
    AskStage,
    CleanGeneration,
    EndTrainers,
    FetchRestore,
    JournalShard,
    PrepareFolders,
    SpawnTrainer,
    Upload,
)
from dtrain.worker.core.inputs import (
    CommandReceived,
    FoldersReady,
    Input,
    RestoreReady,
    StopRequested,
    Tick,
    TrainerExited,
    TrainerStarted,
)
from dtrain.worker.core.machine import step
from dtrain.worker.core.states import CommandStage, NodeState
from tests.worker.facts_of_trainers import (
    exited,
    mailbox,
    node_state,
    ready,
    stage,
    staged,
    start,
    started,
    stop,
    uploaded,
)

SLOTS = 3
JOBS = st.sampled_from(["a", "b"])
GENERATIONS = st.integers(1, 4)
RANKS = st.integers(0, 2)
ATTEMPTS = st.integers(1, 3)
TERMS = st.integers(1, 3)


@st.composite
def facts(draw: st.DrawFn) -> Input:
    """Anything that may come, whether or not it was asked for."""
    job, generation, rank = draw(JOBS), draw(GENERATIONS), draw(RANKS)
    attempt, term = draw(ATTEMPTS), draw(TERMS)
    where: dict[str, Any] = {"job": job, "generation": generation}
    name = f"{job}/{generation}"
    match draw(st.integers(0, 11)):
        case 0 | 1:
            nproc = draw(st.integers(1, 4))
            return start(id=f"start/{name}", nproc=nproc, term=term, restore=draw(st.booleans()), **where)
        case 2:
            return stage(attempt, 10 * attempt, id=f"stage/{name}/{attempt}", term=term, **where)
        case 3:
            return stop(id=f"stop/{name}", term=term, **where)
        case 4 | 5:
            return ready(**where)
        case 6:
            return started(rank, **where)
        case 7:
            return exited(rank, code=draw(st.sampled_from([0, 1, -9, None])), **where)
        case 8:
            return draw(st.sampled_from([staged(rank, attempt, 10 * attempt, **where), mailbox(rank, **where)]))
        case 9:
            return uploaded(rank, attempt, **where)
        case 10:
            return RestoreReady(**where)
        case _:
            unasked: list[Input] = [Tick(), StopRequested(grace_s=1.0)]
            return draw(st.sampled_from(unasked))


def answers(action: Action) -> list[Input]:
    """What a shell may say after it performed the action."""
    match action:
        case PrepareFolders():
            return [FoldersReady(job=action.job, generation=action.generation)]
        case SpawnTrainer():
            rank: dict[str, Any] = {"job": action.job, "generation": action.generation}
            return [started(action.rank, **rank), exited(action.rank, code=1, **rank)]
        case AskStage():
            return [staged(action.rank, *unpack(action.word), job=action.job, generation=action.generation)]
        case Upload():
            where: dict[str, Any] = {"job": action.job, "generation": action.generation}
            return [uploaded(action.rank, action.request.attempt, **where)]
        case FetchRestore():
            return [RestoreReady(job=action.job, generation=action.generation)]
    return []


@dataclass
class World:
    """What the actions did, as a simple-minded shell would see it."""

    alive: set[tuple[str, int, int]] = field(default_factory=set)
    spawned: set[tuple[str, int, int]] = field(default_factory=set)
    acknowledged: set[tuple[str, int, int, int]] = field(default_factory=set)
    uploads: set[tuple[str, int, int, int]] = field(default_factory=set)
    pending: list[Input] = field(default_factory=list)


def _check(world: World, before: NodeState, fact: Input) -> NodeState:
    state, actions = step(before, fact, 0.0)
    kinds = [isinstance(action, JOURNAL_ENTRIES) for action in actions]
    assert kinds == sorted(kinds, reverse=True), "an act stands before a journal entry"
    for action in actions:
        world.pending += answers(action)
        match action:
            case SpawnTrainer():
                rank = (action.job, action.generation, action.rank)
                assert rank not in world.spawned, "a rank was spawned twice"
                assert not any(
                    job == action.job and generation != action.generation for job, generation, _ in world.alive
                ), "two generations of a job live at once"
                world.spawned.add(rank)
                world.alive.add(rank)
                assert len(world.alive) <= SLOTS, "more trainers than slots"
            case Upload():
                upload = (action.job, action.generation, action.rank, action.request.attempt)
                assert upload not in world.uploads, "a shard was uploaded twice"
                world.uploads.add(upload)
            case JournalShard():
                ack = (action.job, action.generation, action.shard.rank, action.shard.attempt)
                assert ack not in world.acknowledged, "a shard was acknowledged twice"
                assert ack in world.uploads, "a shard was acknowledged that was never uploaded"
                world.acknowledged.add(ack)
            case CleanGeneration():
                live = [rank for rank in world.alive if rank[:2] == (action.job, action.generation)]
                assert not live, "the folders of a living trainer were removed"
    if isinstance(fact, CommandReceived):
        record = next((record for record in state.commands if record.id == fact.id), None)
        assert record is not None, "a command was not answered"
        if record.stage is CommandStage.REFUSED:
            assert not any(isinstance(a, (SpawnTrainer, EndTrainers, Upload, FetchRestore)) for a in actions)
    assert state.term >= before.term
    for job, assignment in before.assignments.items():
        assert state.assignments[job].newest >= assignment.newest
    return state


def _next(world: World, drawn: Input | int) -> Input | None:
    """The next fact: one that was drawn, or an answer of the shell. None if it cannot be."""
    if isinstance(drawn, int):
        return world.pending.pop(drawn % len(world.pending)) if world.pending else None
    return drawn


def _tell(story: Sequence[Input | int]) -> World:
    world, state = World(), node_state(slots=SLOTS)
    for drawn in story:
        fact = _next(world, drawn)
        if fact is None:
            continue
        if isinstance(fact, TrainerStarted | TrainerExited):
            name = (str(fact.job), int(fact.generation), fact.rank)
            if name not in world.alive:
                continue  # no shell reports what does not live
            if isinstance(fact, TrainerExited):
                world.alive.discard(name)
        state = _check(world, state, fact)
        assert state.slots_used == len(world.alive)
    return world


STORIES = st.lists(st.one_of(facts(), st.integers(0, 30), st.integers(0, 30)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(STORIES)
def test_no_order_of_facts_breaks_a_rule(story: list[Input | int]) -> None:
    _tell(story)


def test_a_story_can_reach_what_the_rules_are_about() -> None:
    where: dict[str, Any] = {"job": "a", "generation": 1}
    # The numbers choose among the answers that are due: folders, started, staged, uploaded.
    world = _tell([start(id="start", **where), stage(1, 10, id="stage", **where), 0, 0, 3, 3])
    assert world.spawned == {("a", 1, 0), ("a", 1, 1)}
    assert world.acknowledged == world.uploads == {("a", 1, 0, 1)}
