"""When a generation starts, on which workers, why it fails, and when its job may not go on."""

from dtrain.coordinator.core.events import FailureKind, GenerationStarted
from dtrain.coordinator.core.facts import RestorePhase, StreamClosed, WorkerUnregistered
from dtrain.coordinator.core.observed import LOST_AFTER_S
from dtrain.coordinator.core.placement import GATHER_S, waiting_for
from dtrain.coordinator.core.states import JobPhase
from tests.coordinator.support.clusters import Cluster, spec
from tests.coordinator.support.endings import failed

RESTARTED = ["GenerationFailed", "GenerationStarted"]


def started(cluster: Cluster) -> GenerationStarted:
    event = cluster.last("GenerationStarted")
    assert isinstance(event, GenerationStarted)
    return event


def test_a_job_waits_for_its_workers_and_starts_when_they_are_there() -> None:
    cluster = Cluster()
    cluster.submits(spec(nnodes_min=2, nnodes_max=2))
    cluster.joins("w1")
    assert cluster.decides() == []
    words = waiting_for(cluster.job(), cluster.observed, cluster.jobs, cluster.now)
    assert words == "2 worker(s) with 2 free slot(s) each; 1 there"
    cluster.joins("w2")
    assert cluster.decides() == ["GenerationStarted"]
    event = started(cluster)
    assert [(m.worker, list(m.ranks)) for m in event.members] == [("w1", [0, 1]), ("w2", [2, 3])]
    assert event.world_size == 4
    assert event.master_address == "w1.example"


def test_a_generation_on_one_node_meets_on_loopback() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs()
    assert started(cluster).master_address == "127.0.0.1"


def test_an_elastic_job_gathers_more_workers_for_a_moment_and_then_starts_with_those_there() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.submits(spec(nnodes_min=1, nnodes_max=4))
    assert cluster.decides() == []
    cluster.joins("w2")
    cluster.passes(GATHER_S / 2)
    assert cluster.decides() == []
    cluster.passes(GATHER_S / 2)
    assert cluster.decides() == ["GenerationStarted"]
    assert started(cluster).world_size == 4


def test_an_elastic_job_starts_at_once_when_it_has_all_it_may_have() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2", "w3", "w4")
    cluster.submits(spec(nnodes_min=1, nnodes_max=4))
    assert cluster.decides() == ["GenerationStarted"]


def test_a_job_that_was_cancelled_while_it_waited_gathers_anew_in_its_next_run() -> None:
    cluster = Cluster()
    cluster.submits(spec(nnodes_min=2, nnodes_max=3))
    cluster.joins("w1")
    assert cluster.decides() == []
    cluster.cancels()
    assert cluster.decides() == ["JobCancelled"]
    cluster.passes(GATHER_S * 2)
    cluster.joins("w2")
    cluster.submits(spec(nnodes_min=2, nnodes_max=3), request="r2")
    assert cluster.decides() == [], "the wait of the run before counted for this one"
    cluster.passes(GATHER_S)
    assert cluster.decides() == ["GenerationStarted"]


def test_two_jobs_share_the_slots_of_a_worker_and_never_the_same_slot() -> None:
    cluster = Cluster()
    cluster.joins("w1", slots=4)
    for name in ("a", "b", "c"):
        cluster.submits(spec(name))
    assert cluster.decides() == ["GenerationStarted"]
    assert cluster.decides() == [], "the port that w1 holds ready is a's"
    cluster.starts("a")
    assert cluster.decides() == ["GenerationStarted"]
    assert cluster.generation("a").master_port != cluster.generation("b").master_port
    assert cluster.job("c").phase is JobPhase.PENDING
    cluster.starts("b")
    cluster.finish("a")
    assert cluster.decides() == ["JobSucceeded", "GenerationStarted"]
    assert cluster.job("c").phase is JobPhase.RUNNING


def test_two_jobs_that_start_at_once_on_the_same_workers_meet_at_different_ports() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2", slots=4)
    for name in ("a", "b", "c"):
        cluster.submits(spec(name, nnodes_min=2, nnodes_max=2))
    assert cluster.decides() == ["GenerationStarted", "GenerationStarted"]
    masters = [cluster.generation(name).members[0].worker for name in ("a", "b")]
    assert masters == ["w1", "w2"], "the second has its rank 0 where a port is free"
    assert cluster.decides() == [] and cluster.job("c").phase is JobPhase.PENDING


