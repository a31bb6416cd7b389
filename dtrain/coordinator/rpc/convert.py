"""Between the wire's messages and the core's records. Malformed messages raise ValueError or UserError.

Whatever may end up in an event is bounded here: an event that etcd does not take would stop the coordinator,
and the next one after it.
"""

import math
from typing import assert_never

from dtrain.common import names
from dtrain.common.errors import UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, Step, Term
from dtrain.common.packs import Pack
from dtrain.common.specs import CheckpointPolicy, JobSpec, RetentionPolicy
from dtrain.common.stacks import STACK_MAX_CHARS
from dtrain.coordinator.core.commands import Command, StageCheckpoint, StartTrainers, StopTrainers, TakeStacks
from dtrain.coordinator.core.events import Position
from dtrain.coordinator.core.facts import (
    AssignmentReport,
    CommandReport,
    RankReport,
    RankState,
    RestorePhase,
    RestoreReport,
    ShardPhase,
    ShardReport,
    Transfer,
    WorkerSnapshot,
)
from dtrain.coordinator.core.states import LastFailure
from dtrain.proto import agent_pb2 as wire
from dtrain.storage.keys import KEY_MAX_BYTES

SPEC_MAX_BYTES = 128 * 1024  # as JSON it may grow sixfold and still fits into a transaction
TEXT_MAX_CHARS = 4096  # of one reason or error; it is said up to four times in the events that it causes
NAME_MAX_CHARS = 256  # of a journal, an address, a digest: far more than any has
STEP_MIN_S = 1e-6  # no step is shorter; what is counted in steps stays a number


def snapshot_from_wire(message: wire.Snapshot) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker=names.worker_id(message.worker),
        journal=_bounded(message.journal, NAME_MAX_CHARS),
        incarnation=message.incarnation,
        number=message.number,
        term=Term(message.term),
        version=message.version,
        host=message.host,
        address=_bounded(message.address, NAME_MAX_CHARS),
        slots=message.slots,
        rendezvous_port=message.rendezvous_port,
        phase=wire.WorkerPhase.Name(message.phase).lower(),
        leaving=message.leaving,
        assignments=tuple(_assignment(assignment) for assignment in message.assignments),
        commands=tuple(
            CommandReport(
                id=command.id,
                state=wire.CommandState.Name(command.state).lower(),
                term=command.term,
                reason=command.reason[:TEXT_MAX_CHARS],
            )
            for command in message.commands
        ),
    )


def _assignment(message: wire.Assignment) -> AssignmentReport:
    return AssignmentReport(
        job=names.job_name(message.job),
        generation=Generation(message.generation),
        phase=wire.WorkerPhase.Name(message.phase).lower(),
        ranks=tuple(rank_from_wire(rank) for rank in message.ranks),
        shards=tuple(
            ShardReport(
                checkpoint=CheckpointNumber(shard.checkpoint),
                attempt=AttemptNumber(shard.attempt),
                rank=shard.rank,
                phase=ShardPhase(wire.ShardState.Name(shard.state).lower()),
                step=Step(shard.step),
                key=_bounded(shard.key),
                size_bytes=shard.size_bytes,
                digest=_bounded(shard.digest, NAME_MAX_CHARS),
                reason=shard.reason[:TEXT_MAX_CHARS],
                index_key=_bounded(shard.index_key),
                index_digest=_bounded(shard.index_digest, NAME_MAX_CHARS),
                packs=tuple(map(_pack, shard.packs)),
                state_bytes=shard.state_bytes,
            )
            for shard in message.shards
        ),
        restore=RestoreReport(
            phase=RestorePhase(wire.RestoreState.Name(message.restore.state).lower()),
            checkpoint=message.restore.checkpoint,
            key=_bounded(message.restore.key),
            reason=message.restore.reason[:TEXT_MAX_CHARS],
            transfer=_transfer(message.restore.transfer) if message.restore.HasField("transfer") else None,
        ),
        position_seq=message.position.seq,
        position_digest=message.position.digest,
    )


def _pack(message: wire.Pack) -> Pack:
    return Pack(
        key=_bounded(message.key), size_bytes=message.size_bytes, digest=_bounded(message.digest, NAME_MAX_CHARS)
    )


def _bounded(text: str, max_chars: int = KEY_MAX_BYTES) -> str:
    if len(text) > max_chars:
        raise ValueError(f"{text[:80]!r}... has {len(text)} characters; at most {max_chars} are possible")
    return text


def rank_from_wire(message: wire.RankReport) -> RankReport:
    if not math.isfinite(message.step_s) or not math.isfinite(message.exited_at):
        raise ValueError(f"rank {message.rank}: a time that is not finite")
    return RankReport(
        rank=message.rank,
        state=RankState(wire.RankState.Name(message.state).lower()),
        pid=message.pid,
        phase=message.phase,
        completed_step=Step(message.completed_step),
        until_step=Step(message.until_step),
        tracking=message.tracking,
        step_s=max(message.step_s, STEP_MIN_S) if message.step_s > 0 else 0.0,
        metrics_json=message.metrics_json,
        exit_code=message.exit_code,
        exit_unknown=message.exit_unknown,
        error=message.error[:TEXT_MAX_CHARS],
        exited_at=message.exited_at,
        traceback=message.traceback[-TEXT_MAX_CHARS:],
        out_of_memory=message.out_of_memory[:TEXT_MAX_CHARS],
        ended_for=message.ended_for[:TEXT_MAX_CHARS],
        stack=message.stack[:STACK_MAX_CHARS],
        stack_number=message.stack_number,
        upload=_transfer(message.upload) if message.HasField("upload") else None,
    )


