"""People's requests: submit, cancel, checkpoint, and what is going on."""

import logging

import grpc
import grpc.aio

from dtrain.common.errors import DtrainError, UserError
from dtrain.common.names import CheckpointNumber, JobName, job_name
from dtrain.common.specs import JobSpec
from dtrain.coordinator.core.checkpoints import untracked
from dtrain.coordinator.core.facts import CancelAsked, CheckpointAsked, PinAsked, QuarantineAsked, Request, SubmitAsked
from dtrain.coordinator.core.failures import reports
from dtrain.coordinator.core.observed import WorkerView
from dtrain.coordinator.core.placement import taken_slots, waiting_for
from dtrain.coordinator.core.states import JobPhase, JobState
from dtrain.coordinator.loop import LeaderLoop
from dtrain.coordinator.rpc.agents import NOT_LEADING
from dtrain.coordinator.rpc.convert import failure_to_wire, rank_to_wire, spec_from_wire, transfer_to_wire
from dtrain.coordinator.rpc.store_looks import StoreLooks
from dtrain.proto import agent_pb2 as wire
from dtrain.proto import agent_pb2_grpc
from dtrain.storage.keys import job_prefix
from dtrain.storage.uris import open_store, probe

logger = logging.getLogger(__name__)

REQUEST_MAX_CHARS = 256
QUARANTINE_TEXT_MAX = 2048  # characters of a key or a reason that go into the log; a key has 1024 bytes at most

# grpc.aio gives a context that is generic in its messages; nothing here depends on which.
_Context = grpc.aio.ServicerContext[object, object]


