"""What the agent decides, as a table of stories: no process, no clock, no disk."""

import pytest

from dtrain.common.mailbox import pack
from dtrain.common.names import AttemptNumber, Generation, Term
from dtrain.worker.core.actions import (
    AskStage,
    CleanGeneration,
    DropTransfers,
    EndTrainers,
    FetchRestore,
    JournalAssignment,
    JournalCommand,
    JournalShard,
    JournalTerm,
    OpenRestore,
    PrepareFolders,
    RemoveRestore,
    SendSnapshot,
    SpawnTrainer,
    Upload,
)
from dtrain.worker.core.inputs import (
    CommandReceived,
    CoordinatorSeen,
    FoldersFailed,
    Noop,
    RestoreDamaged,
    RestoreReady,
    StopRequested,
    TermSeen,
    Tick,
    UploadFailed,
)
from dtrain.worker.core.snapshots import Phase, project
from dtrain.worker.core.states import CommandStage, ExitFact, GenerationStage, RankStage, RestoreStage, ShardStage
from dtrain.worker.rpc.convert import Identity, to_snapshot
from tests.worker.facts_of_trainers import (
    JOB,
    acts,
    command,
    exited,
    mailbox,
    node_state,
    of_kinds,
    ready,
    run,
    stage,
    staged,
    start,
    started,
    status,
    stop,
    training,
    uploaded,
)

DONE, ACCEPTED, REFUSED = CommandStage.DONE, CommandStage.ACCEPTED, CommandStage.REFUSED


# ---- commands --------------------------------------------------------------------------------------------


def test_a_noop_is_done_at_once_and_remembered() -> None:
    state, actions = run(node_state(), command(Noop(), id="n", term=3))
    assert status(state, "n")[0] is DONE
    assert [type(action) for action in actions] == [JournalTerm, JournalCommand, SendSnapshot]


@pytest.mark.parametrize(
    ("late", "says"),
    [
        (start(id="late", term=1, generation=2), ["term 1", "term 2"]),
        (stage(id="late", term=1), ["term 1", "term 2"]),
        (stop(id="late", term=1), ["term 1", "term 2"]),
        (command(Noop(), id="late", term=1), ["term 1", "term 2"]),
        (start(id="late", term=2, generation=1), ["generation 1", "generation 2"]),
        (stage(id="late", term=2, generation=1), ["generation 1", "generation 2"]),
        (stop(id="late", term=2, generation=1), ["generation 1", "generation 2"]),
        (stage(id="late", term=2, generation=3), ["generation 3 was never started here"]),
        (start(id="late", term=2, generation=3, nproc=5), ["5 trainers do not fit", "4 slots"]),
    ],
)
def test_a_command_that_comes_too_late_or_cannot_be_is_refused_and_changes_nothing(
    late: CommandReceived, says: list[str]
) -> None:
    before, _ = run(node_state(), start(generation=2, term=2), ready(generation=2))
    state, actions = run(before, late)
    refused, reason = status(state, "late")
    assert refused is REFUSED
    assert all(text in reason for text in says)
    assert acts(actions) == []
    assert state.assignments[JOB].ranks == before.assignments[JOB].ranks
    assert state.assignments[JOB].generation == 2


def test_a_command_that_was_accepted_does_nothing_again_but_is_reported_under_the_new_term() -> None:
    state, _ = run(node_state(), start())
    again, actions = run(state, start(term=2))
    assert acts(actions) == []
    assert again.assignments == state.assignments
    assert [record.term for record in again.commands] == [2]
    assert isinstance(actions[-1], SendSnapshot)


def test_the_same_decision_under_another_id_starts_nothing_twice() -> None:
    state, actions = run(training(), start(id="again"))
    assert acts(actions) == []
    assert status(state, "again")[0] is DONE


def test_a_refused_copy_does_not_undo_what_was_accepted() -> None:
    state, _ = run(training(), TermSeen(term=Term(5)), start(term=1))
    assert status(state, "start")[0] is DONE


def test_the_highest_log_position_is_kept_whatever_the_order_of_commands() -> None:
    state, _ = run(node_state(), start(seq=7), stage(seq=9), stage(2, seq=8))
    position = state.assignments[JOB].position
    assert position is not None
    assert (position.seq, position.digest) == (9, "digest of 9")


# ---- trainers --------------------------------------------------------------------------------------------


def test_trainers_are_spawned_once_their_folders_are_made_and_the_start_is_done_when_they_run() -> None:
    state, actions = run(node_state(), start())
    assert [type(action) for action in acts(actions)] == [PrepareFolders]
    state, actions = run(state, ready())
    assert [(spawn.rank, spawn.start) for spawn in of_kinds(actions, SpawnTrainer)] == [(0, True), (1, True)]
    assert status(state, "start")[0] is ACCEPTED
    state, _ = run(state, started(0), started(1))
    assert status(state, "start")[0] is DONE


