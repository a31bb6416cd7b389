"""Does storage still hold what the log calls committed? Asked by a person, answered checkpoint by checkpoint.

The log says what is committed and what the digest of each manifest is; storage is read by this command itself.
Retention goes on meanwhile: what has expired since the look began is no damage. What a deep look finds damaged
is reported to the coordinator, whose event keeps the checkpoint from ever being restored from; where none leads
it is only said, since a restore verifies every byte as well and falls back by itself.
"""

import asyncio
from dataclasses import dataclass, replace

from dtrain.cli.clients import Coordinator, active_cluster
from dtrain.cli.statuses import read_log
from dtrain.common.errors import RetryableError, ShardDamagedError, UserError
from dtrain.common.names import CheckpointNumber, JobName
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import CommittedCheckpoint, JobState
from dtrain.coordinator.history import read_history
from dtrain.etcd.client import EtcdClient
from dtrain.storage.keys import job_prefix, marker_key
from dtrain.storage.objects import ObjectStore
from dtrain.storage.patient import PatientStore
from dtrain.storage.presence import damaged_marker, missing_parts
from dtrain.storage.retrying import with_retries
from dtrain.storage.uris import open_store
from dtrain.storage.verify import verify_checkpoint

READ_DEADLINE_S = 30.0  # for one read, all tries together: a person waits, and may ask again


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found of one checkpoint."""

    checkpoint: CommittedCheckpoint
    deep: bool  # every byte was read; else only the manifest, and that all is there
    damage: tuple[ShardDamagedError, ...] = ()  # in what a restore would read
    marker: ShardDamagedError | None = None  # what is wrong with its commit marker, which no restore reads
    recorded: bool = False  # the log says now that it is never restored from again

    @property
    def sound(self) -> bool:
        return not self.damage and self.marker is None


async def read_state(client: EtcdClient, prefix: str, job: JobName) -> JobState:
    """The fold of a job's log. Raises UserError if there is no such job, LogDamagedError naming the key."""
    state: JobState | None = None
    for event in await read_history(client, prefix, job):
        state = evolve(state, event)
    if state is None:
        raise UserError(f"there is no job named {job!r}: see the names with: dtrain list")
    return state


async def verify_job(
    etcd: str | None, prefix: str, data_dir: str, job: JobName, *, deep: bool
) -> tuple[JobState, list[Verdict]]:
    """The job, and a verdict on each checkpoint that could be restored from, oldest first."""
    found: list[tuple[JobState, list[Verdict]]] = []

    async def read(client: EtcdClient, prefix: str) -> None:
        before = await read_state(client, prefix, job)
        verdicts = await asyncio.to_thread(_look, before, deep)
        after = await read_state(client, prefix, job)
        verdicts = [verdict for verdict in verdicts if verdict.checkpoint.number in _candidates(after)]
        led = active_cluster(etcd, prefix, data_dir) is not None and await client.get(f"{prefix}/leader") is not None
        if led and deep:
            async with Coordinator(client, prefix) as coordinator:
                verdicts = [await _record(coordinator, job, verdict) for verdict in verdicts]
        found.append((after, verdicts))

    await read_log(etcd, prefix, data_dir, read)
    return found[-1]


def _candidates(state: JobState) -> set[CheckpointNumber]:
    return {number for number, c in state.committed.items() if not c.quarantined and not c.expired}


def _look(state: JobState, deep: bool) -> list[Verdict]:
    """In a thread: read storage."""
    stores: dict[str, ObjectStore] = {}
    verdicts = []
    for number in sorted(_candidates(state)):
        checkpoint = state.committed[number]
        try:
            if checkpoint.store not in stores:
                stores[checkpoint.store] = _opened(checkpoint.store, state.name)
            verdicts.append(_judge(stores[checkpoint.store], state.name, checkpoint, deep))
        except RetryableError as error:
            raise UserError(
                f"store {checkpoint.store} cannot be read now ({error}): nothing is known of checkpoint {number} "
                "and newer ones. Try again when it answers."
            ) from error
    return verdicts


def _opened(uri: str, job: JobName) -> ObjectStore:
    """A store that holds something of the job.

    One that holds nothing at all is far more often another machine's folder, or one that is not mounted here,
    than a store that lost everything: nobody's checkpoints are condemned for that.
    """
    store = open_store(uri)
    first = with_retries(lambda: next(iter(store.list(job_prefix(job))), None), deadline_s=READ_DEADLINE_S)
    if first is None:
        raise UserError(
            f"store {uri} shows nothing of job {job!r} on this machine: run this where the store can be read."
        )
    return PatientStore(store, deadline_s=READ_DEADLINE_S)


def _judge(store: ObjectStore, job: JobName, checkpoint: CommittedCheckpoint, deep: bool) -> Verdict:
    look = verify_checkpoint if deep else missing_parts
    damage = tuple(look(store, checkpoint.manifest_key, checkpoint.manifest_digest))
    marker = None
    if checkpoint.marked:
        marker = damaged_marker(store, marker_key(job, checkpoint.number), checkpoint.manifest_digest)
    return Verdict(checkpoint=checkpoint, deep=deep, damage=damage, marker=marker)


async def _record(coordinator: Coordinator, job: JobName, verdict: Verdict) -> Verdict:
    if not verdict.damage:
        return verdict
    first = verdict.damage[0]
    await coordinator.quarantine(job, verdict.checkpoint.number, key=first.key, reason=first.why)
    return replace(verdict, recorded=True)
