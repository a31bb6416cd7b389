"""When an attempt that is not stored is given up: by standing still, never by being slow."""

from dtrain.coordinator.core.checkpoints import ATTEMPT_TIMEOUT_S
from dtrain.coordinator.core.facts import ShardPhase, Transfer
from tests.coordinator.test_checkpoints import aborted, training


def test_an_attempt_is_given_up_when_storage_takes_too_long_counted_from_its_step() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.passes(ATTEMPT_TIMEOUT_S * 10)
    assert cluster.decides() == [], "no rank has reached the step yet"
    cluster.trains(step=cluster.inflight().step)
    assert cluster.decides() == []
    cluster.passes(ATTEMPT_TIMEOUT_S - 1)
    assert cluster.decides() == []
    cluster.passes(1)
    assert cluster.decides() == ["CheckpointAborted"]
    assert cluster.cause("CheckpointAborted") == "timed_out"


def test_a_rank_that_never_stages_is_not_waited_for_because_its_peer_uploads() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.trains(step=cluster.inflight().step)
    cluster.shard(0, ShardPhase.STAGED)
    assert cluster.decides() == []
    for done_bytes in (1000, 2000):
        cluster.says(0, upload=Transfer(bytes_done=done_bytes, bytes_total=100_000))
        cluster.passes(ATTEMPT_TIMEOUT_S / 2)
        decided = cluster.decides()
    assert decided == ["CheckpointAborted"]
    assert "rank 1 did not stage" in aborted(cluster).reason


def test_a_rank_that_sends_again_hides_no_advance_of_its_peer() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.trains(step=cluster.inflight().step)
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.STAGED)
        cluster.says(rank, upload=Transfer(bytes_done=50_000, bytes_total=100_000))
    assert cluster.decides() == []
    cluster.says(0, upload=Transfer(bytes_done=0, bytes_total=100_000))
    for done_bytes in (51_000, 52_000, 53_000):
        cluster.passes(ATTEMPT_TIMEOUT_S - 1)
        cluster.says(1, upload=Transfer(bytes_done=done_bytes, bytes_total=100_000))
        assert cluster.decides() == []


def test_an_attempt_whose_uploads_advance_is_waited_for_however_long_it_takes() -> None:
    cluster = training()
    cluster.asks_for_checkpoint()
    cluster.trains(step=cluster.inflight().step)
    for rank in (0, 1):
        cluster.shard(rank, ShardPhase.STAGED)
    for done_bytes in range(1000, 11_000, 1000):
        cluster.says(0, upload=Transfer(bytes_done=done_bytes, bytes_total=100_000))
        assert cluster.decides() == []
        cluster.passes(ATTEMPT_TIMEOUT_S - 1)
    cluster.says(0, upload=Transfer(bytes_done=9_000, bytes_total=100_000))
    assert cluster.decides() == [], "a part is sent again: no advance, and no reason to give up yet"
    cluster.passes(1)
    assert cluster.decides() == ["CheckpointAborted"]
    assert "nothing of it for 600 s" in aborted(cluster).reason