def test_the_intent_to_spawn_is_in_the_journal_before_the_spawn() -> None:
    state, _ = run(node_state(), start())
    _, actions = run(state, ready())
    kinds = [type(action) for action in actions]
    assert kinds.index(JournalAssignment) < kinds.index(SpawnTrainer)
    entry = next(action for action in actions if isinstance(action, JournalAssignment))
    assert {rank.stage for rank in entry.assignment.ranks} == {RankStage.SPAWNING}


def test_a_newer_generation_waits_until_every_older_trainer_is_gone() -> None:
    state, actions = run(training(), start(id="second", generation=2), ready(generation=2))
    assert EndTrainers(job=JOB, generation=Generation(1), grace_s=0.0) in actions
    assert of_kinds(actions, SpawnTrainer) == []
    state, actions = run(state, exited(0, code=-9))
    assert of_kinds(actions, SpawnTrainer, CleanGeneration) == []
    state, actions = run(state, exited(1, code=-9))
    assert CleanGeneration(job=JOB, generation=Generation(1)) in actions
    assert {spawn.generation for spawn in of_kinds(actions, SpawnTrainer)} == {2}
    assert state.slots_used == 2


def test_the_end_of_the_old_generation_overlaps_with_the_start_of_the_new() -> None:
    """One command, one step: the old trainers are killed, the new folders made, and the state fetched meanwhile."""
    state, actions = run(training(), start(id="second", generation=2, restore=True))
    assert EndTrainers(job=JOB, generation=Generation(1), grace_s=0.0) in actions
    assert [prepare.generation for prepare in of_kinds(actions, PrepareFolders)] == [2]
    _, actions = run(state, ready(generation=2))
    assert [fetch.generation for fetch in of_kinds(actions, FetchRestore)] == [2], "it waits for the old trainers"


def test_a_start_that_does_not_fit_waits_for_free_slots() -> None:
    state, actions = run(training(slots=3), start(id="b", job="other"), ready(job="other"))
    assert of_kinds(actions, SpawnTrainer) == []
    assert status(state, "b")[0] is ACCEPTED
    state, actions = run(state, exited(0), exited(1))
    assert {spawn.job for spawn in of_kinds(actions, SpawnTrainer)} == {"other"}


def test_a_rank_that_ends_with_0_while_others_run_is_only_reported() -> None:
    state, actions = run(training(), exited(0, code=0))
    assert acts(actions) == []
    assert state.assignments[JOB].stage is GenerationStage.LIVE


def test_folders_that_cannot_be_made_are_the_ranks_exit() -> None:
    fact = ExitFact(code=None, at_unix_s=1.0, error="No space left on device")
    state, _ = run(node_state(), start(), FoldersFailed(job=JOB, generation=Generation(1), exit=fact))
    assert {rank.exit for rank in state.assignments[JOB].ranks} == {fact}
    assert status(state, "start")[0] is DONE


def test_a_stop_is_done_when_all_exits_are_facts_and_nothing_of_it_starts_again() -> None:
    state, actions = run(training(), stop(grace_s=7.0))
    assert EndTrainers(job=JOB, generation=Generation(1), grace_s=7.0) in actions
    assert project(state).phase is Phase.STOPPING
    state, _ = run(state, exited(0, code=-15))
    assert status(state, "stop")[0] is ACCEPTED
    state, actions = run(state, exited(1, code=-15))
    assert status(state, "stop")[0] is DONE
    assert CleanGeneration(job=JOB, generation=Generation(1)) in actions
    state, actions = run(state, start(id="late"))
    assert status(state, "late") == (REFUSED, "generation 1 was stopped")
    assert acts(actions) == []


def test_a_stop_of_a_generation_that_never_came_refuses_it_when_it_comes() -> None:
    state, _ = run(node_state(), stop(generation=3))
    assert status(state, "stop")[0] is DONE
    state, _ = run(state, start(id="late", generation=3))
    assert status(state, "late")[0] is REFUSED
    state, _ = run(state, start(id="newer", generation=4))
    assert status(state, "newer")[0] is ACCEPTED


def test_a_stop_before_the_spawn_means_that_nothing_is_ever_spawned() -> None:
    state, actions = run(node_state(), start(), stop(), ready())
    assert of_kinds(actions, SpawnTrainer) == []
    assert status(state, "stop")[0] is DONE


