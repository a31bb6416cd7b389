"""Anything that may happen to a cluster, in any order, also what cannot: for tests of what must always hold.

A `Step` is one happening with two free numbers that choose its worker, rank, job and the like. What the step
says may make no sense where it is taken (a shard of an attempt that never was, a trainer of nobody): facts
come from other machines, and no fact may break the coordinator.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from dtrain.common.errors import UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName, Step
from dtrain.common.packs import Pack, packs_prefix
from dtrain.common.specs import RetentionPolicy
from dtrain.coordinator.core.commands import StageCheckpoint, StartTrainers, StopTrainers, TakeStacks
from dtrain.coordinator.core.effects import DeleteAttempt
from dtrain.coordinator.core.facts import (
    ManifestRefused,
    ManifestWritten,
    MarkerWritten,
    PacksGone,
    RankReport,
    RankState,
    RestorePhase,
    RestoreReport,
    ShardPhase,
    ShardReport,
    StreamClosed,
)
from dtrain.coordinator.core.states import JobState
from tests.coordinator.support.clusters import DIGEST, Cluster, spec
from tests.coordinator.support.nodes import Held, Node

JOBS = ("a", "b")
WORKERS = ("w1", "w2", "w3")
RETENTION = (
    RetentionPolicy(keep_last=1),
    RetentionPolicy(keep_last=1, keep_every_steps=10),
    RetentionPolicy(),
    RetentionPolicy(keep_last=2, keep_every_seconds=30.0),
    RetentionPolicy(keep_last=1),
)


@dataclass(frozen=True, slots=True)
class Happening:
    kind: int  # index into HAPPENINGS
    x: int  # >= 0; what it chooses is up to the kind
    y: int


class Turmoil:
    """A cluster, and what it was told of storage, for whoever checks its decisions."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.manifests: set[tuple[str, int]] = set()

    def happen(self, what: Happening) -> None:
        happening = HAPPENINGS[what.kind % len(HAPPENINGS)]
        if happening in _RARE and what.x % 6:
            return
        happening(self, what.x, what.y)
        if happening in _OF_ONE_WORKER:  # and mostly all workers get on with it
            for other in range(1, len(self.cluster.nodes)):
                happening(self, what.x + other, what.y)

    def _node(self, x: int) -> Node | None:
        nodes = list(self.cluster.nodes.values())
        return nodes[x % len(nodes)] if nodes else None

    def _held(self, x: int, y: int) -> tuple[Node, str, Held] | None:
        node = self._node(x)
        if node is None or not node.held:
            return None
        job = sorted(node.held)[y % len(node.held)]
        return node, job, node.held[job]

    # -- people and time --

    def submit(self, x: int, y: int) -> None:
        nodes = 1 + y % 3
        given = spec(
            JOBS[x % 2], nnodes_min=1 + y % nodes, nnodes_max=nodes, nproc_per_node=1 + x % 2, max_restarts=3 * (y % 4),
            every_steps=5 if y % 2 else 0,
            every_seconds=0.0 if y % 2 else 3.0, hang_timeout_s=(2.0, None, 0.0)[x % 3],
            retention=RETENTION[y % len(RETENTION)],
        )  # fmt: skip
        self._refusable(lambda: self.cluster.submits(given, request=f"r{y % 3}", takes_over=x % 4 == 0))

    def cancel(self, x: int, y: int) -> None:
        self._refusable(lambda: self.cluster.cancels(JOBS[x % 2]))

    def checkpoint(self, x: int, y: int) -> None:
        self._refusable(lambda: self.cluster.asks_for_checkpoint(JOBS[x % 2]))

    def pin(self, x: int, y: int) -> None:
        self._refusable(lambda: self.cluster.pins(1 + y % 6, name=JOBS[x % 2], wanted=y % 3 == 0))

    def quarantine(self, x: int, y: int) -> None:
        self._refusable(lambda: self.cluster.quarantines(1 + y % 6, name=JOBS[x % 2]))

    @staticmethod
    def _refusable(ask: Callable[[], None]) -> None:
        try:
            ask()
        except UserError as refusal:
            assert str(refusal)

    def time(self, x: int, y: int) -> None:
        self.cluster.passes((0.1, 1.0, 3.0, 5.0, 700.0)[x % 5])

    def failover(self, x: int, y: int) -> None:
        self.cluster = self.cluster.fails_over()
        if x % 2:
            self.cluster.reconnect()

    # -- workers --

    def join(self, x: int, y: int) -> None:
        name = WORKERS[x % 3]
        if name not in self.cluster.nodes:
            self.cluster.joins(name, slots=1 + y % 4)
        else:
            self.cluster.registers(name)
            self.cluster.connects(name)

    def lose(self, x: int, y: int) -> None:
        node = self._node(x)
        if node is not None and y % 3:
            self.cluster.loses(node.name)
        elif node is not None:
            self.cluster.tells(StreamClosed(worker=node.name, stream=node.stream))

    def forget(self, x: int, y: int) -> None:
        node = self._node(x)
        if node is not None:
            node.journal, node.incarnation, node.number = f"journal {y}", f"incarnation {y}", 0
            node.held, node.commands = {}, []
            self.cluster.registers(node.name)
            self.cluster.connects(node.name)

    def obey(self, x: int, y: int) -> None:
        """A worker does, or refuses, what it is told."""
        node = self._node(x)
        if node is None:
            return
        for job in sorted(self.cluster.jobs):
            for command in self.cluster.commands(node.name, job):
                match command:
                    case StartTrainers():
                        ranks = {rank: RankReport(rank=rank, state=RankState.RUNNING) for rank in command.member.ranks}
                        node.held[job] = Held(generation=command.generation.number, ranks=ranks)
                    case StageCheckpoint():
                        pass
                    case StopTrainers():
                        node.held.pop(job, None)
                    case TakeStacks():
                        pass
                answer = "refused" if y % 11 == 0 else "done"
                self.cluster.answers(node.name, command.id, answer, term=self.cluster.term - y % 2)

    # -- trainers and storage --

    def train(self, x: int, y: int) -> None:
        found = self._held(x, y)
        if found is not None:
            node, _, held = found
            for rank, report in held.ranks.items():
                if report.state is RankState.RUNNING:
                    step = Step(report.completed_step + y % 4)
                    held.ranks[rank] = replace(
                        report, phase="training", completed_step=step, until_step=Step(40 * (x % 2)), tracking=True,
                        step_s=0.2,
                    )  # fmt: skip
            self.cluster.reports(node.name)

    def exit(self, x: int, y: int) -> None:
        found = self._held(x, y)
        if found is not None and found[2].ranks:
            node, _, held = found
            rank = sorted(held.ranks)[y % len(held.ranks)]
            code = (0, 0, 0, 1, -9)[y % 5]
            held.ranks[rank] = replace(
                held.ranks[rank], state=RankState.EXITED, exit_code=code, error="E" if code == 1 else "",
                exit_unknown=y % 7 == 0, exited_at=float(x),
            )  # fmt: skip
            self.cluster.reports(node.name)

    def shard(self, x: int, y: int) -> None:
        """A shard of the attempt in flight mostly, or of any other."""
        found = self._held(x, y)
        if found is None:
            return
        node, job, held = found
        state = self.cluster.jobs.get(JobName(job))
        inflight = state.inflight if state is not None else None
        for rank in sorted(held.ranks):
            attempt = inflight.attempt if inflight is not None and y % 5 else AttemptNumber(1 + x % 4)
            phase = ShardPhase.DURABLE if y % 4 else list(ShardPhase)[x % 5]
            held.shards[attempt, rank] = ShardReport(
                checkpoint=inflight.number if inflight is not None else CheckpointNumber(1),
                attempt=attempt,
                rank=rank,
                phase=phase,
                step=inflight.step if inflight is not None and y % 6 else Step(y),
                size_bytes=1,
                digest=DIGEST,
                packs=self._packs(state, attempt, rank, x + y),
            )
        self.cluster.reports(node.name)

    @staticmethod
    def _packs(state: JobState | None, attempt: AttemptNumber, rank: int, choice: int) -> tuple[Pack, ...]:
        """A pack of the attempt's own, those of its base, both, none; and seldom one that it must not name."""
        if state is None or state.inflight is None:
            return ()
        own = Pack(key=f"{packs_prefix(state.name, attempt)}rank-{rank}", size_bytes=1, digest=DIGEST)
        base = state.committed.get(CheckpointNumber(state.inflight.base))
        inherited = [pack for shard in base.shards if shard.rank == rank for pack in shard.packs][:2] if base else []
        if choice % 13 == 0:
            foreign = packs_prefix(state.name, max(1, attempt - 2))
            return (Pack(key=f"{foreign}rank-{rank}", size_bytes=1, digest=DIGEST),)
        return tuple([*inherited, own][choice % 2 :][: 1 + choice % 3] if choice % 5 else [])

    def save(self, x: int, y: int) -> None:
        """A checkpoint from the request to its marker, as far as the job and its workers allow."""
        job = JobName(JOBS[x % 2])
        for node in self.cluster.nodes.values():
            held = node.held.get(job)
            for rank, report in held.ranks.items() if held is not None else ():
                if held is not None and report.state is RankState.RUNNING:
                    step = Step(report.completed_step + 1)
                    held.ranks[rank] = replace(
                        report, phase="training", completed_step=step, until_step=Step(0), tracking=True, step_s=0.2
                    )
            self.cluster.reports(node.name)
        self._refusable(lambda: self.cluster.asks_for_checkpoint(job))
        state = self.cluster.jobs.get(job)
        if state is None or state.inflight is None:
            return
        for number in range(len(self.cluster.nodes)):
            self.shard(number, 2 - JOBS.index(job))  # of this job, durable
        self.manifests.add((job, state.inflight.attempt))
        written = ManifestWritten(job=job, attempt=state.inflight.attempt, manifest_key="m", manifest_digest="d")
        self.cluster.tells(written)
        self.cluster.decides()
        self.cluster.tells(MarkerWritten(job=job, checkpoint=CheckpointNumber(max(state.next_checkpoint, 1))))

    def restore(self, x: int, y: int) -> None:
        found = self._held(x, y)
        if found is not None:
            node, job, held = found
            state = self.cluster.jobs.get(JobName(job))
            restored = state.generation.restore if state is not None and state.generation is not None else None
            phase = RestorePhase.DAMAGED if y % 2 else RestorePhase.READY
            number = restored.checkpoint if restored is not None and y % 5 else 1 + y % 3
            held.restore = RestoreReport(phase=phase, checkpoint=number, key="blob", reason="bit")
            self.cluster.reports(node.name)

    def manifest(self, x: int, y: int) -> None:
        job = JobName(JOBS[x % 2])
        state = self.cluster.jobs.get(job)
        inflight = state.inflight if state is not None else None
        attempt = inflight.attempt if inflight is not None and y % 5 else AttemptNumber(1 + y % 4)
        if y % 7 == 0:
            self.cluster.tells(ManifestRefused(job=job, attempt=attempt, reason="no"))
            return
        self.manifests.add((job, attempt))
        self.cluster.tells(ManifestWritten(job=job, attempt=attempt, manifest_key=f"m{attempt}", manifest_digest="d"))

    def marker(self, x: int, y: int) -> None:
        self.cluster.tells(MarkerWritten(job=JobName(JOBS[x % 2]), checkpoint=CheckpointNumber(1 + y % 4)))
        if JobName(JOBS[x % 2]) in self.cluster.jobs:
            self.cluster.markers_are_read(JOBS[x % 2])

    def delete(self, x: int, y: int) -> None:
        """Storage confirms a deletion that is owed mostly, or any other."""
        job = JOBS[x % 2]
        owed = [e for e in self.cluster.owes(job) if isinstance(e, DeleteAttempt)] if job in self.cluster.jobs else []
        self.cluster.objects_deleted(owed[0].attempt if owed and y % 5 else 1 + y % 4, job)
        doomed = list(self.cluster.jobs[JobName(job)].doomed) if job in self.cluster.jobs else []
        self.cluster.tells(PacksGone(job=JobName(job), expired=doomed[0] if doomed and y % 5 else y))

    def stand_still(self, x: int, y: int) -> None:
        """Nothing moves for a while."""
        for _ in range(2):
            self.cluster.stands_still(2.5)
            self.cluster.decides()

    def say_where(self, x: int, y: int) -> None:
        """A worker says where its ranks stand."""
        found = self._held(x, y)
        if found is not None:
            for rank, report in found[2].ranks.items():
                found[2].ranks[rank] = replace(report, stack=f"frame {y % 3}", stack_number=report.stack_number + 1)
            self.cluster.reports(found[0].name)


