"""Which workers a generation runs on.

A worker is a candidate if it is connected to this leader, its lease is alive, it is not about to leave, was not silent
for as long as a worker is that ends all it runs, and has a free slot for each of its ranks. A slot counts as taken
while desired state gives it to another job or while the worker reports a trainer of another job in it, so that no slot
ever runs two trainers. Trainers of the same job's older generations do not count: the worker ends them before it starts
the new ones.
"""

from collections.abc import Mapping

from dtrain.common.names import Generation, JobName, WorkerId
from dtrain.coordinator.core.events import Cause, Decision, GenerationStarted, Member
from dtrain.coordinator.core.facts import Now, RankState
from dtrain.coordinator.core.observed import Observed, WorkerView
from dtrain.coordinator.core.restarts import backoff_left_s
from dtrain.coordinator.core.states import JobState

# How long a job that could start with fewer nodes than it may have waits for more of them.
GATHER_S = 2.0
_LOOPBACK = "127.0.0.1"


def taken_slots(view: WorkerView, job: JobName, jobs: Mapping[JobName, JobState]) -> int:
    """Slots of this worker that other jobs hold, by desired state or by report, whichever is more for each job."""
    taken: dict[JobName, int] = {}
    for other in jobs.values():
        if other.name != job and other.generation is not None:
            for member in other.generation.members:
                if member.worker == view.worker:
                    taken[other.name] = member.nproc
    if view.snapshot is not None:
        for assignment in view.snapshot.assignments:
            if assignment.job != job:
                running = sum(rank.state is RankState.RUNNING for rank in assignment.ranks)
                taken[assignment.job] = max(taken.get(assignment.job, 0), running)
    return sum(taken.values())


def candidates(job: JobState, observed: Observed, jobs: Mapping[JobName, JobState], now: Now) -> list[WorkerView]:
    """Workers this job could run on, best first: those that ran it last, then by name."""
    found = []
    for view in observed.workers.values():
        if view.snapshot is None or not view.connected or view.registration is None or view.leaving:
            continue
        if observed.fenced(view.worker, now):
            continue
        if view.snapshot.slots - taken_slots(view, job.name, jobs) >= job.spec.nproc_per_node:
            found.append(view)
    return sorted(found, key=lambda view: (-job.placed.get(view.worker, 0), view.worker))


def waiting_for(job: JobState, observed: Observed, jobs: Mapping[JobName, JobState], now: Now) -> str:
    """What a pending job waits for, in words."""
    if job.spec.store and (job.name, job.spec.store) not in observed.audited:
        return f"the store's commit markers to be read: {job.spec.store}"
    if (left_s := backoff_left_s(job, now)) > 0:
        return f"{left_s:.0f} s more, because {job.stalls} failures in a row got no further"
    have, need = len(candidates(job, observed, jobs, now)), job.spec.nnodes_min
    if have >= need:
        return f"more workers, up to {job.spec.nnodes_max}, or a port that no other job was given, for a moment"
    return f"{need} worker(s) with {job.spec.nproc_per_node} free slot(s) each; {have} there"


def _all_back(job: JobState, found: list[WorkerView]) -> bool:
    """True after a failure that cost no worker: as many are there as were, so there is nobody to wait for."""
    before = sum(generation == job.last_generation for generation in job.placed.values())
    return job.restarts > 0 and len(found) >= before


def _with_a_port(chosen: list[WorkerView], jobs: Mapping[JobName, JobState]) -> list[WorkerView]:
    """Return them with one first whose port no other job was given; none at all if there is no such one.

    A worker holds another port ready once rank 0 of a generation was spawned, and says so in its next snapshot. Until
    then the one that it said before belongs to that generation.
    """
    given = {
        (job.generation.members[0].worker, job.generation.master_port)
        for job in jobs.values()
        if job.generation is not None
    }
    for view in chosen:
        if view.snapshot is not None and (view.worker, view.snapshot.rendezvous_port) not in given:
            return [view, *(other for other in chosen if other is not view)]
    return []


def start(job: JobState, observed: Observed, jobs: Mapping[JobName, JobState], now: Now) -> Decision | None:
    """GenerationStarted for a pending job, or None while it must wait."""
    if job.spec.store and (job.name, job.spec.store) not in observed.audited:
        return None  # whether the log is whole is not known yet
    if backoff_left_s(job, now) > 0:
        return None
    found = candidates(job, observed, jobs, now)
    if len(found) < job.spec.nnodes_min:
        observed.gathers_since_s.pop((job.name, job.run), None)
        return None
    since = observed.gathers_since_s.setdefault((job.name, job.run), now.mono_s)
    if len(found) < job.spec.nnodes_max and now.mono_s - since < GATHER_S and not _all_back(job, found):
        return None
    chosen = _with_a_port(found[: job.spec.nnodes_max], jobs)
    if not chosen:
        return None
    nproc = job.spec.nproc_per_node
    members = tuple(
        Member(
            worker=WorkerId(view.worker),
            journal=view.journal,
            node_rank=node_rank,
            first_rank=node_rank * nproc,
            nproc=nproc,
        )
        for node_rank, view in enumerate(chosen)
    )
    first = chosen[0].snapshot
    assert first is not None  # candidates have one
    newest = job.newest_restorable
    event = GenerationStarted(
        generation=Generation(job.last_generation + 1),
        members=members,
        world_size=len(members) * nproc,
        master_address=_LOOPBACK if len(members) == 1 else first.address.rsplit(":", 1)[0],
        master_port=first.rendezvous_port,
        restore=newest.restore_point if newest is not None else None,
    )
    observed.gathers_since_s.pop((job.name, job.run), None)
    observed.failing_since_s.pop((job.name, Generation(job.last_generation)), None)
    last = job.last_failure
    cause = Cause(
        fact="workers_available",
        detail=f"{len(found)} of {job.spec.nnodes_min} to {job.spec.nnodes_max} workers"
        + (f"; after: {last.reason}" if last is not None else ""),
    )
    return Decision(event=event, cause=cause)
