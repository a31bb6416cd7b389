"""Which checkpoint an attempt builds upon, which packs it may name, and when packs go."""

from dataclasses import replace

import pytest

from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.common.packs import Pack, packs_prefix
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator.core import admissions, packs
from dtrain.coordinator.core.commands import StageCheckpoint, commands_for
from dtrain.coordinator.core.effects import DeleteAttempt, DeletePacks
from dtrain.coordinator.core.events import CheckpointAborted, CheckpointStarted, PacksExpired
from dtrain.coordinator.core.facts import PacksGone, QuarantineAsked, ShardPhase
from tests.coordinator.support.clusters import DIGEST, JOB, Cluster, spec

MNIST = JobName(JOB)


def pack_of(attempt: int, rank: int = 0) -> Pack:
    return Pack(key=f"{packs_prefix(JOB, attempt)}rank-{rank:05d}-0f.bin", size_bytes=100, digest=DIGEST)


def running(*, keep_last: int = 0) -> Cluster:
    cluster = Cluster()
    cluster.joins("w1")
    cluster.runs(spec(retention=RetentionPolicy(keep_last=keep_last)), step=10)
    return cluster


def acknowledges(cluster: Cluster, *named: Pack) -> None:
    """Both ranks' shards are durable; rank 0's names these packs."""
    for rank in range(2):
        cluster.shard(rank, ShardPhase.DURABLE)
        held = cluster.nodes["w1"].held[JOB]
        attempt = cluster.inflight().attempt
        report = replace(held.shards[attempt, rank], index_key=f"index-{rank}", index_digest=DIGEST)
        held.shards[attempt, rank] = replace(report, packs=tuple(sorted(named)) if rank == 0 else ())
    cluster.reports("w1")


def commits(cluster: Cluster, *named: Pack) -> int:
    """A checkpoint whose rank 0 names these packs, marked, and what follows from it. Return its number."""
    cluster.trains(step=10 * (cluster.job().last_attempt + 2))
    cluster.asks_for_checkpoint()
    acknowledges(cluster, *named)
    cluster.manifest_written()
    assert cluster.decides()[:1] == ["CheckpointCommitted"]
    number = max(cluster.job().committed)
    cluster.marker_written(number)
    cluster.decides()
    return number


def started(cluster: Cluster) -> CheckpointStarted:
    event = cluster.last("CheckpointStarted")
    assert isinstance(event, CheckpointStarted)
    return event


def quarantine(cluster: Cluster, number: int, key: str) -> None:
    asked = QuarantineAsked(job=MNIST, checkpoint=CheckpointNumber(number), key=key, reason="bit")
    cluster._admits(MNIST, admissions.quarantine(asked, cluster.jobs))


def test_an_attempt_builds_upon_the_newest_sound_checkpoint_and_its_worker_is_told() -> None:
    cluster = running()
    commits(cluster)
    assert started(cluster).base == 0
    commits(cluster, pack_of(2))
    assert started(cluster).base == 1
    cluster.trains(step=60)
    cluster.asks_for_checkpoint()
    assert started(cluster).base == 2
    for leader in (cluster, cluster.fails_over()):
        leader.reconnect()
        view = leader.observed.view(leader.nodes["w1"].name)
        [stage] = [c for c in commands_for(leader.job(), view, leader.term) if isinstance(c, StageCheckpoint)]
        assert [(base.rank, base.index_key) for base in stage.bases] == [(0, "index-0"), (1, "index-1")]


def test_a_checkpoint_in_another_store_is_no_base() -> None:
    cluster = running()
    commits(cluster)
    job = cluster.job()
    assert packs.base_for_next(job) == 1
    assert packs.base_for_next(replace(job, spec=replace(job.spec, store="s3://other"))) == 0


