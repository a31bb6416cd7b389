"""Hears every snapshot: in the moment in which a worker tells it, and looks at that worker's disk; and as it arrives.

What is told may be acted upon, and the agent may be killed right behind it: so nothing may be told that its journal
does not hold yet. It may not hold it any more: a heartbeat that comes while a newer attempt or generation is written
tells the state before. The disk is read as anybody can read it, with SQL.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.proto import agent_pb2 as wire
from tests.sim.machines import Process

if TYPE_CHECKING:
    from tests.sim.nodes import Node

NEWEST = 3  # commands that are looked up; those before were looked up when they were told first
_ACK = "SELECT 1 FROM shards WHERE job = ? AND rank = ? AND attempt = ?"
_EXIT = "SELECT 1 FROM ranks WHERE job = ? AND generation = ? AND rank = ? AND exited != 'null'"
_NEWER_ATTEMPT = """SELECT 1 FROM generations WHERE job = ?
    AND (generation > ? OR (generation = ? AND json_extract(checkpoint, '$.attempt') > ?))"""
_NEWER_GENERATION = "SELECT 1 FROM generations WHERE job = ? AND generation > ?"
_COMMAND = "SELECT 1 FROM commands WHERE id = ?"
_TERM = "SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'term'"


Question = tuple[str, tuple[object, ...]]  # a statement and its parameters
Claim = tuple[str, *tuple[Question, ...]]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a coordinator's machine heard of a worker, and when: how many ranks of each job run there."""

    at_s: float
    running: dict[str, int]


class Witness:
    """``found``: what was told too early. ``heard``: by coordinator's machine and worker, as it arrived."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.heard: dict[tuple[str, str], list[Heard]] = {}
        self._newest: dict[tuple[str, str], dict[str, int]] = {}  # number of each incarnation's newest snapshot there

    def arrives(self, host: str, at_s: float, message: object) -> None:
        """Note what has reached a coordinator, if it is newer than what had come before it."""
        if isinstance(message, wire.Snapshot):
            newest = self._newest.setdefault((host, message.worker), {})
            overtaken = message.incarnation in newest and message.incarnation != list(newest)[-1]
            if overtaken or message.number <= newest.get(message.incarnation, -1):
                return
            newest[message.incarnation] = message.number
            running = {a.job: sum(rank.state == wire.RUNNING for rank in a.ranks) for a in message.assignments}
            self.heard.setdefault((host, message.worker), []).append(Heard(at_s, running))

    def hears(self, process: Process, message: object) -> None:
        if not isinstance(message, wire.Snapshot):
            return
        node: Node = process.machine.node  # type: ignore[attr-defined]
        for told, *questions in _claims(message):
            if not any(node.journal_rows(statement, parameters) for statement, parameters in questions):
                self.found.append(f"{process.name} told {told}, and its journal did not hold it")
        terms = node.journal_rows(_TERM, ())
        if terms and terms[0][0] < message.term:
            self.found.append(f"{process.name} told of term {message.term}, and its journal did not hold it")


def _claims(snapshot: wire.Snapshot) -> list[Claim]:
    """What a snapshot claims, in words, and how it is looked up: one answer is enough."""
    claims: list[Claim] = []
    for held in snapshot.assignments:
        job, generation = held.job, held.generation
        for shard in held.shards:
            if shard.state == wire.DURABLE:
                what = f"that rank {shard.rank} has stored attempt {shard.attempt}"
                overtaken = _NEWER_ATTEMPT, (job, generation, generation, shard.attempt)
                claims.append((what, (_ACK, (job, shard.rank, shard.attempt)), overtaken))
        for rank in held.ranks:
            if rank.state == wire.EXITED:
                what = f"the end of rank {rank.rank} of generation {generation}"
                overtaken = _NEWER_GENERATION, (job, generation)
                claims.append((what, (_EXIT, (job, generation, rank.rank)), overtaken))
    for command in snapshot.commands[-NEWEST:]:
        if command.state != wire.REFUSED:  # a refusal changed nothing, and is not kept
            claims.append((f"what became of {command.id}", (_COMMAND, (command.id,))))
    return claims
