"""One of each event, with every field filled, for tests of what is written down and read again."""

from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, WorkerId
from dtrain.common.packs import Pack
from dtrain.coordinator.core.events import (
    AttemptSwept,
    CancelRequested,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointDeleted,
    CheckpointExpired,
    CheckpointMarked,
    CheckpointPinned,
    CheckpointQuarantined,
    CheckpointStarted,
    Event,
    FailureKind,
    GenerationFailed,
    GenerationStarted,
    HangCleared,
    HangFound,
    HangSuspected,
    JobCancelled,
    JobFailed,
    JobSubmitted,
    JobSucceeded,
    Member,
    MembersFinished,
    PacksDeleted,
    PacksExpired,
    RankStack,
    RestorePoint,
    RunInterrupted,
    SalvageStarted,
    ShardRecord,
    Victim,
)
from tests.coordinator.support.clusters import DIGEST, spec

_CHECKPOINT, _ATTEMPT, _GENERATION, _STEP = CheckpointNumber(3), AttemptNumber(5), Generation(2), Step(700)
_ODD_TEXT = 'Grüße "quoted" \\ \n\t\x00 日本 🚂'

EVENTS: tuple[Event, ...] = (
    JobSubmitted(
        spec=spec(every_seconds=1.5, args=("--lr", "0.1", _ODD_TEXT), env={"A": "1", "B": _ODD_TEXT}),
        run=2,
        request="r",
    ),
    RunInterrupted(reason=_ODD_TEXT),
    CancelRequested(),
    GenerationStarted(
        generation=_GENERATION,
        members=(
            Member(worker=WorkerId("w1"), journal="j1", node_rank=0, first_rank=0, nproc=2),
            Member(worker=WorkerId("w2"), journal="j2", node_rank=1, first_rank=2, nproc=2),
        ),
        world_size=4,
        master_address="w1",
        master_port=29500,
        restore=RestorePoint(
            checkpoint=_CHECKPOINT,
            attempt=_ATTEMPT,
            step=_STEP,
            manifest_key="m",
            manifest_digest=DIGEST,
            store="s3://bucket/prefix",
        ),
    ),
    GenerationFailed(
        generation=_GENERATION,
        reason=_ODD_TEXT,
        counted=True,
        exit_code=137,
        error=_ODD_TEXT,
        progressed=True,
        kind=FailureKind.KILLED,
        step=_STEP,
        victims=(Victim(rank=1, worker=WorkerId("w1"), exit_code=1, error=_ODD_TEXT),),
    ),
    MembersFinished(generation=_GENERATION, workers=(WorkerId("w1"), WorkerId("w2"))),
    HangSuspected(generation=_GENERATION, number=1, steps_sum=1400, idle_s=300.5, timeout_s=300.0),
    HangCleared(generation=_GENERATION, number=1),
    HangFound(
        generation=_GENERATION,
        number=2,
        idle_s=300.5,
        culprit=1,
        victims=(0, 2, 3),
        stacks=(RankStack(rank=1, worker="w1", step=_STEP, stack=_ODD_TEXT),),
    ),
    CheckpointStarted(checkpoint=_CHECKPOINT, attempt=_ATTEMPT, generation=_GENERATION, step=_STEP, base=2),
    SalvageStarted(
        checkpoint=_CHECKPOINT, attempt=_ATTEMPT, generation=_GENERATION, step=_STEP, wait_s=2.5, reason=_ODD_TEXT
    ),
    CheckpointAborted(checkpoint=_CHECKPOINT, attempt=_ATTEMPT, reason="missed", missed=True),
    CheckpointCommitted(
        checkpoint=_CHECKPOINT,
        attempt=_ATTEMPT,
        generation=_GENERATION,
        step=_STEP,
        world_size=2,
        shards=tuple(
            ShardRecord(
                rank=rank,
                key=f"k{rank}",
                size_bytes=2**40,
                digest=DIGEST,
                packs=(Pack(key="p", size_bytes=2**41, digest=DIGEST),),
                state_bytes=2**42,
            )
            for rank in range(2)
        ),
        store="file:///store",
        manifest_key="m",
        manifest_digest=DIGEST,
    ),
    CheckpointMarked(checkpoint=_CHECKPOINT),
    CheckpointQuarantined(checkpoint=_CHECKPOINT, key="k0", reason="a bit is flipped"),
    CheckpointPinned(checkpoint=_CHECKPOINT, pinned=True),
    CheckpointExpired(checkpoint=_CHECKPOINT, reason=_ODD_TEXT),
    CheckpointDeleted(checkpoint=_CHECKPOINT),
    AttemptSwept(checkpoint=_CHECKPOINT, attempt=_ATTEMPT),
    PacksExpired(keys=("p", "q"), store="s3://bucket/prefix"),
    PacksDeleted(expired=12),
    JobSucceeded(),
    JobFailed(reason=_ODD_TEXT, exit_code=2),
    JobCancelled(),
)