def test_a_worker_that_is_about_to_leave_gets_nothing_to_run() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec("a", nnodes_max=1), step=10)
    cluster.nodes["w1"].leaving = True
    cluster.exits(0, 143, name="a")
    assert cluster.decides() == RESTARTED
    assert [member.worker for member in cluster.generation("a").members] == ["w2"]
    cluster.submits(spec("b"))
    assert cluster.decides() == [], "it waits for another"


def test_a_refusal_of_a_worker_that_leaves_is_nobodys_fault() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.submits(spec(nnodes_max=1))
    assert cluster.decides() == ["GenerationStarted"]
    cluster.nodes["w1"].leaving = True
    cluster.answers("w1", "mnist/g1/start", "refused", reason="this worker is shutting down")
    assert cluster.decides() == RESTARTED
    assert (failed(cluster).counted, failed(cluster).kind) == (False, FailureKind.PREEMPTED)


def test_a_slot_counts_as_taken_while_an_ended_job_still_runs_in_it() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec("a", nnodes_max=1))
    cluster.loses("w1")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == RESTARTED  # a goes on, on w2
    cluster.registers("w1")
    cluster.connects("w1")  # and still runs the trainers of the old generation
    cluster.submits(spec("b"))
    assert cluster.decides() == []
    for rank in list(cluster.nodes["w1"].held["a"].ranks):
        held = cluster.nodes["w1"].held["a"].ranks
        held.pop(rank)
    cluster.reports("w1")
    assert cluster.decides() == ["GenerationStarted"]


def test_a_worker_without_a_lease_or_without_a_stream_gets_nothing() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.tells(WorkerUnregistered(worker=cluster.nodes["w1"].name))
    cluster.tells(StreamClosed(worker=cluster.nodes["w2"].name, stream=cluster.nodes["w2"].stream))
    cluster.submits()
    assert cluster.decides() == []


def test_a_failed_rank_ends_the_generation_and_the_next_starts_in_the_same_round_from_the_newest_checkpoint() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=10)
    cluster.commits()
    cluster.trains(step=20)
    cluster.commits()
    cluster.asks_for_checkpoint()
    cluster.acknowledges(0)
    cluster.exits(1, -9)
    assert cluster.decides() == ["CheckpointAborted", *RESTARTED]
    assert failed(cluster).reason == "rank 1 on w1 was ended by signal 9"
    assert failed(cluster).exit_code == 137
    assert not failed(cluster).counted, "it had got further than ever, and the script did nothing wrong"
    event = started(cluster)
    assert event.generation == 2
    assert event.restore is not None and event.restore.checkpoint == 2
    assert event.restore == cluster.job().committed[event.restore.checkpoint].restore_point


def test_the_failure_that_was_first_by_time_is_named_whatever_the_order_of_reports() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec(nnodes_min=2, nnodes_max=2), step=5)
    cluster.exits(0, 1, error="Connection reset by peer", at_s=50.2)
    cluster.exits(3, 1, error="CUDA out of memory", at_s=50.1)
    cluster.exits(1, -6, at_s=50.3)
    assert cluster.decides() == RESTARTED
    assert failed(cluster).reason == "rank 3 on w2 exited with code 1: CUDA out of memory"


def test_a_report_on_an_older_generation_fails_nothing() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    cluster.exits(0, 1)
    assert cluster.decides() == RESTARTED
    cluster.reports("w1")  # it has not taken the new start command yet
    assert cluster.decides() == []
    assert cluster.generation().number == 2


def test_a_worker_is_lost_only_when_lease_and_stream_have_been_gone_for_a_while() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(step=5)
    node = cluster.nodes["w1"]
    cluster.tells(StreamClosed(worker=node.name, stream=node.stream))
    cluster.passes(LOST_AFTER_S * 10)
    assert cluster.decides() == [], "its lease is alive"
    cluster.reports("w2")
    cluster.tells(WorkerUnregistered(worker=node.name))
    cluster.passes(LOST_AFTER_S - 0.1)
    assert cluster.decides() == []
    cluster.passes(0.1)
    assert cluster.decides() == RESTARTED
    assert not failed(cluster).counted, "a lost machine is not the script's fault"
    assert [member.worker for member in started(cluster).members] == ["w2"]