@pytest.mark.parametrize(
    "foreign",
    [pack_of(1), pack_of(4), replace(pack_of(2), size_bytes=99), Pack(key="p", size_bytes=1, digest=DIGEST)],
    ids=["never named", "of the future", "of another size", "anywhere"],
)
def test_an_attempt_that_names_another_pack_than_its_own_and_its_bases_is_aborted(foreign: Pack) -> None:
    cluster = running()
    commits(cluster)
    commits(cluster, pack_of(2))
    cluster.trains(step=60)
    cluster.asks_for_checkpoint()
    acknowledges(cluster, pack_of(2), foreign)
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointAborted"]
    event = cluster.last("CheckpointAborted")
    assert isinstance(event, CheckpointAborted) and foreign.key in event.reason
    commits(cluster, pack_of(2), pack_of(4))


def test_an_attempt_whose_base_turns_out_damaged_is_aborted_and_the_next_trusts_no_pack_of_it() -> None:
    cluster = running()
    commits(cluster)
    commits(cluster, pack_of(2))
    commits(cluster, pack_of(2))
    cluster.trains(step=80)
    cluster.asks_for_checkpoint()
    assert started(cluster).base == 3
    acknowledges(cluster, pack_of(2))
    quarantine(cluster, 3, pack_of(2).key)
    cluster.manifest_written()
    assert cluster.decides() == ["CheckpointAborted"]
    newest = cluster.job().newest_restorable
    assert newest is not None and newest.number == 2, "it is not given up before it was read"
    cluster.trains(step=100)
    cluster.asks_for_checkpoint()
    assert started(cluster).base == 0, "it names the damaged pack too"


def test_a_base_is_kept_while_an_attempt_builds_upon_it() -> None:
    cluster = running(keep_last=1)
    commits(cluster)
    cluster.trains(step=30)
    cluster.asks_for_checkpoint()
    assert started(cluster).base == 1
    quarantine(cluster, 1, "its own shard")
    assert cluster.decides() == ["CheckpointAborted"]
    assert not cluster.job().committed[CheckpointNumber(1)].expired


def test_a_pack_goes_when_the_last_checkpoint_that_names_it_is_deleted_and_not_before() -> None:
    cluster = running(keep_last=1)
    commits(cluster)
    commits(cluster, pack_of(2), pack_of(2, rank=1))
    cluster.objects_deleted(1)
    assert cluster.decides() == ["CheckpointDeleted"]
    commits(cluster, pack_of(2))
    assert cluster.job().committed[CheckpointNumber(2)].expired
    [deletion] = [effect for effect in cluster.owes() if isinstance(effect, DeleteAttempt)]
    assert deletion.keep == {pack_of(2).key, pack_of(2, rank=1).key}
    cluster.objects_deleted(2)
    assert cluster.decides() == ["CheckpointDeleted", "PacksExpired"]
    assert cluster.last("PacksExpired") == PacksExpired(keys=(pack_of(2, rank=1).key,), store="file:///store")
    for leader in (cluster, cluster.fails_over()):
        leader.reconnect()
        [owed] = [effect for effect in leader.owes() if isinstance(effect, DeletePacks)]
        assert owed.packs == (pack_of(2, rank=1).key,)
    cluster.tells(PacksGone(job=MNIST, expired=owed.expired))
    assert cluster.decides() == ["PacksDeleted"]
    assert not [effect for effect in cluster.owes() if isinstance(effect, DeletePacks)]
    assert list(cluster.job().packs) == [pack_of(2).key]


def test_the_packs_of_a_job_live_on_in_its_next_run() -> None:
    cluster = running()
    commits(cluster)
    commits(cluster, pack_of(2))
    cluster.finish()
    assert cluster.decides() == ["JobSucceeded"]
    cluster.submits(request="r2")
    assert cluster.job().packs == {pack_of(2).key: "file:///store"}
    assert packs.base_for_next(cluster.job()) == 2


def test_what_was_sent_for_a_checkpoint_is_its_shards_and_the_packs_made_with_it() -> None:
    cluster = running()
    commits(cluster)
    commits(cluster, pack_of(2))
    commits(cluster, pack_of(2), pack_of(3))
    committed = cluster.job().committed
    assert [c.uploaded_bytes(MNIST) for c in committed.values()] == [2 * 64, 2 * 64 + 100, 2 * 64 + 100]
    assert committed[CheckpointNumber(3)].attempt == AttemptNumber(3)
