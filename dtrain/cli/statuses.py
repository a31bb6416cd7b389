"""Where `list` and `status` read: what leads, or in a data folder where nothing does, the log itself.

A data folder where nothing runs still holds its log. Its etcd is then started for the moment of the read, so
that ``dtrain list`` and ``dtrain history`` answer after a run as they do during it. A run that the log does
not know to have ended, in a folder where nothing runs, was interrupted: that is what is shown.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from dtrain.cli.clients import RETRY_S, Address, Coordinator, active_cluster, connect_etcd, job_of
from dtrain.common.errors import UserError
from dtrain.common.names import JobName
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobPhase, JobState
from dtrain.coordinator.history import read_all
from dtrain.coordinator.rpc.convert import failure_to_wire
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire
from dtrain.standalone.data_folder import DataFolder, FolderInUseError

COMING_OR_GOING_S = 20.0  # a run that is just being started, or taken down, holds its folder and cannot be asked

Read = Callable[[EtcdClient, str], Awaitable[None]]


async def read_log(etcd: str | None, prefix: str, data_dir: str, read: Read) -> None:
    """Call ``read`` with a client of the log's etcd and the prefix of its keys."""
    while True:
        address = active_cluster(etcd, prefix, data_dir)
        if address is not None:
            async with connect_etcd(address) as client:
                await read(client, address.prefix)
            return
        if await _read_asleep(prefix, data_dir, read):
            return


async def read_statuses(etcd: str | None, prefix: str, data_dir: str, *, job: str) -> list[wire.JobStatus]:
    """Status of one job, or of all with an empty name."""
    found: list[wire.JobStatus] = []

    async def read(client: EtcdClient, prefix: str) -> None:
        address = Address(etcd=client.endpoints, prefix=prefix)
        # Its etcd was started for this read (a killed leader's key may still be there), or only to be looked into.
        asleep = not etcd and DataFolder.at(data_dir).active() is None
        if asleep or (not etcd and await client.get(f"{prefix}/leader") is None):
            found.extend(await _statuses_of_log(client, address, job))
            return
        async with Coordinator(client, prefix) as coordinator:
            reply = await coordinator.status(job)
        found.extend([job_of(reply, job)] if job else reply.jobs)

    await read_log(etcd, prefix, data_dir, read)
    return found


async def _read_asleep(prefix: str, data_dir: str, read: Read) -> bool:
    """Read from a folder where nothing runs. False: somebody does run there, who may be found in a moment."""
    from dtrain.standalone.cluster import with_etcd_of

    folder = DataFolder.at(data_dir)
    if not folder.has_history():
        raise UserError(
            f"nothing has run in data folder {folder.root} yet: "
            "give --etcd HOST:PORT of a cluster, or --data-dir of an earlier run."
        )

    async def use(endpoint: str) -> None:
        async with EtcdClient([endpoint]) as client:
            await read(client, prefix)

    give_up = time.monotonic() + COMING_OR_GOING_S
    while True:
        try:
            await with_etcd_of(folder, use)
            return True
        except FolderInUseError:
            if folder.active() is not None:
                return False
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(RETRY_S)


async def _statuses_of_log(client: EtcdClient, address: Address, job: str) -> list[wire.JobStatus]:
    statuses = []
    for events in (await read_all(client, address.prefix)).values():
        state: JobState | None = None
        for event in events:
            state = evolve(state, event)
        if state is not None and job in ("", state.name):
            statuses.append(status_of_log(state))
    if job and not statuses:
        raise UserError(f"there is no job named {JobName(job)!r}: see the names with: dtrain list")
    return statuses


def status_of_log(state: JobState) -> wire.JobStatus:
    """What the log alone knows of a job that nobody runs."""
    newest = state.newest_restorable
    ended = state.ended
    return wire.JobStatus(
        job=state.name,
        phase=state.phase if ended else JobPhase.INTERRUPTED,
        run=state.run,
        generation=state.last_generation,
        world_size=state.generation.world_size if state.generation is not None else 0,
        restarts=state.restarts,
        restarts_used=state.restarts_used,
        max_restarts=state.spec.max_restarts,
        committed_checkpoint=newest.number if newest is not None else 0,
        committed_step=newest.step if newest is not None else 0,
        checkpoints=len(state.committed),
        reason=state.reason if ended else "its launcher ended before it did; run it again to continue it",
        exit_code=state.exit_code if ended else 1,
        store=state.spec.store,
        last_failure=None if state.last_failure is None else failure_to_wire(state.last_failure),
    )
