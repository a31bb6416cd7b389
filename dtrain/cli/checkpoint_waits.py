"""Ask for a checkpoint and wait for its commit: a request is a wish, the event is the fact.

An attempt can miss its step or fail. A missed one is asked for again, because the mend is known; a failed one
is reported with the reason that stands in the log. A job that ends settles its attempt first, so waiting ends.
"""

import asyncio
from dataclasses import dataclass

from dtrain.cli.clients import Address, Coordinator, connect_etcd
from dtrain.common.errors import RetryableError, UserError
from dtrain.common.names import JobName
from dtrain.coordinator.core.events import CheckpointAborted, CheckpointCommitted, RecordedEvent
from dtrain.coordinator.history import follow_history
from dtrain.etcd.client import EtcdClient
from dtrain.proto import agent_pb2 as wire

MISSES_MAX = 5  # the coordinator doubles its lead after each


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """The attempt missed its step: ask again."""


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