HAPPENINGS: tuple[Callable[[Turmoil, int, int], None], ...] = (
    Turmoil.submit, Turmoil.cancel, Turmoil.checkpoint, Turmoil.time, Turmoil.failover, Turmoil.join, Turmoil.lose,
    Turmoil.forget, Turmoil.restore, Turmoil.exit, Turmoil.obey, Turmoil.train, Turmoil.shard, Turmoil.manifest,
    Turmoil.marker, Turmoil.pin, Turmoil.delete, Turmoil.quarantine, Turmoil.save, Turmoil.save,
    Turmoil.stand_still, Turmoil.say_where,
)  # fmt: skip
# So that a random walk gets somewhere: what throws a job back is rarer than what moves it forward.
_RARE = (Turmoil.cancel, Turmoil.failover, Turmoil.lose, Turmoil.forget, Turmoil.exit, Turmoil.quarantine)
_OF_ONE_WORKER = (Turmoil.obey, Turmoil.train, Turmoil.shard, Turmoil.join, Turmoil.say_where)


def seeded(seed: int, count: int) -> list[Happening]:
    """The same happenings for the same seed, in any process."""
    source = random.Random(seed)
    start = [Happening(5, 0, 3), Happening(0, 1, 2), Happening(0, 3, 2)]
    walk = [Happening(source.randrange(1000), source.randrange(1000), source.randrange(1000)) for _ in range(count)]
    return start + walk
