"""A worker as a test imagines it: what it holds, and the snapshot that says so."""

from dataclasses import dataclass, field

from dtrain.common.names import Generation, JobName, Term, WorkerId
from dtrain.coordinator.core.facts import (
    AssignmentReport,
    CommandReport,
    RankReport,
    RestorePhase,
    RestoreReport,
    ShardReport,
    WorkerSnapshot,
)


@dataclass(slots=True, kw_only=True)
class Held:
    """What a worker holds of one job."""

    generation: int
    ranks: dict[int, RankReport]
    shards: dict[tuple[int, int], ShardReport] = field(default_factory=dict)  # by (attempt, rank)
    restore: RestoreReport = field(default_factory=lambda: RestoreReport(phase=RestorePhase.NONE))


@dataclass(slots=True, kw_only=True)
class Node:
    """A worker as the test imagines it."""

    name: WorkerId
    slots: int
    journal: str
    incarnation: str
    phase: str = "idle"
    leaving: bool = False
    stream: int = 0
    number: int = 0  # of its last snapshot
    held: dict[str, Held] = field(default_factory=dict)
    commands: list[CommandReport] = field(default_factory=list)

    def snapshot(self, term: Term) -> WorkerSnapshot:
        assignments = tuple(
            AssignmentReport(
                job=JobName(job),
                generation=Generation(held.generation),
                phase="training",
                ranks=tuple(held.ranks.values()),
                shards=tuple(held.shards.values()),
                restore=held.restore,
                position_seq=0,
                position_digest="",
            )
            for job, held in self.held.items()
        )
        return WorkerSnapshot(
            worker=self.name,
            journal=self.journal,
            incarnation=self.incarnation,
            number=self.number,
            term=term,
            version="0",
            host=self.name,
            address=f"{self.name}.example:4000",
            slots=self.slots,
            rendezvous_port=29500 + sum(held.generation for held in self.held.values()),  # another for each
            phase=self.phase,
            leaving=self.leaving,
            assignments=assignments,
            commands=tuple(self.commands),
        )
