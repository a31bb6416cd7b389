"""Packs: which checkpoint an attempt may build upon, and when a pack may be deleted.

    event                what becomes of a pack
    -------------------  --------------------------------------------------------------
    CheckpointCommitted  those it names are kept
    CheckpointDeleted    those that no checkpoint names any more may expire
    PacksExpired         may be deleted
    PacksDeleted         storage confirmed that it is gone
    CheckpointAborted    those that the attempt made are swept with its other objects

That a committed checkpoint never misses a pack rests on one rule: an attempt names only packs that it made itself, and
packs that its base names; and its base is in the log, committed and not expired, as long as the attempt is in flight.
So a pack that no checkpoint in the log names can never be named again, and to delete it is safe for ever. An
acknowledgement that breaks the rule aborts its attempt, and the fold refuses a log in which one was committed.
"""

from collections.abc import Iterable

from dtrain.common.names import CheckpointNumber
from dtrain.common.packs import packs_prefix
from dtrain.coordinator.core.events import Cause, Decision, PacksDeleted, PacksExpired, ShardRecord
from dtrain.coordinator.core.observed import Observed
from dtrain.coordinator.core.states import CommittedCheckpoint, InflightCheckpoint, JobState

PACKS_PER_EVENT_MAX = 1000  # keys of about 100 bytes: far below what etcd takes in one value


def base_for_next(job: JobState) -> int:
    """Number of the checkpoint that the next attempt builds upon; 0 for none."""
    newest = job.newest_restorable
    if newest is None or newest.store != job.spec.store or _is_tainted(job, newest):
        return 0
    return int(newest.number)


def why_base_is_lost(job: JobState, inflight: InflightCheckpoint) -> str:
    """Why nothing can be built upon the base of the attempt in flight any more; empty if all is well."""
    if not inflight.base:
        return ""
    base = job.committed.get(CheckpointNumber(inflight.base))
    if base is None or base.expired or base.quarantined or _is_tainted(job, base):
        return f"checkpoint {inflight.base}, which it builds upon, was found damaged"
    return ""


def _is_tainted(job: JobState, checkpoint: CommittedCheckpoint) -> bool:
    """Whether it names a pack that was found damaged in another checkpoint. It is not condemned before it was read."""
    damaged = {c.damaged_key for c in job.committed.values() if c.quarantined}
    return any(pack.key in damaged for pack in checkpoint.packs)


def why_foreign(job: JobState, inflight: InflightCheckpoint, shards: Iterable[ShardRecord]) -> str:
    """Why these acknowledged shards must not be committed; empty if they name only what the attempt may name."""
    own = packs_prefix(job.name, inflight.attempt)
    base = job.committed.get(CheckpointNumber(inflight.base))
    inherited = base.packs if base is not None else frozenset()
    for shard in shards:
        for pack in shard.packs:
            if not pack.key.startswith(own) and pack not in inherited:
                return f"rank {shard.rank} names pack {pack.key}, which is neither its attempt's nor its base's"
    return ""


def named(job: JobState) -> set[str]:
    """Keys of the packs that committed checkpoints name, those included that are being deleted."""
    return {pack.key for checkpoint in job.committed.values() for pack in checkpoint.packs}


def expire(job: JobState) -> Decision | None:
    """PacksExpired for packs that no checkpoint names any more, or None."""
    idle = sorted(job.packs.keys() - named(job))
    if not idle:
        return None
    store = job.packs[idle[0]]
    keys = tuple(key for key in idle if job.packs[key] == store)[:PACKS_PER_EVENT_MAX]
    return Decision(event=PacksExpired(keys=keys, store=store), cause=Cause(fact="no_checkpoint_names_them"))


def confirm(job: JobState, observed: Observed) -> Decision | None:
    """PacksDeleted for what storage has confirmed to be gone, or None."""
    for number in job.doomed:
        if (job.name, number) in observed.packs_deleted:
            return Decision(event=PacksDeleted(expired=number), cause=Cause(fact="objects_deleted"))
    return None
