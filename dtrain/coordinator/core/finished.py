"""Members whose ranks have all ended well, while their generation goes on.

Ranks end one after the other: rank 0 may still evaluate for an hour when all others are done. The nodes of those may
go by then, at no cost to anybody. A later leader would never hear from them how their ranks ended; so it is recorded.
"""

from dtrain.coordinator.core.events import Cause, Decision, Member, MembersFinished
from dtrain.coordinator.core.facts import Now
from dtrain.coordinator.core.first_causes import cut_short
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import GenerationState, JobState


def is_done(job: JobState, generation: GenerationState, member: Member, observed: Observed) -> bool:
    """Whether every rank of the member has ended well, by the log or by its worker's report."""
    return member.worker in generation.finished or _says_so(job, generation, member, observed)


def _says_so(job: JobState, generation: GenerationState, member: Member, observed: Observed) -> bool:
    report = observed.assignment(member.worker, job.name, generation.number)
    return (
        report is not None
        and len(report.ranks) == member.nproc
        and all(rank.succeeded and not cut_short(rank) for rank in report.ranks)
    )


def note(job: JobState, generation: GenerationState, observed: Observed) -> Decision | None:
    """MembersFinished for those that the log does not name yet."""
    workers = tuple(
        member.worker
        for member in generation.members
        if member.worker not in generation.finished and _says_so(job, generation, member, observed)
    )
    if not workers:
        return None
    event = MembersFinished(generation=generation.number, workers=workers)
    snapshot = observed.view(workers[0]).snapshot
    number = snapshot.number if snapshot is not None else 0
    return Decision(event=event, cause=Cause(fact="trainers_exited", worker=workers[0], snapshot=number))


def unheard(job: JobState, generation: GenerationState, observed: Observed) -> list[Member]:
    """The members that are done by the log, and of which this leader has no report."""
    return [
        member
        for member in generation.members
        if member.worker in generation.finished
        and observed.assignment(member.worker, job.name, generation.number) is None
    ]


def gone(job: JobState, generation: GenerationState, observed: Observed, now: Now) -> list[Member]:
    """The members that are done, and whose workers will do nothing more for the generation.

    One that is known to have something to store yet may come back and do so: nothing runs any more that could make it
    again. It is given up when it is lost, and was silent for as long as a worker is waited for that keeps its lease.
    """
    found = []
    for member in generation.members:
        journal = observed.view(member.worker).journal
        replaced = journal != "" and journal != member.journal
        lost, mute = observed.lost(member.worker, now), observed.mute(member.worker, now)
        known = observed.assignment(member.worker, job.name, generation.number) is not None
        away = lost and mute if known else lost or mute
        if (replaced or away) and is_done(job, generation, member, observed):
            found.append(member)
    return found
