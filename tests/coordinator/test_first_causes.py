"""Who failed first, whatever the order in which the ends are reported, and how long that may take to say."""

import itertools

import pytest

from dtrain.coordinator.core.events import FailureKind
from dtrain.coordinator.core.facts import RankState
from dtrain.coordinator.core.first_causes import FIRST_CAUSE_WAIT_S, VICTIMS_MAX
from dtrain.coordinator.core.restarts import BACKOFF_FIRST_S
from dtrain.coordinator.core.states import JobPhase
from tests.coordinator.support.clusters import Cluster, spec
from tests.coordinator.support.endings import failed

RESTARTED = ["GenerationFailed", "GenerationStarted"]
LOST = "RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:29500"
NOT_JOINED = "PermanentError: rank 1 could not join the process group of 4 within 600 s"
TRACE = 'Traceback (most recent call last):\n  File "train.py", line 7, in <module>\nValueError: no such sample'


def two_nodes(*, step: int = 5) -> Cluster:
    """Ranks 0 and 1 on w1, ranks 2 and 3 on w2."""
    cluster = Cluster()
    cluster.joins("w1", "w2")
    cluster.runs(spec(nnodes_min=2, nnodes_max=2), step=step)
    return cluster


def ends(cluster: Cluster, rank: int) -> None:
    """Rank 2 raises; its peers lose their connections, and by their nodes' clocks some of them before."""
    match rank:
        case 2:
            cluster.exits(2, 1, error="ValueError: no such sample", at_s=50.1, traceback=TRACE)
        case 0:
            cluster.exits(0, 1, error=LOST, at_s=50.0)
        case _:
            cluster.exits(rank, -6, error="Watchdog caught collective operation timeout", at_s=50.2 + rank)


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))), ids=str)
def test_the_first_cause_is_named_in_whatever_order_the_ends_are_reported(order: tuple[int, ...]) -> None:
    cluster = two_nodes()
    for rank in order:
        ends(cluster, rank)
        decided = cluster.decides()
        if rank == 2:
            assert decided == RESTARTED, "an exception of its own is a cause: there is nothing to wait for"
            break
        assert decided == [], "a lost connection alone decided before its cause could be reported"
    event = failed(cluster)
    assert event.reason == "rank 2 on w2 exited with code 1: ValueError: no such sample"
    assert (event.kind, event.step, event.counted) == (FailureKind.SCRIPT, 5, True)
    assert [victim.rank for victim in event.victims] == sorted(order[: order.index(2)])
    record = next(record for record, _ in cluster.log if record.type == "GenerationFailed")
    assert (record.cause.rank, record.cause.traceback) == (2, TRACE)


def test_a_kill_decides_at_once_and_lists_the_victims_known_by_then() -> None:
    cluster = two_nodes()
    cluster.exits(0, 1, error=LOST, at_s=50.2)
    cluster.exits(3, -9, error="the last thing it printed", at_s=50.1)
    assert cluster.decides() == RESTARTED
    assert failed(cluster).reason == "rank 3 on w2 was ended by signal 9"
    assert failed(cluster).kind is FailureKind.KILLED
    assert [(v.rank, v.worker, v.exit_code, v.error) for v in failed(cluster).victims] == [(0, "w1", 1, LOST)]


def test_lost_connections_without_a_cause_decide_after_a_bounded_moment() -> None:
    cluster = two_nodes()
    cluster.exits(1, 1, error=LOST, at_s=50.1)
    assert cluster.decides() == []
    cluster.passes(FIRST_CAUSE_WAIT_S - 0.1)
    cluster.exits(3, 1, error="torch.distributed.DistNetworkError: failed to recv, got 0 bytes", at_s=50.2)
    assert cluster.decides() == [], "a second victim began the wait anew or ended it"
    cluster.passes(0.1)
    assert cluster.decides() == RESTARTED
    assert (failed(cluster).kind, failed(cluster).counted) == (FailureKind.CONNECTION, True)
    assert failed(cluster).reason.startswith("rank 1 on w1 exited with code 1")
    assert [victim.rank for victim in failed(cluster).victims] == [3]


def test_nothing_is_waited_for_once_every_rank_has_ended() -> None:
    cluster = two_nodes()
    cluster.exits(0, 0)
    for rank in (1, 2, 3):
        cluster.exits(rank, 1, error=LOST, at_s=50.0 + rank)
    assert cluster.decides() == RESTARTED
    assert [victim.rank for victim in failed(cluster).victims] == [2, 3]


def test_peers_of_a_worker_that_cannot_be_reached_are_its_victims() -> None:
    cluster = two_nodes()
    cluster.loses("w2")
    for rank in (0, 1):
        cluster.exits(rank, 1, error=LOST, at_s=50.0)
    assert cluster.decides() == []
    cluster.passes(FIRST_CAUSE_WAIT_S)
    assert cluster.decides() == ["GenerationFailed"]
    event = failed(cluster)
    assert event.reason == "worker w2 cannot be reached, and its peers lost their connections"
    assert (event.kind, event.counted) == (FailureKind.NODE, False)
    assert [victim.rank for victim in event.victims] == [0, 1]