def test_without_a_coordinator_for_too_long_the_trainers_are_ended_and_it_is_said_why() -> None:
    state, actions = run(training(), Tick(), now=100.0)
    assert of_kinds(actions, EndTrainers) == []
    state, _ = run(state, CoordinatorSeen(), now=100.0)
    state, actions = run(state, Tick(), now=200.0)
    assert of_kinds(actions, EndTrainers) == []
    state, actions = run(state, Tick(), now=201.0)
    assert of_kinds(actions, EndTrainers) == [EndTrainers(job=JOB, generation=Generation(1), grace_s=0.0)]
    state, actions = run(state, Tick(), exited(0, code=-9, ended_for="it was told to end"), now=202.0)
    assert of_kinds(actions, EndTrainers) == []
    fact = state.assignments[JOB].ranks[0].exit
    assert fact is not None
    assert fact.ended_for == "its worker saw no coordinator for 101 s"
    identity = Identity(worker="w1", journal="j", incarnation="i", version="0", host="h", address="a:1")
    told = to_snapshot(project(state), identity, number=1, rendezvous_port=1).assignments[0]
    assert [rank.ended_for for rank in told.ranks] == [fact.ended_for] + [""] * (len(told.ranks) - 1), "they live yet"


def test_an_older_leaders_word_does_not_hold_the_fence_open() -> None:
    state, _ = run(training(), TermSeen(term=Term(5)), now=10.0)
    state, _ = run(state, TermSeen(term=Term(4)), now=90.0)
    assert state.coordinator_seen_at == 10.0


def test_an_agent_that_is_asked_to_leave_ends_its_trainers_and_starts_nothing_more() -> None:
    state, actions = run(training(), StopRequested(grace_s=5.0), start(id="late", job="other"))
    assert of_kinds(actions, EndTrainers) == [EndTrainers(job=JOB, generation=Generation(1), grace_s=5.0)]
    assert status(state, "late") == (REFUSED, "this worker is shutting down")


@pytest.mark.parametrize(
    ("code", "told", "ended_for"),
    [
        (0, "it was told to end", "its worker is being shut down"),
        (-9, "it was told to end", "its worker is being shut down"),
        (None, "", "its worker is being shut down"),
        (0, "", ""),
    ],
    ids=["saved its state", "had to be killed", "nobody saw it", "was done a moment before"],
)
def test_a_rank_that_ends_while_its_agent_leaves_was_told_to_unless_it_had_ended_by_itself(
    code: int | None, told: str, ended_for: str
) -> None:
    state, _ = run(training(), StopRequested(grace_s=5.0), exited(0, code=code, ended_for=told))
    fact = state.assignments[JOB].ranks[0].exit
    assert fact is not None and fact.ended_for == ended_for


# ---- checkpoints -----------------------------------------------------------------------------------------


def test_a_checkpoint_goes_from_request_to_ack_and_is_in_the_journal_before_it_is_told() -> None:
    state, actions = run(training(), stage())
    assert of_kinds(actions, AskStage) == [
        AskStage(job=JOB, generation=Generation(1), rank=rank, word=pack(1, 10)) for rank in (0, 1)
    ]
    state, actions = run(state, staged(0), staged(1))
    assert [(upload.rank, upload.slot, upload.size_bytes) for upload in of_kinds(actions, Upload)] == [
        (0, 1, 100),
        (1, 1, 100),
    ]
    assert project(state).phase is Phase.CHECKPOINTING
    state, actions = run(state, uploaded(0))
    assert [type(action) for action in actions] == [JournalShard, SendSnapshot]
    assert status(state, "stage 1")[0] is ACCEPTED
    state, _ = run(state, uploaded(1))
    assert status(state, "stage 1")[0] is DONE
    assert [shard.digest for shard in state.assignments[JOB].shards] == ["digest of 0", "digest of 1"]


def test_seeing_the_same_staged_word_again_uploads_nothing_twice() -> None:
    state, _ = run(training(), stage(), staged(0))
    state, actions = run(state, staged(0), uploaded(0), staged(0), uploaded(0))
    assert of_kinds(actions, Upload) == []
    assert len(of_kinds(actions, JournalShard)) == 1


@pytest.mark.parametrize("attempt", [1, 2])
def test_an_attempt_not_newer_than_the_last_does_nothing_new(attempt: int) -> None:
    state, _ = run(training(), stage(2))
    state, actions = run(state, stage(attempt, id="again"))
    assert acts(actions) == []
    assert {shard.attempt for shard in state.assignments[JOB].shards} == {2}


def test_an_answer_to_an_overtaken_attempt_changes_nothing() -> None:
    state, _ = run(training(), stage(1), staged(0), stage(2, at_step=20))
    state, actions = run(state, uploaded(0, 1), staged(0, 1))
    assert of_kinds(actions, JournalShard, Upload) == []
    assert {shard.stage for shard in state.assignments[JOB].shards} == {ShardStage.REQUESTED}
    assert status(state, "stage 1")[0] is DONE


