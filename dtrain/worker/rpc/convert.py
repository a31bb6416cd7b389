"""Between the wire's messages and the machine's records: the only file of the agent that knows both.

What comes in is checked here: a command that no coordinator of ours would send is refused by name, before the
machine sees it.
"""

from dataclasses import dataclass

from dtrain.common.errors import PermanentError, UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step, Term, job_name
from dtrain.proto import agent_pb2 as wire
from dtrain.worker.core.inputs import (
    CommandBody,
    CommandReceived,
    Noop,
    StageCheckpoint,
    StartTrainers,
    StopTrainers,
    TakeStacks,
)
from dtrain.worker.core.snapshots import AssignmentSnapshot, NodeSnapshot, Phase
from dtrain.worker.core.states import (
    BaseIndex,
    CheckpointRequest,
    CommandRecord,
    CommandStage,
    LogPosition,
    RankRun,
    RankStage,
    RestoreProgress,
    RestoreSource,
    RestoreStage,
    ShardAttempt,
    ShardStage,
    TrainersSpec,
)
from dtrain.worker.rank_dirs import RankId
from dtrain.worker.transfers import Transfer, Transfers

ROLE = "worker"
NO_TRANSFERS = Transfers()
_PHASES = {
    Phase.IDLE: wire.IDLE,
    Phase.STARTING: wire.STARTING,
    Phase.RESTORING: wire.RESTORING,
    Phase.TRAINING: wire.TRAINING,
    Phase.CHECKPOINTING: wire.CHECKPOINTING,
    Phase.STOPPING: wire.STOPPING,
}
_RANK_STATES = {
    RankStage.PENDING: wire.PENDING,
    RankStage.SPAWNING: wire.PENDING,
    RankStage.RUNNING: wire.RUNNING,
    RankStage.EXITED: wire.EXITED,
}
_SHARD_STATES = {
    ShardStage.REQUESTED: wire.REQUESTED,
    ShardStage.STAGED: wire.STAGED,
    ShardStage.DURABLE: wire.DURABLE,
    ShardStage.MISSED: wire.MISSED,
    ShardStage.FAILED: wire.FAILED,
}
_RESTORE_STATES = {
    RestoreStage.NONE: wire.NONE,
    RestoreStage.FETCHING: wire.FETCHING,
    RestoreStage.READY: wire.READY,
    RestoreStage.DAMAGED: wire.DAMAGED,
}
_COMMAND_STATES = {
    CommandStage.ACCEPTED: wire.ACCEPTED,
    CommandStage.DONE: wire.DONE,
    CommandStage.REFUSED: wire.REFUSED,
}


class BadCommandError(PermanentError):
    """A command that cannot be understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What stays the same in all snapshots of one agent process."""

    worker: str
    journal: str
    incarnation: str
    version: str
    host: str
    address: str


# ---- out -------------------------------------------------------------------------------------------------


def to_snapshot(
    node: NodeSnapshot, identity: Identity, *, number: int, rendezvous_port: int, transfers: Transfers = NO_TRANSFERS
) -> wire.Snapshot:
    """Return the message for ``node``."""
    return wire.Snapshot(
        worker=identity.worker,
        journal=identity.journal,
        incarnation=identity.incarnation,
        number=number,
        term=node.term,
        role=ROLE,
        version=identity.version,
        host=identity.host,
        address=identity.address,
        slots=node.slots,
        rendezvous_port=rendezvous_port,
        phase=_PHASES[node.phase],
        leaving=node.leaving,
        assignments=[_assignment(assignment, transfers) for assignment in node.assignments],
        commands=[_command(record) for record in node.commands],
    )


def _assignment(assignment: AssignmentSnapshot, transfers: Transfers) -> wire.Assignment:
    message = wire.Assignment(
        job=assignment.job,
        generation=assignment.generation,
        phase=_PHASES[assignment.phase],
        ranks=[_rank(run) for run in assignment.ranks],
        shards=[_shard(shard) for shard in assignment.shards],
        restore=_restore(assignment.restore, assignment.restore_checkpoint),
    )
    for rank in message.ranks:
        of = RankId(job=assignment.job, generation=assignment.generation, rank=rank.rank)
        if (upload := transfers.uploads.get(of)) is not None:
            rank.upload.CopyFrom(_transfer(upload))
    if (restore := transfers.restores.get((assignment.job, assignment.generation))) is not None:
        message.restore.transfer.CopyFrom(_transfer(restore))
    if assignment.position is not None:
        message.position.CopyFrom(wire.LogPosition(seq=assignment.position.seq, digest=assignment.position.digest))
    return message


def _rank(run: RankRun) -> wire.RankReport:
    message = wire.RankReport(
        rank=run.rank,
        state=_RANK_STATES[run.stage],
        pid=run.pid,
        phase=run.phase,
        completed_step=run.completed_step,
        until_step=run.until_step,
        tracking=run.tracking,
        step_s=run.step_s,
        metrics_json=run.metrics_json,
        stack=run.stack,
        stack_number=run.stack_number,
    )
    if run.exit is not None:
        message.exit_code = run.exit.code or 0
        message.exit_unknown = run.exit.code is None
        message.error = run.exit.error
        message.traceback = run.exit.traceback
        message.exited_at = run.exit.at_unix_s
        message.out_of_memory = run.exit.out_of_memory
        message.ended_for = run.exit.ended_for
    return message


