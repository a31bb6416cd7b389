"""When a checkpoint is started, aborted, committed.

The step of a checkpoint must still be ahead of every rank when the request reaches it, or the attempt is
missed. Reports are as old as the last snapshot, so the step is chosen `lead` steps ahead of the furthest rank:
as many as could pass while a command travels, doubled after each miss.

A step far away is not announced yet: an attempt is started only within HORIZON_S of its step, so that the log
reads as things happen and an attempt is short.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.common.names import AttemptNumber, Step
from dtrain.coordinator.core import finished, packs
from dtrain.coordinator.core.events import (
    Cause,
    CheckpointAborted,
    CheckpointCommitted,
    CheckpointMarked,
    CheckpointStarted,
    Decision,
    Member,
    ShardRecord,
)
from dtrain.coordinator.core.facts import Now, RankReport, RankState, ShardPhase, ShardReport
from dtrain.coordinator.core.failures import reports, stage_id
from dtrain.coordinator.core.observed import MUTE_AFTER_S, Advance, Observed
from dtrain.coordinator.core.states import GenerationState, InflightCheckpoint, JobState

# Reconcile, append, send, write to the mailbox: 0.03 s when nothing else runs. And a step in a fresh report may
# itself be 0.1 s old.
COMMAND_TRAVEL_S = 0.5
HORIZON_S = 3.0
LEAD_DOUBLINGS_MAX = 6  # 64 times the lead is seconds even for the fastest steps
ATTEMPT_TIMEOUT_S = 600.0  # without any advance, once every rank has passed the step: such a storage is down
_NOT_STAGED, _STAGED, _DURABLE = range(3)  # how far a rank is with an attempt
_STAGES = {ShardPhase.STAGED: _STAGED, ShardPhase.DURABLE: _DURABLE}
_CHECKPOINTABLE_PHASES = frozenset({"training", "checkpointing", "holding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the ranks of a generation are, as last reported."""

    furthest: Step  # largest completed step of any rank
    nearest: Step  # smallest
    until: Step  # last step the script will run; 0 while unknown
    step_s: float  # shortest last step of any rank
    age_s: float  # of the oldest report among them
    holding: bool = False  # every rank has done its last step and waits to be saved


