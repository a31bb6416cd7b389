"""What each worker must be told, derived from desired state and the worker's own report.

Levels, not edges: a command is owed until the worker's snapshot shows that it took it. So a lost message, a
restarted worker or a new leader costs a repetition and nothing else, and the worker's journal makes the
repetition harmless.
"""

from dataclasses import dataclass

from dtrain.common.names import CheckpointNumber, Generation, JobName, Term
from dtrain.coordinator.core import packs
from dtrain.coordinator.core.events import Member, Position, ShardRecord
from dtrain.coordinator.core.facts import AssignmentReport
from dtrain.coordinator.core.failures import stage_id, start_id
from dtrain.coordinator.core.hangs import stacks_id
from dtrain.coordinator.core.observed import WorkerView
from dtrain.coordinator.core.reconcile import stop_id
from dtrain.coordinator.core.states import GenerationState, InflightCheckpoint, JobPhase, JobState

CANCEL_GRACE_S = 5.0  # a cancelled script may save something of its own on SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTrainers:
    id: str
    job: JobState
    generation: GenerationState
    member: Member
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheckpoint:
    id: str
    job: JobState
    generation: Generation
    inflight: InflightCheckpoint
    position: Position
    bases: tuple[ShardRecord, ...] = ()  # of the worker's ranks, in the checkpoint that the attempt builds upon


@dataclass(frozen=True, slots=True, kw_only=True)
class StopTrainers:
    id: str
    job: JobName
    generation: Generation
    grace_s: float
    keep_arena: bool  # the job's next generation may start on this worker, from what is in its memory
    position: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeStacks:
    id: str
    job: JobName
    generation: Generation
    number: int  # of the suspicion
    position: Position


Command = StartTrainers | StageCheckpoint | StopTrainers | TakeStacks


def commands_for(job: JobState, view: WorkerView, term: Term) -> list[Command]:
    """The commands about ``job`` that this worker has not taken yet, in the order it must take them."""
    generation = job.generation
    member = None
    if generation is not None:
        member = next((m for m in generation.members if m.worker == view.worker), None)
    if generation is None or member is None or job.phase is JobPhase.CANCELLING:
        return _stop(job, view, term)
    if view.snapshot is None or view.journal != member.journal:
        return []  # its memory is gone: the generation is about to fail
    owed: list[Command] = []
    taken = {command.id for command in view.snapshot.commands if command.taken_from(term)}
    report = view.assignment(job.name)
    start = start_id(job, generation)
    if start not in taken and (report is None or report.generation < generation.number):
        owed.append(
            StartTrainers(id=start, job=job, generation=generation, member=member, position=generation.position)
        )
    inflight = job.inflight
    if inflight is not None and not _knows(report, generation, inflight):
        stage = stage_id(job, inflight)
        if stage not in taken:
            owed.append(
                StageCheckpoint(
                    id=stage,
                    job=job,
                    generation=generation.number,
                    inflight=inflight,
                    position=inflight.position,
                    bases=_bases(job, inflight, member),
                )
            )
    suspicion = generation.suspicion
    if suspicion is not None:
        stacks = stacks_id(job, generation, suspicion.number)
        if stacks not in taken:
            owed.append(
                TakeStacks(
                    id=stacks,
                    job=job.name,
                    generation=generation.number,
                    number=suspicion.number,
                    position=job.position,
                )
            )
    return owed


def _bases(job: JobState, inflight: InflightCheckpoint, member: Member) -> tuple[ShardRecord, ...]:
    base = job.committed.get(CheckpointNumber(inflight.base))
    if base is None or packs.why_base_is_lost(job, inflight):
        return ()
    return tuple(shard for shard in base.shards if shard.rank in member.ranks and shard.index_key)


def _knows(report: AssignmentReport | None, generation: GenerationState, inflight: InflightCheckpoint) -> bool:
    return (
        report is not None
        and report.generation == generation.number
        and any(shard.attempt == inflight.attempt for shard in report.shards)
    )


def _stop(job: JobState, view: WorkerView, term: Term) -> list[Command]:
    """Stop, and let go of, what the worker still holds of a generation that is over."""
    over = job.placed.get(view.worker)
    if over is None or view.snapshot is None:
        return []
    cancelling = job.phase is JobPhase.CANCELLING
    if view.assignment(job.name) is None and not (cancelling and job.generation is not None):
        return []  # it holds nothing; only a cancellation needs to hear it say so
    stop = stop_id(job.name, over)
    if any(command.id == stop and command.taken_from(term) for command in view.snapshot.commands):
        return []
    return [
        StopTrainers(
            id=stop,
            job=job.name,
            generation=over,
            grace_s=CANCEL_GRACE_S if cancelling else 0.0,
            keep_arena=job.phase is JobPhase.PENDING,
            position=job.position,
        )
    ]
