"""When a generation hangs: nothing has failed, and nothing moves.

    HangSuspected    no rank completed a step for the hang timeout; every worker is told to say where its ranks stand
    HangCleared      one did after all, or says that it does something else
    HangFound        all said where they stand, or did not within STACKS_WAIT_S; names the likely culprit
    GenerationFailed follows HangFound at once

What is no hang is told apart by the trainers' own words (their phases) and by the steps they have completed:

    starting, joined    processes start, a model is built, the process group comes up
    restoring           a checkpoint is fetched and loaded
    training, and the step that the generation started from is still the last one    compiling, the first batches
    checkpointing       a state is copied; but not for longer than an attempt that stands still is waited for
    paused              the script says so (``run.paused()``)
    left                it has left its steps early

While any rank is in one of these, the generation is not judged: the others may well wait for it. What such a phase
may take is bounded elsewhere: by the timeouts of the process group, and of checkpoints.

A rank that has done its last step (holding, finished) excuses nobody, and is not waited for itself. Nor is one that
ended with code 0; but if it ended its steps before its peers had done theirs, it is what they wait for.
"""

from dataclasses import dataclass

from dtrain.common.names import Step
from dtrain.coordinator.core import finished
from dtrain.coordinator.core.checkpoints import ATTEMPT_TIMEOUT_S
from dtrain.coordinator.core.culprits import LEFT, Standing, culprit_of, top_of
from dtrain.coordinator.core.events import (
    Cause,
    Decision,
    FailureKind,
    GenerationFailed,
    HangCleared,
    HangFound,
    HangSuspected,
    RankStack,
    Victim,
)
from dtrain.coordinator.core.facts import Now, RankReport, RankState
from dtrain.coordinator.core.failures import reports
from dtrain.coordinator.core.first_causes import VICTIMS_MAX
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import GenerationState, JobState
from dtrain.coordinator.core.step_clocks import StepClocks

# Where the job names no timeout: so many times the longest step seen, and never less than the floor. Steps differ: one
# of a thousand evaluates, logs or compiles anew. A false alarm costs a healthy generation, a late one costs minutes.
AUTO_FACTOR = 10.0
AUTO_FLOOR_S = 300.0
STACKS_WAIT_S = 10.0  # a worker answers within 2 s, with py-spy within 7 s
STACKS_KEPT = 8  # ranks whose stacks are recorded: an event has to fit into a transaction
STACK_KEPT_CHARS = 1500  # of each

