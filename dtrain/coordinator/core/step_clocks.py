"""How long each rank has been seen without progress, in reported time.

A rank's clock advances only from one report of its worker to the next, and not at all over a gap in the reports: a
worker that was silent, a coordinator that was paused, a link that was down say nothing about a trainer. So a clock
can be too slow, never too fast.

Which step was the longest is for the trainers to say. The first that is heard of a rank may be the one that compiled,
and says little about the others; but steps may also all be that long. So it counts until a few later ones were seen,
and from then on those count alone. A new leader begins in the same way: what it hears first is all that it knows.
"""

from dataclasses import dataclass, field

from dtrain.common.names import Generation, Step
from dtrain.coordinator.core.facts import AssignmentReport, RankReport

# Between two reports of a worker, at most: four heartbeats. What lies in a longer gap is not counted.
REPORT_GAP_MAX_S = 2.0
# So many later steps say how long steps are. A bound that is too large for so long only delays a verdict.
LATER_STEPS_MIN = 3


@dataclass(slots=True, kw_only=True)
class RankClock:
    """One rank's last progress."""

    phase: str
    step: Step  # completed
    idle_s: float = 0.0  # reported time since phase or step changed
    steps_heard: int = 0  # reports in which this leader heard of a newly completed step


@dataclass(slots=True, kw_only=True)
class StepClocks:
    """The clocks of all ranks of one generation."""

    generation: Generation
    ranks: dict[int, RankClock] = field(default_factory=dict)
    first_step_s: float = 0.0  # the longest of the first steps that this leader heard of, one of each rank
    later_step_s: float = 0.0  # the longest of all others

    @property
    def longest_step_s(self) -> float:
        """The longest step of any rank; the first ones count until enough later ones were seen."""
        heard = max((clock.steps_heard for clock in self.ranks.values()), default=0)
        return self.later_step_s if heard > LATER_STEPS_MIN else max(self.first_step_s, self.later_step_s)

    def note(self, report: AssignmentReport, gap_s: float) -> None:
        """Take in a worker's report that came ``gap_s`` after its last one."""
        counted_s = gap_s if gap_s <= REPORT_GAP_MAX_S else 0.0
        for rank in report.ranks:
            self._note_rank(rank, counted_s)

    def _note_rank(self, rank: RankReport, counted_s: float) -> None:
        clock = self.ranks.get(rank.rank)
        if clock is None:
            clock = self.ranks[rank.rank] = RankClock(phase=rank.phase, step=rank.completed_step)
            if rank.step_s > 0:
                self._note_step(clock, rank.step_s, waited_s=0.0)
            return
        clock.idle_s += counted_s
        if (rank.phase, rank.completed_step) == (clock.phase, clock.step):
            return
        if rank.completed_step > clock.step:
            self._note_step(clock, rank.step_s, waited_s=clock.idle_s if rank.phase == clock.phase else 0.0)
        clock.phase, clock.step, clock.idle_s = rank.phase, rank.completed_step, 0.0

    def _note_step(self, clock: RankClock, step_s: float, *, waited_s: float) -> None:
        """A rank says that its last step took ``step_s``; of all since its last report one took ``waited_s``."""
        if clock.steps_heard == 0:
            self.first_step_s = max(self.first_step_s, step_s)  # the wait for it began with the start
        else:
            self.later_step_s = max(self.later_step_s, step_s, waited_s)
        clock.steps_heard += 1