def test_a_worker_that_comes_back_in_time_costs_nothing() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    cluster.loses("w1")
    cluster.passes(LOST_AFTER_S - 0.1)
    assert cluster.decides() == []
    cluster.connects("w1")
    cluster.passes(LOST_AFTER_S)
    assert cluster.decides() == []


def test_the_closing_of_an_older_stream_does_not_disconnect_a_worker_with_a_newer_one() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    node = cluster.nodes["w1"]
    older = node.stream
    cluster.connects("w1")
    cluster.tells(StreamClosed(worker=node.name, stream=older))
    cluster.tells(WorkerUnregistered(worker=node.name))
    cluster.passes(LOST_AFTER_S * 2)
    assert cluster.decides() == []


def test_a_worker_that_comes_back_with_a_new_journal_has_lost_its_ranks() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=5)
    node = cluster.nodes["w1"]
    node.journal, node.incarnation, node.number, node.held = "another journal", "second", 0, {}
    cluster.registers("w1")
    cluster.connects("w1")
    assert cluster.decides() == RESTARTED
    assert cluster.cause("GenerationFailed") == "journal_replaced"
    assert started(cluster).members[0].journal == "another journal"


def test_lost_workers_and_damaged_checkpoints_use_no_restarts() -> None:
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec(max_restarts=0), step=5)
    for worker, other in (("w1", "w2"), ("w2", "w1")):
        cluster.loses(worker)
        cluster.passes(LOST_AFTER_S)
        assert cluster.decides() == RESTARTED
        assert started(cluster).members[0].worker == other
        cluster.starts()
        cluster.nodes[worker].held.clear()
        cluster.registers(worker)
        cluster.connects(worker)
    assert cluster.job().restarts == 2
    assert cluster.job().restarts_used == 0


def test_a_refused_start_fails_the_generation_if_it_answers_this_leader() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.submits()
    cluster.decides()
    cluster.answers("w1", "mnist/g1/start", "refused", reason="told of a newer one")
    assert cluster.decides() == RESTARTED
    assert cluster.cause("GenerationFailed") == "command_refused"


def test_a_refusal_to_a_leader_of_an_older_term_says_nothing() -> None:
    cluster = Cluster(term=7)
    cluster.joins("w1")
    cluster.submits()
    cluster.decides()
    cluster.answers("w1", "mnist/g1/start", "refused", term=6)
    assert cluster.decides() == []
    assert [command.id for command in cluster.commands("w1")] == ["mnist/g1/start"]


def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_taken() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=10)
    cluster.commits()
    cluster.trains(step=20)
    cluster.commits()
    cluster.exits(0, -9)
    assert cluster.decides() == RESTARTED
    cluster.starts()
    cluster.restore_is(RestorePhase.DAMAGED, worker="w1", reason="a bit is flipped")
    assert cluster.decides() == ["CheckpointQuarantined", *RESTARTED]
    assert not failed(cluster).counted
    assert cluster.job().committed[max(cluster.job().committed)].quarantined == "the blob: a bit is flipped"
    restore = started(cluster).restore
    assert restore is not None and restore.checkpoint == 1
    cluster.starts()
    cluster.restore_is(RestorePhase.DAMAGED, worker="w1", reason="gone")
    assert cluster.decides() == ["CheckpointQuarantined", *RESTARTED]
    assert started(cluster).restore is None, "with no sound checkpoint left it starts from step 0"


def test_a_quarantined_checkpoint_keeps_its_number() -> None:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(step=10)
    cluster.commits()
    cluster.exits(0, -9)
    cluster.decides()
    cluster.starts()
    cluster.restore_is(RestorePhase.DAMAGED, worker="w1", reason="gone")
    cluster.decides()
    cluster.starts()
    cluster.trains(step=10)
    cluster.commits()
    assert sorted(cluster.job().committed) == [1, 2]
    assert cluster.job().committed[max(cluster.job().committed)].attempt == 2