def test_a_missed_step_and_a_failed_staging_are_told() -> None:
    state, _ = run(
        training(),
        stage(),
        mailbox(0, missed=pack(1, 10)),
        mailbox(1, stage_failed=pack(1, 10), error="TypeError: x"),
    )
    shards = state.assignments[JOB].shards
    assert [(shard.stage, shard.reason) for shard in shards] == [
        (ShardStage.MISSED, ""),
        (ShardStage.FAILED, "TypeError: x"),
    ]
    assert status(state, "stage 1")[0] is DONE


def test_an_upload_that_failed_is_told_with_its_reason() -> None:
    failed = UploadFailed(job=JOB, generation=Generation(1), rank=0, attempt=AttemptNumber(1), reason="storage is full")
    state, _ = run(training(), stage(), staged(0), failed)
    assert state.assignments[JOB].shards[0].reason == "storage is full"


def test_bytes_staged_before_the_exit_are_uploaded_and_only_then_the_folders_go() -> None:
    state, actions = run(training(), stage(), staged(0), exited(0), exited(1))
    assert of_kinds(actions, CleanGeneration) == []
    assert [shard.stage for shard in state.assignments[JOB].shards] == [ShardStage.STAGED, ShardStage.FAILED]
    state, actions = run(state, uploaded(0))
    assert state.assignments[JOB].shards[0].stage is ShardStage.DURABLE
    assert CleanGeneration(job=JOB, generation=Generation(1)) in actions


def test_a_trainer_that_runs_later_is_asked_then() -> None:
    state, actions = run(node_state(), start(), ready(), stage())
    assert of_kinds(actions, AskStage) == []
    _, actions = run(state, started(1))
    assert [ask.rank for ask in of_kinds(actions, AskStage)] == [1]


def test_mere_progress_waits_for_the_heartbeat_and_a_new_phase_does_not() -> None:
    state, _ = run(training(), mailbox(0))
    state, actions = run(state, mailbox(0, completed_step=2))
    assert actions == []
    _, actions = run(state, mailbox(0, completed_step=2, phase="checkpointing"))
    assert actions == [SendSnapshot()]


# ---- leaving -------------------------------------------------------------------------------------------------


def test_a_job_that_is_stopped_is_not_the_end_of_the_agent() -> None:
    """Who looks at another job of this node must not take it for preempted."""
    state, _ = run(training(), stop())
    said = project(state)
    assert (said.phase, said.leaving) == (Phase.STOPPING, False)
    state, _ = run(state, StopRequested(grace_s=5.0))
    assert project(state).leaving


# ---- restores --------------------------------------------------------------------------------------------


def test_a_restore_is_fetched_while_trainers_start_and_opened_to_each_that_runs() -> None:
    state, actions = run(node_state(), start(restore=True), ready(), started(0))
    assert len(of_kinds(actions, FetchRestore)) == 1
    state, actions = run(state, RestoreReady(job=JOB, generation=Generation(1)))
    assert [opened.rank for opened in of_kinds(actions, OpenRestore)] == [0]
    _, actions = run(state, started(1))
    assert [opened.rank for opened in of_kinds(actions, OpenRestore)] == [1]


def test_what_was_brought_is_taken_back_from_each_rank_that_has_read_it() -> None:
    """From the one that was told as soon as it trains, from the one that did not wait for the word with the word."""
    state, _ = run(node_state(), start(restore=True), ready(), started(0), started(1), mailbox(0, phase="restoring"))
    state, actions = run(state, mailbox(1, phase="training"))
    assert of_kinds(actions, RemoveRestore) == [], "another may still need it"
    state, actions = run(state, RestoreReady(job=JOB, generation=Generation(1)))
    assert [removed.rank for removed in of_kinds(actions, RemoveRestore)] == [1]
    _, actions = run(state, mailbox(0, phase="training"))
    assert [removed.rank for removed in of_kinds(actions, RemoveRestore)] == [0]


def test_a_damaged_checkpoint_is_told_and_nothing_else_is_decided() -> None:
    damaged = RestoreDamaged(job=JOB, generation=Generation(1), key="blob", reason="is missing")
    state, actions = run(node_state(), start(restore=True), ready(), damaged)
    assert state.assignments[JOB].restore.stage is RestoreStage.DAMAGED
    assert of_kinds(actions, OpenRestore, EndTrainers) == []


def test_a_newer_generation_gives_up_the_transfers_of_the_older() -> None:
    _, actions = run(training(), start(id="second", generation=2))
    assert DropTransfers(job=JOB, generation=Generation(1)) in actions
