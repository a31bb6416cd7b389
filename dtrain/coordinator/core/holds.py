"""Ranks that hold their last state for a checkpoint that can never be.

Behind its last step a rank waits until it was asked for the state of that step, whatever comes of it. A checkpoint is
of all ranks at one step. Where a peer has ended its steps, or is past that one, no checkpoint would ever be started,
and the rank would hold on for hours. So one is started all the same: it is aborted in the end, and the rank goes on.
"""

from dtrain.coordinator.core import finished
from dtrain.coordinator.core.checkpoints import started_at
from dtrain.coordinator.core.events import Cause, Decision
from dtrain.coordinator.core.facts import RankReport, RankState
from dtrain.coordinator.core.failures import reports
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import GenerationState, JobState


def release(job: JobState, generation: GenerationState, observed: Observed) -> Decision | None:
    """CheckpointStarted for a rank that holds on for nothing; None if none does. Only while no attempt is in flight."""
    ranks = [rank for _, report in reports(job, generation, observed) for rank in report.ranks]
    gone = [rank for member in finished.unheard(job, generation, observed) for rank in member.ranks]
    for rank in sorted(filter(_holds, ranks), key=lambda rank: (rank.completed_step, rank.rank)):
        past = [peer.rank for peer in ranks if _is_past(peer, rank)] + gone
        if past:
            detail = f"rank {rank.rank} holds step {rank.completed_step}, which rank {min(past)} cannot give any more"
            cause = Cause(fact="held_in_vain", rank=rank.rank, detail=detail)
            return Decision(event=started_at(job, generation, rank.completed_step), cause=cause)
    return None


def _holds(rank: RankReport) -> bool:
    return rank.state is RankState.RUNNING and rank.phase == "holding" and rank.completed_step == rank.until_step


def _is_past(peer: RankReport, holder: RankReport) -> bool:
    if peer.state is not RankState.RUNNING:
        return peer.succeeded
    goes_on = peer.completed_step == holder.completed_step < peer.until_step  # it looked for requests of that step
    return peer.phase in ("left", "finished") or peer.completed_step > holder.completed_step or goes_on
