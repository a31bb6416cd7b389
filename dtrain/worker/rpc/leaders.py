"""Knows who leads: the leader key in etcd, read every few seconds and watched in between, while the agent lives.

The key's create revision is the leader's term, so of two leaders that both believe in themselves the agent
follows the one that etcd made last. While etcd is away the last known leader stays: the stream to it may be as
good as ever.
"""

import asyncio
import logging
import random
from dataclasses import dataclass

import msgspec

from dtrain.common.errors import PermanentError, RetryableError
from dtrain.common.names import Term
from dtrain.etcd.client import EtcdClient
from dtrain.etcd.keyvalues import KeyValue
from dtrain.etcd.watches import ChangeKind, watch_a_while

logger = logging.getLogger(__name__)

RETRY_S = 0.5  # pause before the key is read again after etcd failed; drawn between half and one and a half


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    term: Term
    address: str  # host:port of its Agents service


class _LeaderValue(msgspec.Struct):
    address: str


class Leaders:
    """The newest leader that etcd told of."""

    def __init__(self, etcd: EtcdClient, prefix: str) -> None:
        self._etcd = etcd
        self._key = f"{prefix.rstrip('/')}/leader"
        self.current: Leader | None = None
        self.changed = asyncio.Event()  # set at each change; whoever waits clears it

    async def follow(self) -> None:
        """Keep ``current`` right until cancelled."""
        while True:
            try:
                found, revision = await self._etcd.range_prefix(self._key)
                for kv in found:
                    self._note(kv)
                async for batch in watch_a_while(self._etcd, self._key, from_revision=revision + 1):
                    for event in batch.events:
                        if event.kind is ChangeKind.PUT:
                            self._note(event.kv)
            except (RetryableError, PermanentError) as error:  # also Compacted: read again, then watch from there
                logger.info("the leader is not known from etcd now: %s", error)
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))

    def _note(self, kv: KeyValue) -> None:
        if kv.key != self._key:
            return
        try:
            address = msgspec.json.decode(kv.value, type=_LeaderValue).address
        except msgspec.DecodeError as error:
            logger.warning("%s does not say where the leader is: %s", self._key, error)
            return
        leader = Leader(term=Term(kv.create_revision), address=address)
        if leader != self.current and (self.current is None or leader.term >= self.current.term):
            self.current = leader
            self.changed.set()