def _shard(shard: ShardAttempt) -> wire.ShardReport:
    return wire.ShardReport(
        checkpoint=shard.checkpoint,
        attempt=shard.attempt,
        rank=shard.rank,
        state=_SHARD_STATES[shard.stage],
        step=shard.step,
        key=shard.key,
        size_bytes=shard.size_bytes,
        digest=shard.digest,
        reason=shard.reason,
        index_key=shard.index_key,
        index_digest=shard.index_digest,
        packs=[wire.Pack(key=pack.key, size_bytes=pack.size_bytes, digest=pack.digest) for pack in shard.packs],
        state_bytes=shard.state_bytes,
    )


def _restore(restore: RestoreProgress, checkpoint: int) -> wire.RestoreReport:
    return wire.RestoreReport(
        state=_RESTORE_STATES[restore.stage], checkpoint=checkpoint, key=restore.key, reason=restore.reason
    )


def _transfer(transfer: Transfer) -> wire.Transfer:
    return wire.Transfer(bytes_done=max(transfer.bytes_done, 0), bytes_total=transfer.bytes_total)


def _command(record: CommandRecord) -> wire.CommandStatus:
    return wire.CommandStatus(id=record.id, state=_COMMAND_STATES[record.stage], reason=record.reason, term=record.term)


# ---- in --------------------------------------------------------------------------------------------------


def to_command(term: int, command: wire.Command) -> CommandReceived:
    """Return the machine's input. Raises :class:`BadCommandError` naming what cannot be right."""
    body = _body(command)
    if not command.id:
        raise BadCommandError("a command without an id")
    if not isinstance(body, Noop):
        if command.generation < 1:
            raise BadCommandError(f"command {command.id} names no generation")
        try:
            job_name(command.job)
        except UserError as error:
            raise BadCommandError(f"command {command.id}: {error}") from error
    position = None
    if command.HasField("position"):
        position = LogPosition(seq=command.position.seq, digest=command.position.digest)
    return CommandReceived(
        term=Term(term),
        id=command.id,
        job=JobName(command.job),
        generation=Generation(command.generation),
        position=position,
        body=body,
    )


def _body(command: wire.Command) -> CommandBody:
    match command.WhichOneof("command"):
        case "noop":
            return Noop()
        case "start_trainers":
            return StartTrainers(spec=_spec(command.id, command.start_trainers))
        case "stage_checkpoint":
            stage = command.stage_checkpoint
            if stage.attempt < 1:
                raise BadCommandError(f"command {command.id} names no attempt")
            return StageCheckpoint(
                request=CheckpointRequest(
                    checkpoint=CheckpointNumber(stage.checkpoint),
                    attempt=AttemptNumber(stage.attempt),
                    step=Step(stage.step),
                    store=stage.store,
                    committed_attempt=stage.committed_attempt,
                    bases=tuple(
                        BaseIndex(rank=base.rank, index_key=base.index_key, index_digest=base.index_digest)
                        for base in stage.bases
                    ),
                )
            )
        case "stop_trainers":
            stop = command.stop_trainers
            return StopTrainers(grace_s=stop.grace_s, keep_arena=stop.keep_arena)
        case "take_stacks":
            if command.take_stacks.number < 1:
                raise BadCommandError(f"command {command.id} has no number")
            return TakeStacks(number=command.take_stacks.number)
        case unknown:
            raise BadCommandError(f"command {command.id} is of a kind this worker does not know: {unknown}")


def _spec(command_id: str, start: wire.StartTrainers) -> TrainersSpec:
    if start.nproc < 1 or start.first_rank + start.nproc > start.world_size:
        raise BadCommandError(
            f"command {command_id}: ranks {start.first_rank} to {start.first_rank + start.nproc - 1} "
            f"are not within a world of {start.world_size}"
        )
    restore = None
    if start.HasField("restore"):
        restore = RestoreSource(
            checkpoint=CheckpointNumber(start.restore.checkpoint),
            attempt=AttemptNumber(start.restore.attempt),
            step=Step(start.restore.step),
            manifest_key=start.restore.manifest_key,
            manifest_digest=start.restore.manifest_digest,
            store=start.restore.store or start.store,
        )
    return TrainersSpec(
        python=start.python,
        script=start.script,
        args=tuple(start.args),
        cwd=start.cwd,
        env=dict(start.env),
        world_size=start.world_size,
        nnodes=start.nnodes,
        node_rank=start.node_rank,
        first_rank=start.first_rank,
        nproc=start.nproc,
        master_address=start.master_address,
        master_port=start.master_port,
        restarts=start.restarts,
        max_restarts=start.max_restarts,
        store=start.store,
        save_last=start.save_last,
        no_python=start.no_python,
        restore=restore,
    )
