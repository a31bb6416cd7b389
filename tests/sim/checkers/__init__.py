"""What must hold in every schedule, judged from outside.

The checkers read the history of the etcd model, the history of the store model and the trainers' own record. They
share no code with the product: events are read as plain JSON, digests are computed anew, rules are written again.
"""

from typing import TYPE_CHECKING

from tests.sim.checkers import commits, deletions, lineage, logs, outcomes, trainers
from tests.sim.checkers.findings import Finding
from tests.sim.checkers.stories import Story

if TYPE_CHECKING:
    from tests.sim.faults import Storm
    from tests.sim.world import World

__all__ = ["CHECKERS", "Finding", "Story", "check"]

CHECKERS = {
    "one contiguous log": logs.contiguous,
    "fenced terms": logs.fenced,
    "committed means stored": commits.stored,
    "committed means whole": commits.whole,
    "acknowledged by the right trainers": commits.acknowledged,
    "marker follows event": commits.markers,
    "nothing overwritten": commits.untouched,
    "expiry spares the newest": deletions.expiries,
    "deletion follows its event": deletions.deleted,
    "packs expire unnamed": deletions.packs_expire,
    "needed packs stay": deletions.packs,
    "promises are deleted first": deletions.order,
    "what is called deleted is gone": deletions.confirmed,
    "starts from the newest": lineage.restore_points,
    "trainers start where the log says": lineage.restored,
    "one gapless ancestry": lineage.ancestry,
    "slots hold one trainer": trainers.slots,
    "slots are given once": trainers.given,
    "generations get free slots": trainers.room,
    "nothing is done twice": trainers.once,
    "what is told is journaled": trainers.told,
    "stopped trainers end": trainers.ended,
    "only what is over is stopped": trainers.stopped,
    "peers are of one generation": outcomes.peers,
    "healthy trainers go on": outcomes.undisturbed,
    "only what stands still hangs": outcomes.hangs,
    "no process gives up": outcomes.endings,
    "who does not lead stands by": outcomes.standing_by,
    "the job finishes": outcomes.finished,
    "all ranks succeed": outcomes.succeeded,
    "the last step is saved": outcomes.saved,
    "what is owed is done": outcomes.settled,
}


def owes(world: "World", storm: "Storm") -> bool:
    """Whether something is left to be done when the jobs have ended."""
    stories = [Story(world, storm, job) for job in world.jobs]
    try:
        return any(True for story in stories for checker in (outcomes.settled, trainers.ended) for _ in checker(story))
    except LookupError:  # a history that makes no sense; check() says so
        return False


def check(world: "World", storm: "Storm") -> list[Finding]:
    """Everything that is wrong with a schedule that has ended."""
    found: list[Finding] = []
    for story in [Story(world, storm, job) for job in world.jobs]:
        for name, checker in CHECKERS.items():
            try:
                found += [Finding(name, text) for text in checker(story)]
            except LookupError as error:  # an event about what the log never began: no rule is written for such a log
                found.append(Finding(name, f"the history makes no sense: {type(error).__name__}: {error}"))
    return list(dict.fromkeys(found))  # what concerns no job is found in each one's story
