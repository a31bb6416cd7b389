"""Which of the failed ranks failed first, and which only followed.

When a rank dies, its peers' collectives fail within milliseconds, and their errors may be reported before the
death that caused them. So the time of an exit is not enough, and the order of reports says nothing. What counts, in
this order:

1. the kind: who lost a connection is a victim wherever somebody ended in another way;
2. the time of exit, as the worker saw it;
3. the rank, so that the answer is always the same.

A signal or an exception of its own is a cause: it decides at once. While nothing but lost connections is known,
the decision waits a bounded moment for the cause to be reported.

Who could not join because a peer never came lost a connection too: what kept that peer is the cause.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dtrain.coordinator.core.events import FailureKind, Member, Victim
from dtrain.coordinator.core.facts import AssignmentReport, RankReport
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import SIGNAL_EXIT_BASE

# How long lost connections alone may wait for their cause. A process with a GPU closes its sockets a good while
# before it is gone, so its peers may be heard first; a second covers that and the way of a snapshot.
FIRST_CAUSE_WAIT_S = 1.0
VICTIMS_MAX = 16  # kept in an event: enough to see the pattern, and an event stays small in the largest world
VICTIM_ERROR_MAX_CHARS = 200

_SIGINT, _SIGABRT, _SIGKILL, _SIGTERM, _SIGHUP = 2, 6, 9, 15, 1
# Nothing that a script does to itself by mistake: an operator, a scheduler, the kernel short of memory.
_SENT_FROM_OUTSIDE = frozenset({_SIGHUP, _SIGINT, _SIGKILL, _SIGTERM})
# What gloo, NCCL and torch's store say when the other side is gone or silent, in lower case.
_LOST_CONNECTION = (
    "connection closed",
    "connection reset",
    "connection refused",
    "connection was closed",
    "connection was likely closed",
    "connection timed out",
    "connectfullmesh failed",  # gloo's, of a rank that came when a peer had gone again
    "broken pipe",
    "socket closed",
    "socket timeout",
    "distnetworkerror",
    "remote process exited",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "failed to recv",
    "failed to send",
    "recvvalue failed",
    "sendbytes failed",
    "timed out waiting",
    "wait timeout after",
    ": wait timeout",  # a file store's whole words; "Lock wait timeout" is a database's
    "waiting for clients",  # a rank 0 to whose store not everybody came
    "does not listen at",  # dtrain's own, of a rank 0 that is stuck before it opens its store
    "application timeout caused pair closure",
    "collective operation timeout",
    "transport endpoint is not connected",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRank:
    """A rank that ended otherwise than well, or well but too early."""

    member: Member
    report: RankReport
    kind: FailureKind

    @property
    def is_victim(self) -> bool:
        """Whether its end is one that another's causes."""
        return self.kind is FailureKind.CONNECTION


def failed_ranks(reported: Iterable[tuple[Member, AssignmentReport]], observed: Observed) -> list[FailedRank]:
    """All failed ranks, the first cause first."""
    found = []
    for member, report in reported:
        leaving = observed.view(member.worker).leaving
        for rank in report.ranks:
            if rank.failed or cut_short(rank):
                found.append(FailedRank(member=member, report=rank, kind=kind_of(rank, leaving=leaving)))
    return sorted(found, key=_precedence)


def cut_short(rank: RankReport) -> bool:
    """Whether a rank ended well only because it was told to end, and not because its work was done.

    One that catches SIGTERM saves its state and exits with 0. One that ends well by itself is done, at any step: a
    script that has converged stops.
    """
    done = 0 < rank.until_step <= rank.completed_step
    return rank.succeeded and rank.ended_for != "" and not done


def _precedence(failed: FailedRank) -> tuple[bool, bool, float, int]:
    seen = failed.report.exited_at > 0  # 0: nobody saw when
    return failed.is_victim, not seen, failed.report.exited_at, failed.report.rank


def kind_of(rank: RankReport, *, leaving: bool) -> FailureKind:
    """Who is to answer for the end of this rank; ``leaving``: its worker is ending what it runs."""
    if leaving or rank.ended_for:
        return FailureKind.PREEMPTED
    number = -rank.exit_code if rank.exit_code < 0 else rank.exit_code - SIGNAL_EXIT_BASE
    if rank.out_of_memory and number == _SIGKILL:
        return FailureKind.MEMORY
    if rank.exit_unknown or number in _SENT_FROM_OUTSIDE:
        return FailureKind.KILLED
    # NCCL's watchdog and gloo's threads end the process with SIGABRT when a collective breaks.
    may_be_victim = rank.exit_code > 0 or number == _SIGABRT
    if may_be_victim and says_lost_connection(rank.error):
        return FailureKind.CONNECTION
    return FailureKind.SCRIPT


def says_lost_connection(error: str) -> bool:
    """Whether these last words are about the other side."""
    said = error.lower()
    return any(words in said for words in _LOST_CONNECTION)


def victims_of(others: Iterable[FailedRank]) -> tuple[Victim, ...]:
    """The record of these ranks for the event, by rank."""
    found = [
        Victim(
            rank=failed.report.rank,
            worker=failed.member.worker,
            exit_code=failed.report.exit_code,
            error=failed.report.error[:VICTIM_ERROR_MAX_CHARS],
        )
        for failed in others
    ]
    return tuple(sorted(found, key=lambda victim: victim.rank)[:VICTIMS_MAX])