def _transfer(message: wire.Transfer) -> Transfer:
    return Transfer(bytes_done=message.bytes_done, bytes_total=message.bytes_total)


def transfer_to_wire(transfer: Transfer | None) -> wire.Transfer | None:
    if transfer is None:
        return None
    return wire.Transfer(bytes_done=transfer.bytes_done, bytes_total=transfer.bytes_total)


def rank_to_wire(rank: RankReport) -> wire.RankReport:
    return wire.RankReport(
        rank=rank.rank,
        state=rank.state.value.upper(),
        pid=rank.pid,
        phase=rank.phase,
        completed_step=rank.completed_step,
        until_step=rank.until_step,
        tracking=rank.tracking,
        step_s=rank.step_s,
        metrics_json=rank.metrics_json,
        exit_code=rank.exit_code,
        exit_unknown=rank.exit_unknown,
        error=rank.error,
        exited_at=rank.exited_at,
        traceback=rank.traceback,
        out_of_memory=rank.out_of_memory,
        ended_for=rank.ended_for,
        stack=rank.stack,
        stack_number=rank.stack_number,
        upload=transfer_to_wire(rank.upload),
    )


def failure_to_wire(last: LastFailure) -> wire.Failure:
    return wire.Failure(
        generation=last.generation,
        reason=last.reason,
        kind=last.kind.value,
        traceback=last.traceback,
        victims=[
            wire.Victim(rank=victim.rank, worker=victim.worker, exit_code=victim.exit_code, error=victim.error)
            for victim in last.victims
        ],
        time=last.time,
    )


def spec_from_wire(message: wire.Spec) -> JobSpec:
    if message.ByteSize() > SPEC_MAX_BYTES:
        raise UserError(
            f"the job's arguments and environment take {message.ByteSize()} bytes; at most {SPEC_MAX_BYTES} fit: "
            "put them into a file that the script reads."
        )
    return JobSpec(
        name=names.job_name(message.name),
        python=message.python,
        script=message.script,
        args=tuple(message.args),
        cwd=message.cwd,
        env=dict(sorted(message.env.items())),
        nnodes_min=message.nnodes_min,
        nnodes_max=message.nnodes_max,
        nproc_per_node=message.nproc_per_node,
        max_restarts=message.max_restarts,
        restart_window_s=message.restart_window_s,
        store=message.store,
        checkpoints=CheckpointPolicy(every_steps=message.every_steps, every_seconds=message.every_seconds),
        retention=RetentionPolicy(
            keep_last=message.keep_last,
            keep_every_steps=message.keep_every_steps,
            keep_every_seconds=message.keep_every_seconds,
        ),
        no_python=message.no_python,
        hang_timeout_s=message.hang_timeout_s if message.HasField("hang_timeout_s") else None,
    )


def command_to_wire(command: Command) -> wire.Command:
    match command:
        case StartTrainers():
            return wire.Command(
                id=command.id,
                job=command.job.name,
                generation=command.generation.number,
                position=_position(command.position),
                start_trainers=_start(command),
            )
        case StageCheckpoint():
            newest = command.job.newest_restorable
            return wire.Command(
                id=command.id,
                job=command.job.name,
                generation=command.generation,
                position=_position(command.position),
                stage_checkpoint=wire.StageCheckpoint(
                    checkpoint=command.inflight.number,
                    attempt=command.inflight.attempt,
                    step=command.inflight.step,
                    store=command.job.spec.store,
                    committed_attempt=newest.restore_point.attempt if newest is not None else 0,
                    bases=[
                        wire.BaseIndex(rank=base.rank, index_key=base.index_key, index_digest=base.index_digest)
                        for base in command.bases
                    ],
                ),
            )
        case StopTrainers():
            return wire.Command(
                id=command.id,
                job=command.job,
                generation=command.generation,
                position=_position(command.position),
                stop_trainers=wire.StopTrainers(grace_s=command.grace_s, keep_arena=command.keep_arena),
            )
        case TakeStacks():
            return wire.Command(
                id=command.id,
                job=command.job,
                generation=command.generation,
                position=_position(command.position),
                take_stacks=wire.TakeStacks(number=command.number),
            )
        case unreachable:
            assert_never(unreachable)


def _position(position: Position) -> wire.LogPosition:
    return wire.LogPosition(seq=position.seq, digest=position.digest)


def _start(command: StartTrainers) -> wire.StartTrainers:
    spec, generation, member = command.job.spec, command.generation, command.member
    start = wire.StartTrainers(
        python=spec.python,
        no_python=spec.no_python,
        script=spec.script,
        args=spec.args,
        cwd=spec.cwd,
        env=spec.env,
        world_size=generation.world_size,
        nnodes=len(generation.members),
        node_rank=member.node_rank,
        first_rank=member.first_rank,
        nproc=member.nproc,
        master_address=generation.master_address,
        master_port=generation.master_port,
        restarts=generation.restarts,
        max_restarts=spec.max_restarts,
        store=spec.store,
        save_last=bool(spec.store and (spec.checkpoints.every_steps or spec.checkpoints.every_seconds)),
    )
    restore = generation.restore
    if restore is not None:
        start.restore.CopyFrom(
            wire.Restore(
                checkpoint=restore.checkpoint,
                attempt=restore.attempt,
                step=restore.step,
                manifest_key=restore.manifest_key,
                manifest_digest=restore.manifest_digest,
                store=restore.store,
            )
        )
    return start
