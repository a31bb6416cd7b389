"""Ask for something and wait until the log has it: a request is a wish, the event is the fact.

The log is watched, and not the coordinator asked: a run on this machine is taken down as soon as its job has
ended, and its etcd is the last to go.

An attempt at a checkpoint can miss its step or fail. A missed one is asked for again, because the mend is
known; a failed one is reported with the reason that stands in the log. A job that ends settles its attempt
first, so waiting ends.
"""

import asyncio
from dataclasses import dataclass

from dtrain.cli.clients import Address, Coordinator, connect_etcd, job_of
from dtrain.common.errors import RetryableError, UserError
from dtrain.common.names import JobName
from dtrain.coordinator.core.events import CheckpointAborted, CheckpointCommitted, RecordedEvent
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobState
from dtrain.coordinator.history import follow_history
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire

MISSES_MAX = 5  # the coordinator doubles its lead after each


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """The attempt missed its step: ask again."""


async def cancel_and_wait(address: Address, job: JobName, timeout_s: float) -> JobState:
    """Ask for a job's end; return its state when its run has ended."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            connect_etcd(address) as client,
            Coordinator(client, address.prefix) as coordinator,
        ):
            run = job_of(await coordinator.status(job), job).run
            await coordinator.cancel(job)
            state: JobState | None = None
            async for recorded in follow_history(client, address.prefix, job):
                state = evolve(state, recorded)
                if state.run >= run and state.ended:
                    return state
            raise AssertionError("a history is followed for ever")
    except TimeoutError as error:
        raise RetryableError(
            f"job {job} has not ended after {timeout_s:g} s; it is being cancelled: dtrain status {job}"
        ) from error


async def wait_for_checkpoint(address: Address, job: JobName, request: str, timeout_s: float) -> CheckpointCommitted:
    """Return the commit of a checkpoint that was asked for now."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            connect_etcd(address) as client,
            Coordinator(client, address.prefix) as coordinator,
        ):
            for miss in range(MISSES_MAX):
                reply = await coordinator.checkpoint(job, f"{request}-{miss}")
                outcome = await _outcome(client, address.prefix, job, reply)
                if isinstance(outcome, CheckpointCommitted):
                    return outcome
    except TimeoutError as error:
        raise RetryableError(
            f"the checkpoint of {job} is not committed after {timeout_s:g} s; it goes on: dtrain history {job}"
        ) from error
    raise RetryableError(f"{MISSES_MAX} attempts in a row missed their step: see 'dtrain history {job}'")


async def _outcome(
    client: EtcdClient, prefix: str, job: JobName, reply: wire.CheckpointReply
) -> CheckpointCommitted | Missed:
    async for recorded in follow_history(client, prefix, job):
        outcome = _judge(recorded, reply)
        if outcome is not None:
            return outcome
    raise AssertionError("a history is followed for ever")


def _judge(recorded: RecordedEvent, reply: wire.CheckpointReply) -> CheckpointCommitted | Missed | None:
    match recorded.event:
        case CheckpointCommitted(attempt=attempt) as committed if attempt >= reply.attempt:
            return committed
        case CheckpointAborted(attempt=attempt, missed=True) if attempt == reply.attempt:
            return Missed()
        case CheckpointAborted(attempt=attempt, reason=reason) if attempt == reply.attempt:
            raise UserError(f"checkpoint {reply.checkpoint} was aborted: {reason}")
        case _:
            return None
