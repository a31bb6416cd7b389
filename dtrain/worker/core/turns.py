"""One turn of the machine: the state as it changes while one input is handled, and what was decided so far.

A turn lives for one call of ``step`` and is seen by nobody else, so the machine stays a pure function while
its handlers can be read as sentences.
"""

from dataclasses import replace

from dtrain.common.names import JobName, Term
from dtrain.worker.core.actions import Action, JournalAssignment, JournalCommand, JournalForgotten, JournalTerm
from dtrain.worker.core.states import (
    ASSIGNMENTS_MAX,
    COMMANDS_MAX,
    Assignment,
    CommandRecord,
    CommandStage,
    GenerationStage,
    NodeState,
    RankRun,
    ShardAttempt,
)


class Turn:
    """The state in one turn, and the actions decided in it."""

    def __init__(self, state: NodeState, now: float) -> None:
        self.state = state
        self.now = now
        self.actions: list[Action] = []

    def act(self, action: Action) -> None:
        self.actions.append(action)

    def assignment(self, job: JobName) -> Assignment | None:
        return self.state.assignments.get(job)

    def put(self, assignment: Assignment, *, journal: bool = False) -> None:
        """Replace the job's assignment; ``journal`` where a restarted agent must know the change."""
        others = dict(self.state.assignments)
        others[assignment.job] = assignment
        if len(others) > ASSIGNMENTS_MAX:
            self._forget_one(others, but=assignment.job)
        self.state = replace(self.state, assignments=others)
        if journal:
            self.act(JournalAssignment(assignment=assignment))

    def _forget_one(self, assignments: dict[JobName, Assignment], *, but: JobName) -> None:
        """Forget the oldest that the coordinator has called over: what it may still ask about is kept, however many."""
        for job, assignment in assignments.items():
            is_over = assignment.stage is GenerationStage.OVER and assignment.stopped
            if job != but and is_over and assignment.cleaned:
                del assignments[job]
                self.act(JournalForgotten(job=job))
                return

    def put_rank(self, assignment: Assignment, run: RankRun) -> Assignment:
        """Return the assignment with this rank replaced; the caller puts it."""
        return replace(assignment, ranks=tuple(run if old.rank == run.rank else old for old in assignment.ranks))

    def put_shard(self, assignment: Assignment, shard: ShardAttempt) -> Assignment:
        """Return the assignment with this rank's shard replaced; the caller puts it."""
        return replace(assignment, shards=tuple(shard if old.rank == shard.rank else old for old in assignment.shards))

    def command(self, command_id: str) -> CommandRecord | None:
        return next((record for record in self.state.commands if record.id == command_id), None)

    def record(self, record: CommandRecord) -> None:
        """Remember what became of a command. A refusal changed nothing, so it needs no disk."""
        if any(old.id == record.id for old in self.state.commands):
            commands = tuple(record if old.id == record.id else old for old in self.state.commands)
        else:
            commands = (*self.state.commands, record)[-COMMANDS_MAX:]
        self.state = replace(self.state, commands=commands)
        if record.stage is not CommandStage.REFUSED:
            self.act(JournalCommand(record=record))

    def see_term(self, term: Term) -> None:
        if term > self.state.term:
            self.state = replace(self.state, term=term)
            self.act(JournalTerm(term=term))

    def see_coordinator(self) -> None:
        self.state = replace(self.state, coordinator_seen_at=self.now)