def progress(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Progress | None:
    """Progress of a generation that can be checkpointed: every rank tracks state, trains, and has done a step."""
    ranks: list[RankReport] = []
    age_s = 0.0
    for member, report in reports(job, generation, observed):
        ranks.extend(report.ranks)
        age_s = max(age_s, now.mono_s - observed.view(member.worker).snapshot_at_s)
    if len(ranks) != generation.world_size or age_s >= MUTE_AFTER_S:
        return None
    for rank in ranks:
        if rank.state is not RankState.RUNNING or not rank.tracking or rank.phase not in _CHECKPOINTABLE_PHASES:
            return None
        if rank.completed_step < 1 or rank.step_s <= 0:
            return None
    return Progress(
        furthest=max(rank.completed_step for rank in ranks),
        nearest=min(rank.completed_step for rank in ranks),
        until=min(rank.until_step for rank in ranks),
        step_s=min(rank.step_s for rank in ranks),
        age_s=age_s,
        holding=all(rank.phase == "holding" for rank in ranks),
    )


def untracked(job: JobState, generation: GenerationState, observed: Observed) -> str:
    """What a job's checkpoints wait for in vain, in words: ranks that train and track nothing, where others do."""
    policy = job.spec.checkpoints
    ranks = [rank for _, report in reports(job, generation, observed) for rank in report.ranks]
    steps = [rank for rank in ranks if rank.phase in _CHECKPOINTABLE_PHASES and rank.completed_step > 0]
    silent = sorted(rank.rank for rank in steps if not rank.tracking)
    if not (policy.every_steps or policy.every_seconds) or not silent or len(silent) == len(steps):
        return ""
    return f"run.track() on every rank, to take checkpoints: rank {silent[0]} tracks nothing"


def lead_steps(job: JobState, at: Progress) -> int:
    """Steps that may pass before a request reaches the trainers; at least 1."""
    base = math.ceil((at.age_s + COMMAND_TRAVEL_S) / at.step_s)
    return int(max(1, base) << min(job.misses, LEAD_DOUBLINGS_MAX))


def due_step(job: JobState, at: Progress, now: Now) -> Step | None:
    """The step of the checkpoint that should be started now by the job's policy; None if none should."""
    policy = job.spec.checkpoints
    if not policy.every_steps and not policy.every_seconds:
        return None
    if at.holding and at.nearest == at.furthest == at.until:
        last = job.newest_restorable
        return at.until if last is None or last.step < at.until else None
    earliest = at.furthest + lead_steps(job, at)
    horizon = max(earliest, at.furthest + math.ceil(HORIZON_S / at.step_s))
    newest = job.newest_restorable
    saved = newest.step if newest is not None else 0
    step = 0
    if policy.every_steps:
        multiple = -(-earliest // policy.every_steps) * policy.every_steps
        step = multiple if multiple <= horizon else 0
    elif not 0 <= now.wall_s - job.checkpoint_time < policy.every_seconds:
        step = earliest  # due, or the clock went back: take one rather than wait for ever
    if at.until and (step == 0 or step > at.until):
        # The last step is always saved, so that a longer run can continue from it.
        step = at.until if earliest <= at.until <= horizon and saved < at.until else 0
    return Step(step) if step > saved else None


def start(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    """CheckpointStarted by policy, or None."""
    at = progress(job, generation, observed, now)
    step = None if at is None else due_step(job, at, now)
    if at is None or step is None:
        return None
    cause = Cause(fact="policy_due", detail=f"the furthest rank had completed step {at.furthest}")
    return Decision(event=started_at(job, generation, step), cause=cause)


def started_at(job: JobState, generation: GenerationState, step: Step) -> CheckpointStarted:
    """The job's next attempt, at this step."""
    return CheckpointStarted(
        checkpoint=job.next_checkpoint,
        attempt=AttemptNumber(job.last_attempt + 1),
        generation=generation.number,
        step=step,
        base=packs.base_for_next(job),
    )


def start_on_request(
    job: JobState, generation: GenerationState, observed: Observed, now: Now, request: str
) -> Decision | None:
    """CheckpointStarted at the earliest step possible; None if the ranks cannot be checkpointed now."""
    at = progress(job, generation, observed, now)
    if at is None:
        return None
    step = Step(at.furthest + lead_steps(job, at))
    if at.until and step > at.until:
        return None
    cause = Cause(fact="client_request", detail=request)
    return Decision(event=started_at(job, generation, step), cause=cause)


def _shards(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> Iterator[tuple[ShardReport, Cause]]:
    """The members' reports on exactly this attempt. Another attempt's or generation's ack changes nothing."""
    for member, report in reports(job, generation, observed):
        snapshot = observed.view(member.worker).snapshot
        for shard in report.shards:
            if shard.attempt == inflight.attempt and shard.checkpoint == inflight.number and shard.rank in member.ranks:
                number = snapshot.number if snapshot is not None else 0
                fact = f"shard_{shard.phase}"
                yield shard, Cause(fact=fact, worker=member.worker, snapshot=number, rank=shard.rank)


def acknowledged(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> tuple[ShardRecord, ...] | None:
    """Every rank's durable shard in rank order, or None while one is missing."""
    durable = {
        shard.rank: ShardRecord(
            rank=shard.rank,
            key=shard.key,
            size_bytes=shard.size_bytes,
            digest=shard.digest,
            index_key=shard.index_key,
            index_digest=shard.index_digest,
            packs=shard.packs,
            state_bytes=shard.state_bytes,
        )
        for shard, _ in _shards(job, generation, inflight, observed)
        if shard.phase is ShardPhase.DURABLE and shard.step == inflight.step
    }
    if len(durable) != generation.world_size:
        return None
    return tuple(durable[rank] for rank in range(generation.world_size))


def settle(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    """CheckpointCommitted or CheckpointAborted for the attempt in flight, or None while it goes on."""
    inflight = job.inflight
    if inflight is None:
        return None
    unstorable = _unstorable(job, generation, inflight, observed, now)
    if unstorable is not None and not _parts_ranks(job, generation, inflight, observed, now):
        return unstorable
    return _commit(job, generation, inflight, observed) or _overdue(job, generation, inflight, observed, now)


def _parts_ranks(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed, now: Now
) -> bool:
    """Whether to abort now would leave ranks behind that wait to be asked for their last state.

    A rank goes on once it was asked for the state of its last step, whatever came of it. Nothing can be saved without
    it, so a peer that was not asked by then would hold on for nothing. The attempt is kept until that one has answered.
    A leader that has not heard of every member yet does not know, and keeps it as well. Who has ended well was asked.
    """
    heard = list(reports(job, generation, observed))
    unheard = finished.unheard(job, generation, observed)
    gone = [member for member in finished.gone(job, generation, observed, now) if member in unheard]
    if len(heard) + len(gone) < len(generation.members):
        return True
    shards = _shards(job, generation, inflight, observed)
    answered = {shard.rank for shard, _ in shards if shard.phase is not ShardPhase.REQUESTED}
    answered.update(rank for member in gone for rank in member.ranks)
    answered.update(rank.rank for _, report in heard for rank in report.ranks if _is_too_late(rank, inflight))
    if not answered:
        return False
    for member, report in heard:
        if not _refusals(job, inflight, observed, member):
            for rank in report.ranks:
                last = rank.state is RankState.RUNNING and rank.until_step == inflight.step
                if last and rank.rank not in answered:
                    return True
    return False


def _abort(inflight: InflightCheckpoint, reason: str, cause: Cause, *, missed: bool = False) -> Decision:
    event = CheckpointAborted(checkpoint=inflight.number, attempt=inflight.attempt, reason=reason, missed=missed)
    return Decision(event=event, cause=cause)


def _unstorable(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed, now: Now
) -> Decision | None:
    if why := packs.why_base_is_lost(job, inflight):
        return _abort(inflight, why, Cause(fact="base_damaged"))
    if why := packs.why_foreign(job, inflight, acknowledged(job, generation, inflight, observed) or ()):
        return _abort(inflight, why, Cause(fact="acknowledgement_refused", detail=why))
    durable = set()
    for shard, cause in _shards(job, generation, inflight, observed):
        if shard.phase is ShardPhase.MISSED:
            reason = f"rank {shard.rank} had already passed step {inflight.step}"
            return _abort(inflight, reason, cause, missed=True)
        if shard.phase is ShardPhase.FAILED:
            return _abort(inflight, f"rank {shard.rank} could not store its shard: {shard.reason}", cause)
        if shard.phase is ShardPhase.DURABLE:
            durable.add(shard.rank)
    for member, rank in _ended_without(job, generation, inflight, observed):
        cause = Cause(fact="steps_over", worker=member.worker, rank=rank)
        return _abort(inflight, f"rank {rank} finished without reaching step {inflight.step}", cause)
    for member, _ in reports(job, generation, observed):
        for refusal in _refusals(job, inflight, observed, member):
            cause = Cause(fact="command_refused", worker=member.worker, detail=refusal)
            return _abort(inflight, f"worker {member.worker} refused it: {refusal}", cause)
    for member in finished.gone(job, generation, observed, now):
        if lost := [rank for rank in member.ranks if rank not in durable]:
            reason = f"rank {lost[0]} finished, and {member.worker} is gone, or silent, with what it had not stored"
            return _abort(inflight, reason, Cause(fact="worker_lost", worker=member.worker, rank=lost[0]))
    manifest = observed.manifests.get((job.name, inflight.attempt))
    if manifest is not None and manifest.refused:
        return _abort(inflight, manifest.refused, Cause(fact="manifest_refused", detail=manifest.refused))
    return None


def is_in_vain(job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed) -> bool:
    """Whether the attempt can never be committed, since a rank had ended its steps and has nothing of it."""
    return any(_ended_without(job, generation, inflight, observed))


def _ended_without(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> Iterator[tuple[Member, int]]:
    """The ranks that ended their steps before the attempt's and have staged nothing of it."""
    have = {shard.rank for shard, _ in _shards(job, generation, inflight, observed) if shard.phase in _STAGES}
    for member, report in reports(job, generation, observed):
        for rank in report.ranks:
            if _is_too_late(rank, inflight) and rank.rank not in have:
                yield member, rank.rank


def _is_too_late(rank: RankReport, inflight: InflightCheckpoint) -> bool:
    """Whether the rank ended its steps, well, before the attempt's. Of an equal step it may be about to say more."""
    over = rank.phase in ("left", "finished") or (rank.phase == "holding" and rank.completed_step == rank.until_step)
    return rank.succeeded or (rank.state is RankState.RUNNING and over and rank.completed_step < inflight.step)


def _refusals(job: JobState, inflight: InflightCheckpoint, observed: Observed, member: Member) -> list[str]:
    """Why the member's worker refuses to stage this attempt; empty if it does not."""
    snapshot = observed.view(member.worker).snapshot
    told = snapshot.commands if snapshot is not None else ()
    return [c.reason for c in told if c.id == stage_id(job, inflight) and c.refused_by(observed.term)]


def _commit(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> Decision | None:
    shards = acknowledged(job, generation, inflight, observed)
    manifest = observed.manifests.get((job.name, inflight.attempt))
    if shards is None or manifest is None:
        return None
    event = CheckpointCommitted(
        checkpoint=inflight.number,
        attempt=inflight.attempt,
        generation=inflight.generation,
        step=inflight.step,
        world_size=generation.world_size,
        shards=shards,
        store=job.spec.store,
        manifest_key=manifest.key,
        manifest_digest=manifest.digest,
    )
    return Decision(event=event, cause=Cause(fact="manifest_written", detail=manifest.key))


def _overdue(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed, now: Now
) -> Decision | None:
    ranks = [rank for _, report in reports(job, generation, observed) for rank in report.ranks]
    if len(ranks) != generation.world_size or any(rank.completed_step < inflight.step for rank in ranks):
        return None
    key = (job.name, inflight.attempt)
    before = observed.advances.get(key, Advance(since_s=now.mono_s, at_s=now.mono_s, furthest={}))
    after = _advance(job, generation, inflight, observed, before, now)
    observed.advances[key] = after
    unstaged = [rank for rank, (stage, _) in sorted(after.furthest.items()) if stage == _NOT_STAGED]
    if unstaged and now.mono_s - after.since_s >= ATTEMPT_TIMEOUT_S:
        reason = f"rank {unstaged[0]} did not stage step {inflight.step} within {ATTEMPT_TIMEOUT_S:.0f} s"
        return _abort(inflight, reason, Cause(fact="timed_out"))
    if now.mono_s - after.at_s >= ATTEMPT_TIMEOUT_S:
        reason = f"not stored, and nothing of it for {ATTEMPT_TIMEOUT_S:.0f} s"
        return _abort(inflight, reason, Cause(fact="timed_out"))
    return None


def _advance(
    job: JobState,
    generation: GenerationState,
    inflight: InflightCheckpoint,
    observed: Observed,
    before: Advance,
    now: Now,
) -> Advance:
    """How far each rank has come with the attempt. What it sends again is no advance, and hides no other rank's."""
    furthest = dict(before.furthest)
    for _, report in reports(job, generation, observed):
        stages = {
            shard.rank: _STAGES.get(shard.phase, _NOT_STAGED)
            for shard in report.shards
            if shard.attempt == inflight.attempt
        }
        for rank in report.ranks:
            stage = stages.get(rank.rank, _NOT_STAGED)
            sent_bytes = rank.upload.bytes_done if rank.upload is not None and stage == _STAGED else 0
            furthest[rank.rank] = max(furthest.get(rank.rank, (_NOT_STAGED, 0)), (stage, sent_bytes))
    at_s = before.at_s if furthest == before.furthest else now.mono_s
    return Advance(since_s=before.since_s, at_s=at_s, furthest=furthest)


def marks(job: JobState, observed: Observed) -> Decision | None:
    """CheckpointMarked for a committed checkpoint whose marker storage has confirmed."""
    for number, checkpoint in job.committed.items():
        if not checkpoint.marked and (job.name, number) in observed.markers:
            return Decision(event=CheckpointMarked(checkpoint=number), cause=Cause(fact="marker_written"))
    return None
