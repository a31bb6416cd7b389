"""Whether what a failed generation is waited for can still arrive in time, as far as its uploads show.

How fast a store will be in the next second nobody knows, so a wait is begun without a guess (salvages.py). But half
way through it there is something to go by: what moved since. Where even at twice that pace the rest cannot arrive
within the bound, the other half is saved.

    left        bytes that a rank's upload has to go
    moved       bytes that it went since this leader first saw it wait
    hopeless    left / (PACE_MAY_GROW * moved / seen_s) > seconds left of the bound

Rules:
- judged from half of the bound on, and never by less than a second of looking: reports come twice a second;
- an upload that shows nothing is not judged: it may wait for its turn, or for storage's last word;
- another leader begins to look anew: it can be later with its verdict, never sooner.
"""

from collections.abc import Iterator

from dtrain.coordinator.core.facts import Now, RankReport, ShardPhase
from dtrain.coordinator.core.failures import reports
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import GenerationState, InflightCheckpoint, JobState

PACE_MAY_GROW = 2.0  # the surviving ranks stand still meanwhile and leave the network to what is uploaded
JUDGED_FROM = 0.5  # of the bound
LOOK_MIN_S = 1.0
MIB = 1 << 20


def too_slow(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed, now: Now
) -> str:
    """Say which rank's upload cannot arrive within the bound; empty while all of them may."""
    looks = observed.upload_looks.setdefault((job.name, inflight.attempt), {})
    left_s = inflight.salvage_wait_s - (now.wall_s - inflight.salvage_time)
    patience_s = max(LOOK_MIN_S, JUDGED_FROM * inflight.salvage_wait_s)
    for rank, left_bytes in _under_way(job, generation, inflight, observed):
        first_bytes, since_s = looks.setdefault(rank.rank, (left_bytes, now.mono_s))
        seen_s = now.mono_s - since_s
        if seen_s < patience_s:
            continue
        moved_bytes = max(0, first_bytes - left_bytes)
        if left_bytes * seen_s > PACE_MAY_GROW * moved_bytes * left_s:
            return (
                f"rank {rank.rank} has {left_bytes / MIB:.1f} MiB to go, and sent {moved_bytes / MIB:.1f} MiB "
                f"in {seen_s:.1f} s"
            )
    return ""


def _under_way(
    job: JobState, generation: GenerationState, inflight: InflightCheckpoint, observed: Observed
) -> Iterator[tuple[RankReport, int]]:
    """Each rank whose staged bytes are on their way, and how many are left."""
    for _, report in reports(job, generation, observed):
        staged = {
            shard.rank
            for shard in report.shards
            if shard.attempt == inflight.attempt and shard.phase is ShardPhase.STAGED
        }
        for rank in report.ranks:
            if rank.rank in staged and rank.upload is not None:
                yield rank, max(0, rank.upload.bytes_total - rank.upload.bytes_done)