_STEPPING = "training"
_COPYING = "checkpointing"
_DONE = frozenset({"holding", "finished"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """All ranks of the generation, as they were last reported."""

    ranks: tuple[tuple[str, RankReport], ...]  # (worker, report), by rank; those that have not exited
    exited: tuple[tuple[str, RankReport], ...]  # the others: with code 0, or the generation would have failed
    complete: bool  # no rank is known by the log alone to have ended: that says when, and not how far it had come

    @property
    def steps_sum(self) -> int:
        return sum(rank.completed_step for _, rank in self.ranks)


def hang(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> Decision | None:
    """The next decision about a generation in which nothing moves; None while it does."""
    if generation.hang is not None:
        return _failed(generation, generation.hang)
    if job.spec.hang_timeout_s == 0:
        return None
    seen = _look(job, generation, observed)
    if seen is None:
        return None
    suspicion = generation.suspicion
    if suspicion is None:
        return _suspect(job, generation, seen, observed)
    if seen.steps_sum != suspicion.steps_sum or not _may_hang(generation, seen, observed.clocks.get(job.name)):
        cleared = HangCleared(generation=generation.number, number=suspicion.number)
        return Decision(event=cleared, cause=Cause(fact="progress_seen"))
    told = all(rank.stack_number >= suspicion.number for _, rank in seen.ranks)
    if not told and _waited_s(job, suspicion, observed, now) < STACKS_WAIT_S:
        return None
    return _find(generation, suspicion, seen)


def _waited_s(job: JobState, suspicion: HangSuspected, observed: Observed, now: Now) -> float:
    """How long this leader has waited for the stacks of this suspicion."""
    generation, number, since_s = observed.stacks_since_s.get(job.name, (0, 0, 0.0))
    if (generation, number) != (suspicion.generation, suspicion.number):
        observed.stacks_since_s[job.name] = suspicion.generation, suspicion.number, now.mono_s
        return 0.0
    return now.mono_s - since_s


def timeout_s(job: JobState, longest_step_s: float) -> float:
    """How long a generation of this job may stand still."""
    if job.spec.hang_timeout_s is not None:
        return job.spec.hang_timeout_s
    return max(AUTO_FLOOR_S, AUTO_FACTOR * longest_step_s)


def stacks_id(job: JobState, generation: GenerationState, number: int) -> str:
    """Id of the command that asks where ranks stand; the same for every leader."""
    return f"{job.name}/g{generation.number}/stacks-{number}"


def _look(job: JobState, generation: GenerationState, observed: Observed) -> _Seen | None:
    """What is known of all ranks, or None while something is not."""
    found = [(member.worker, rank) for member, report in reports(job, generation, observed) for rank in report.ranks]
    ended_unheard = sum(member.nproc for member in finished.unheard(job, generation, observed))
    if len(found) + ended_unheard != generation.world_size:
        return None
    found.sort(key=lambda pair: pair[1].rank)
    return _Seen(
        ranks=tuple(pair for pair in found if pair[1].state is not RankState.EXITED),
        exited=tuple(pair for pair in found if pair[1].state is RankState.EXITED),
        complete=ended_unheard == 0,
    )


def _may_hang(generation: GenerationState, seen: _Seen, clocks: StepClocks | None) -> bool:
    """Whether some rank is in the middle of its steps, and none has an excuse."""
    start = generation.restore.step if generation.restore is not None else 0
    stepping = [rank for _, rank in seen.ranks if rank.phase not in _DONE]
    return bool(stepping) and all(_steps(rank, clocks) and rank.completed_step > start for rank in stepping)


def _steps(rank: RankReport, clocks: StepClocks | None) -> bool:
    """Whether the rank is about to complete a step, or should be."""
    clock = clocks.ranks.get(rank.rank) if clocks is not None else None
    copies_s = clock.idle_s if clock is not None and rank.phase == _COPYING else 0.0
    return rank.phase == _STEPPING or copies_s >= ATTEMPT_TIMEOUT_S


def _suspect(job: JobState, generation: GenerationState, seen: _Seen, observed: Observed) -> Decision | None:
    clocks = observed.clocks.get(job.name)
    if clocks is None or clocks.generation != generation.number or not _may_hang(generation, seen, clocks):
        return None
    idle_s = min(clocks.ranks[rank.rank].idle_s for _, rank in seen.ranks)
    allowed_s = timeout_s(job, clocks.longest_step_s)
    if idle_s < allowed_s:
        return None
    event = HangSuspected(
        generation=generation.number,
        number=generation.suspicions + 1,
        steps_sum=seen.steps_sum,
        idle_s=round(idle_s, 3),
        timeout_s=round(allowed_s, 3),
    )
    return Decision(event=event, cause=Cause(fact="no_progress"))


def _find(generation: GenerationState, suspicion: HangSuspected, seen: _Seen) -> Decision:
    standings = [
        Standing(
            rank=rank.rank,
            worker=worker,
            step=rank.completed_step,
            stack=rank.stack if rank.stack_number >= suspicion.number else "no stack: its worker did not answer",
        )
        for worker, rank in seen.ranks
        if rank.phase not in _DONE
    ]
    standings += _left(seen, step=min(standing.step for standing in standings))
    culprit = culprit_of(standings) if seen.complete else None
    order = sorted(standings, key=lambda s: (culprit is None or s.rank != culprit.rank, s.rank))[:STACKS_KEPT]
    event = HangFound(
        generation=generation.number,
        number=suspicion.number,
        idle_s=suspicion.idle_s,
        culprit=culprit.rank if culprit is not None else -1,
        victims=tuple(s.rank for s in standings if culprit is None or s.rank != culprit.rank)[:VICTIMS_MAX],
        stacks=tuple(
            RankStack(rank=s.rank, worker=s.worker, step=s.step, stack=s.stack[:STACK_KEPT_CHARS]) for s in order
        ),
    )
    return Decision(event=event, cause=Cause(fact="no_progress"))


def _left(seen: _Seen, *, step: int) -> list[Standing]:
    """The ranks that ended their steps no later than after ``step``, the last that all others completed."""
    return [
        Standing(
            rank=rank.rank,
            worker=worker,
            step=rank.completed_step,
            stack=f"{LEFT} after step {rank.completed_step}, and its peers go on"
            + (f"\n{rank.stack}" if rank.state is not RankState.EXITED else ""),
            left=True,
        )
        for worker, rank in (*seen.exited, *seen.ranks)
        if (rank.state is RankState.EXITED or rank.phase in _DONE)
        and rank.completed_step <= step
        and rank.completed_step != rank.until_step  # who has done all of its steps keeps nobody from theirs
    ]


def _victims(generation: GenerationState, found: HangFound) -> tuple[Victim, ...]:
    if found.culprit < 0:
        return ()
    workers = {rank: member.worker for member in generation.members for rank in member.ranks}
    return tuple(Victim(rank=rank, worker=workers[rank]) for rank in found.victims)


def _failed(generation: GenerationState, found: HangFound) -> Decision:
    cause = Cause(fact="hang")
    reason = f"it hung: no rank completed a step for {found.idle_s:.0f} s"
    error = ""
    if found.culprit >= 0:
        first = found.stacks[0]
        left = first.stack.startswith(LEFT)
        error = top_of(first.stack) if left else f"stuck: {top_of(first.stack)}"
        cause = Cause(fact="hang", worker=first.worker, rank=first.rank, detail=error, traceback=first.stack)
        reason += f"; rank {first.rank} on {first.worker} {error if left else f'seems to be {error}'}"
    event = GenerationFailed(
        generation=generation.number,
        reason=reason,
        counted=True,
        error=error,
        progressed=True,
        kind=FailureKind.HANG,
        step=Step(min((stack.step for stack in found.stacks), default=0)),
        furthest_step=Step(max((stack.step for stack in found.stacks), default=0)),
        victims=_victims(generation, found),
    )
    return Decision(event=event, cause=cause)