class JobRequests(agent_pb2_grpc.JobsServicer):
    """Answers people while this process leads. A refusal is INVALID_ARGUMENT with one sentence for them."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._stores = StoreLooks()
        self._loop: LeaderLoop | None = None

    def lead(self, loop: LeaderLoop) -> None:
        self._loop = loop

    def follow(self) -> None:
        self._loop = None

    async def _leading(self, context: _Context) -> LeaderLoop:
        if self._loop is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NOT_LEADING)
        assert self._loop is not None  # abort raises
        return self._loop

    async def _ask(self, request: Request, context: _Context) -> JobState:
        loop = await self._leading(context)
        try:
            return await loop.ask(request)
        except UserError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except DtrainError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise AssertionError("abort raises")

    async def Submit(self, request: wire.SubmitRequest, context: _Context) -> wire.SubmitReply:
        try:
            spec, number = spec_from_wire(request.spec), _request_number(request.request)
            if spec.store:
                loop = await self._leading(context)
                known = loop.jobs.get(spec.name)
                await self._stores.look(spec.store, lambda: _probe(spec, known))
            elif spec.checkpoints.every_steps or spec.checkpoints.every_seconds:
                raise UserError("checkpoints need a place: give --store file:///folder or s3://bucket/prefix.")
        except UserError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        asked = SubmitAsked(spec=spec, request=number, takes_over=request.takes_over)
        job = await self._ask(asked, context)
        newest = job.newest_restorable
        return wire.SubmitReply(run=job.run, resumes_step=newest.step if newest is not None else 0)

    async def Cancel(self, request: wire.CancelRequest, context: _Context) -> wire.CancelReply:
        await self._ask(CancelAsked(job=await _name(request.job, context)), context)
        return wire.CancelReply()

    async def Checkpoint(self, request: wire.CheckpointRequest, context: _Context) -> wire.CheckpointReply:
        name = await _name(request.job, context)
        try:
            asked = CheckpointAsked(job=name, request=_request_number(request.request))
        except UserError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        job = await self._ask(asked, context)
        if job.inflight is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the checkpoint was settled at once; see its outcome")
        assert job.inflight is not None
        return wire.CheckpointReply(
            checkpoint=job.inflight.number, attempt=job.inflight.attempt, step=job.inflight.step
        )

    async def Pin(self, request: wire.PinRequest, context: _Context) -> wire.PinReply:
        name = await _name(request.job, context)
        asked = PinAsked(job=name, checkpoint=CheckpointNumber(request.checkpoint), pinned=request.pinned)
        await self._ask(asked, context)
        return wire.PinReply()

    async def Quarantine(self, request: wire.QuarantineRequest, context: _Context) -> wire.QuarantineReply:
        asked = QuarantineAsked(
            job=await _name(request.job, context),
            checkpoint=CheckpointNumber(request.checkpoint),
            key=request.key[:QUARANTINE_TEXT_MAX],
            reason=request.reason[:QUARANTINE_TEXT_MAX],
        )
        await self._ask(asked, context)
        return wire.QuarantineReply()

    async def Status(self, request: wire.StatusRequest, context: _Context) -> wire.StatusReply:
        loop = await self._leading(context)
        if request.job:
            name = await _name(request.job, context)
            if name not in loop.jobs:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND, f"there is no job named {name!r}: see the names with: dtrain list"
                )
            names = [name]
        else:
            names = sorted(loop.jobs)
        jobs = [_status(loop, loop.jobs[name]) for name in names]
        return wire.StatusReply(term=loop.term, leader=self._identity, jobs=jobs)

    async def Workers(self, request: wire.WorkersRequest, context: _Context) -> wire.WorkersReply:
        loop = await self._leading(context)
        views = sorted(loop.observed.workers.values(), key=lambda view: view.worker)
        return wire.WorkersReply(workers=[_worker(loop, view) for view in views])


def _probe(spec: JobSpec, known: JobState | None) -> None:
    """In a thread: the store can be used, and holds nothing of another job of this name.

    Attempts are numbered by the log. A log that begins anew over a store that an older one has filled would give
    its numbers a second time, and a committed checkpoint could be overwritten.
    """
    store = open_store(spec.store)
    probe(store)
    if known is not None and spec.store == known.spec.store:
        return
    if known is not None and any(c.store == spec.store for c in known.committed.values()):
        return
    found = next(iter(store.list(job_prefix(spec.name))), None)
    if found is not None:
        raise UserError(
            f"the store already holds checkpoints of a job named {spec.name!r} that this etcd knows nothing of "
            f"({found.key}): choose another --name or another --store."
        )


def _request_number(text: str) -> str:
    """What a client tells its requests apart by; it goes into the log."""
    if len(text) > REQUEST_MAX_CHARS:
        raise UserError(f"a request's number has {len(text)} characters: give it {REQUEST_MAX_CHARS} at most.")
    return text


async def _name(text: str, context: _Context) -> JobName:
    try:
        return job_name(text)
    except UserError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise


def _status(loop: LeaderLoop, job: JobState) -> wire.JobStatus:
    newest = job.newest_restorable
    generation = job.generation
    status = wire.JobStatus(
        job=job.name,
        phase=job.phase.value,
        run=job.run,
        generation=job.last_generation,
        world_size=generation.world_size if generation is not None else 0,
        restarts=job.restarts,
        restarts_used=job.restarts_used,
        max_restarts=job.spec.max_restarts,
        committed_checkpoint=newest.number if newest is not None else 0,
        committed_step=newest.step if newest is not None else 0,
        checkpoints=len(job.committed),
        reason=job.reason,
        exit_code=job.exit_code,
        store=job.spec.store,
    )
    if job.last_failure is not None:
        status.last_failure.CopyFrom(failure_to_wire(job.last_failure))
    if job.phase is JobPhase.PENDING:
        status.waiting_for = waiting_for(job, loop.observed, loop.jobs, loop.now())
    elif job.inflight is not None and job.inflight.salvaging:
        status.waiting_for = f"checkpoint {job.inflight.number} to be stored, which its failed generation had staged"
    elif generation is not None:
        status.waiting_for = untracked(job, generation, loop.observed)
    if generation is not None:
        for member, report in reports(job, generation, loop.observed):
            status.ranks.extend(wire.JobRank(worker=member.worker, report=rank_to_wire(rank)) for rank in report.ranks)
            if report.restore.transfer is not None:
                transfer = transfer_to_wire(report.restore.transfer)
                status.restores.append(wire.JobRestore(worker=member.worker, transfer=transfer))
    return status


def _worker(loop: LeaderLoop, view: WorkerView) -> wire.WorkerStatus:
    status = wire.WorkerStatus(worker=view.worker, registered=view.registration is not None, connected=view.connected)
    if view.registration is not None:
        status.address = view.registration.address
        status.slots = view.registration.slots
    if view.snapshot is not None:
        status.host = view.snapshot.host
        status.address = view.snapshot.address
        status.slots = view.snapshot.slots
        status.phase = view.snapshot.phase
        status.version = view.snapshot.version
    status.slots_used = taken_slots(view, JobName(""), loop.jobs)
    return status