def test_ranks_that_their_worker_fenced_were_preempted_though_a_signal_ended_them() -> None:
    cluster = two_nodes()
    cluster.exits(0, 1, error=LOST, at_s=50.0)
    cluster.exits(3, -9, error="epoch 3", at_s=50.1, ended_for="its worker saw no coordinator for 101 s")
    assert "GenerationFailed" in cluster.decides()
    assert (failed(cluster).kind, failed(cluster).counted) == (FailureKind.PREEMPTED, False)
    assert failed(cluster).reason == "rank 3 on w2 was ended by its node: its worker saw no coordinator for 101 s"


def test_ranks_of_a_worker_that_is_shut_down_were_preempted() -> None:
    cluster = two_nodes()
    cluster.nodes["w2"].leaving = True
    cluster.exits(0, 1, error=LOST, at_s=50.0)
    cluster.exits(3, 143, error="caught SIGTERM", at_s=50.1)
    assert "GenerationFailed" in cluster.decides()
    assert failed(cluster).kind is FailureKind.PREEMPTED


@pytest.mark.parametrize(
    ("code", "error", "kind"),
    [
        (1, "KeyError: 'x'", FailureKind.SCRIPT),
        (-11, "Segmentation fault", FailureKind.SCRIPT),
        (-6, "terminate called after throwing an instance of std::bad_alloc", FailureKind.SCRIPT),
        (-6, "Connection reset by peer", FailureKind.CONNECTION),
        (-9, "Connection reset by peer", FailureKind.KILLED),
        (-15, "", FailureKind.KILLED),
        (137, "", FailureKind.KILLED),
        (1, "BrokenPipeError: [Errno 32] Broken pipe", FailureKind.CONNECTION),
        (1, f"{NOT_JOINED}: Wait timeout", FailureKind.CONNECTION),
        (1, f"{NOT_JOINED}: wait timeout after 600000ms, keys: /default_pg/0//cpu//0/0", FailureKind.CONNECTION),
        (
            1,
            f"{NOT_JOINED}: Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
            FailureKind.CONNECTION,
        ),
        (
            1,
            f"{NOT_JOINED}: Gloo connectFullMesh failed with [pair.h:311] Connect timeout [none]",
            FailureKind.CONNECTION,
        ),
        (1, f"{NOT_JOINED}: rank 0 does not listen at 10.0.0.1:29500", FailureKind.CONNECTION),
        (1, f"{NOT_JOINED}: rank 0 cannot listen on port 29500: [Errno 98] Address in use", FailureKind.SCRIPT),
        (1, "OperationalError: (1205, 'Lock wait timeout exceeded')", FailureKind.SCRIPT),
        (1, "RuntimeError: [pair.cc:598] Application timeout caused pair closure", FailureKind.CONNECTION),
    ],
)
def test_an_end_is_of_the_kind_that_its_code_and_words_say(code: int, error: str, kind: FailureKind) -> None:
    cluster = two_nodes()
    cluster.exits(0, code, error=error, at_s=50.0)
    cluster.decides()
    cluster.passes(FIRST_CAUSE_WAIT_S)
    cluster.decides()
    assert failed(cluster).kind is kind


def test_a_rank_that_waited_in_vain_for_its_peers_start_is_not_the_scripts_bug() -> None:
    cluster = two_nodes(step=0)
    for _ in range(2):
        cluster.exits(0, 1, error=f"{NOT_JOINED}: Wait timeout", at_s=50.0)
        cluster.decides()
        cluster.passes(FIRST_CAUSE_WAIT_S)
        assert cluster.decides()[0] == "GenerationFailed"
        assert failed(cluster).kind is FailureKind.CONNECTION
        cluster.passes(BACKOFF_FIRST_S)
        cluster.decides()
        assert cluster.job().phase is JobPhase.RUNNING, "the same words twice ended the job"
        cluster.starts()


KNOWN = "its process held 812 MiB at most, and the limit of the control group /job is 1024 MiB"


@pytest.mark.parametrize("code", [-9, 137])
def test_a_kill_for_want_of_memory_is_told_from_every_other(code: int) -> None:
    cluster = two_nodes()
    cluster.says(0, state=RankState.EXITED, exit_code=code, out_of_memory=KNOWN, exited_at=50.0)
    cluster.exits(3, 1, error=LOST, at_s=50.1)
    assert "GenerationFailed" in cluster.decides()
    event = failed(cluster)
    assert (event.kind, event.exit_code) == (FailureKind.MEMORY, 137)
    if code == -9:
        assert event.reason == f"rank 0 on w1 was killed by the kernel, which was out of memory: {KNOWN}"


def test_the_kill_of_a_process_beside_the_rank_is_told_with_the_ranks_own_words() -> None:
    cluster = two_nodes()
    error = "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed."
    cluster.says(0, state=RankState.EXITED, exit_code=1, error=error, out_of_memory=KNOWN, exited_at=50.0)
    assert "GenerationFailed" in cluster.decides()
    assert failed(cluster).kind is FailureKind.SCRIPT
    beside = "(just then the kernel, out of memory, killed a process beside it)"
    assert failed(cluster).reason == f"rank 0 on w1 exited with code 1: {error} {beside}"


def test_an_event_holds_a_bounded_number_of_victims() -> None:
    cluster = Cluster()
    world = VICTIMS_MAX + 8
    cluster.joins("w1", slots=world)
    cluster.runs(spec(nproc_per_node=world), step=5)
    for rank in range(world):
        cluster.exits(rank, 1, error=LOST, at_s=50.0 + rank)
    assert cluster.decides() == RESTARTED
    assert [victim.rank for victim in failed(cluster).victims] == list(range(1, VICTIMS_MAX + 1))
