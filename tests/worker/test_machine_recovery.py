"""What a restarted agent decides, and what becomes of stage slots: no process, no clock, no disk."""

from dataclasses import replace

from dtrain.common.names import Generation
from dtrain.worker.core.actions import (
    AskStage,
    CleanGeneration,
    EndTrainers,
    FetchRestore,
    RemoveArena,
    SpawnTrainer,
)
from dtrain.worker.core.inputs import (
    Tick,
)
from dtrain.worker.core.machine import recover, step
from dtrain.worker.core.states import CommandStage
from tests.worker.facts_of_trainers import (
    JOB,
    exited,
    node_state,
    of_kinds,
    ready,
    run,
    stage,
    start,
    stop,
    training,
)

DONE, ACCEPTED, REFUSED = CommandStage.DONE, CommandStage.ACCEPTED, CommandStage.REFUSED


def test_recovery_asks_again_for_what_the_journal_cannot_know() -> None:
    state, _ = run(node_state(), start(restore=True), ready())
    _, actions = recover(state, 0.0)
    assert [spawn.rank for spawn in of_kinds(list(actions), SpawnTrainer)] == [0, 1]
    assert len(of_kinds(list(actions), FetchRestore)) == 1


def test_recovery_never_starts_what_is_being_ended() -> None:
    state, _ = run(node_state(), start(), ready(), stop())
    _, actions = recover(state, 0.0)
    assert {spawn.start for spawn in of_kinds(list(actions), SpawnTrainer)} == {False}
    assert EndTrainers(job=JOB, generation=Generation(1), grace_s=5.0) in actions


def test_recovery_never_starts_a_rank_that_has_ended_because_its_shard_is_not_stored_yet() -> None:
    state, _ = run(training(), stage(), exited(1, code=None))
    _, actions = recover(state, 0.0)
    assert not [spawn for spawn in of_kinds(list(actions), SpawnTrainer) if spawn.rank == 1 and spawn.start]


def test_a_step_does_not_change_the_state_that_it_was_given() -> None:
    before = training()
    copy = dict(before.assignments)
    step(before, stop(), 0.0)
    assert before.assignments == copy


def test_stage_slots_are_given_back_when_the_job_leaves_and_not_between_generations() -> None:
    state, actions = run(training(), stop(id="wait", grace_s=0.0, keep=True), exited(0), exited(1))
    assert of_kinds(actions, CleanGeneration) and not of_kinds(actions, RemoveArena)
    state, actions = run(state, stop(id="leave", grace_s=0.0))
    assert of_kinds(actions, RemoveArena) == [RemoveArena(job=JOB)]
    _, actions = run(state, stop(id="again", grace_s=0.0), Tick())
    assert of_kinds(actions, RemoveArena) == [], "once"


def test_stage_slots_stay_while_a_trainer_may_write_into_them() -> None:
    state, actions = run(training(), stop(grace_s=0.0), exited(0))
    assert not of_kinds(actions, RemoveArena)
    state, actions = run(state, exited(1))
    assert of_kinds(actions, RemoveArena) == [RemoveArena(job=JOB)]


def test_a_restarted_agent_gives_back_what_its_predecessor_meant_to() -> None:
    state, _ = run(training(), stop(grace_s=0.0), exited(0), exited(1))
    (assignment,) = state.assignments.values()
    loaded = replace(state, assignments={JOB: replace(assignment, arena_gone=False)})  # no journal holds it
    _, actions = recover(loaded, 0.0)
    assert of_kinds(actions, RemoveArena) == [RemoveArena(job=JOB)]


def test_the_committed_attempt_comes_with_the_request_to_stage() -> None:
    committed = replace(stage(2).body, request=replace(stage(2).body.request, committed_attempt=1))
    _, actions = run(training(), replace(stage(2), body=committed))
    assert [ask.committed_attempt for ask in of_kinds(actions, AskStage)] == [1, 1]
