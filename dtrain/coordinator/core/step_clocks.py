"""How long each rank has been seen without progress, in reported time.

A rank's clock advances only from one report of its worker to the next, and not at all over a gap in the reports: a
worker that was silent, a coordinator that was paused, a link that was down say nothing about a trainer. So a clock
can be too slow, never too fast.
"""

from dataclasses import dataclass, field

from dtrain.common.names import Generation, Step
from dtrain.coordinator.core.facts import AssignmentReport, RankReport

# Between two reports of a worker, at most: four heartbeats. What lies in a longer gap is not counted.
REPORT_GAP_MAX_S = 2.0


@dataclass(slots=True, kw_only=True)
class RankClock:
    """One rank's last progress."""

    phase: str
    step: Step  # completed
    idle_s: float = 0.0  # reported time since phase or step changed
    stepped: bool = False  # this leader saw it complete a step: the time of its next one is a step's, not a start's


@dataclass(slots=True, kw_only=True)
class StepClocks:
    """The clocks of all ranks of one generation."""

    generation: Generation
    ranks: dict[int, RankClock] = field(default_factory=dict)
    longest_step_s: float = 0.0  # of all ranks, first steps not counted

    def note(self, report: AssignmentReport, gap_s: float) -> None:
        """Take in a worker's report that came ``gap_s`` after its last one."""
        counted_s = gap_s if gap_s <= REPORT_GAP_MAX_S else 0.0
        for rank in report.ranks:
            self._note_rank(rank, counted_s)

    def _note_rank(self, rank: RankReport, counted_s: float) -> None:
        clock = self.ranks.get(rank.rank)
        if clock is None:
            self.ranks[rank.rank] = RankClock(phase=rank.phase, step=rank.completed_step)
            return
        clock.idle_s += counted_s
        if (rank.phase, rank.completed_step) == (clock.phase, clock.step):
            return
        if rank.completed_step > clock.step:
            if clock.stepped:
                waited_s = clock.idle_s if rank.phase == clock.phase else 0.0
                self.longest_step_s = max(self.longest_step_s, rank.step_s, waited_s)
            clock.stepped = True
        clock.phase, clock.step, clock.idle_s = rank.phase, rank.completed_step, 0.0
