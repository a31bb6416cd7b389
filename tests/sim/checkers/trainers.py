"""One trainer a slot, one start a rank, no trainer left behind."""

from collections import Counter
from collections.abc import Iterator

from dtrain.worker.rank_dirs import RankId
from tests.sim.checkers.stories import Story

ROUNDED_S = 0.001  # times in the log are to the millisecond
TAKEN_IN_S = 0.5  # within this a leader knows what has reached it
STOPPED = ("told to end", "it was a stray")  # how the models of keepers and of the sweep say who ended a trainer


def slots(story: Story) -> Iterator[str]:
    """Never more trainers on a machine than slots, and never of two generations of a job."""
    alive: dict[str, set[RankId]] = {node.machine.name: set() for node in story.world.nodes}
    for entry in story.world.diary.entries:
        here = alive[entry.node]
        if entry.what == "spawned":
            older = {of for of in here if of.job == entry.of.job and of.generation != entry.of.generation}
            if older:
                yield f"{entry.of} was started on {entry.node} beside {sorted(map(str, older))}"
            here.add(entry.of)
            if len(here) > story.world.shape.slots:
                yield f"{entry.node} runs {len(here)} trainers in {story.world.shape.slots} slots"
        elif entry.what == "ended":
            here.discard(entry.of)


def given(story: Story) -> Iterator[str]:
    """The log gives no slot to two jobs."""
    slots = story.world.shape.slots
    rivals = [Story(story.world, story.storm, job) for job in story.world.jobs if job != story.job]
    for told in story.events_of("GenerationStarted"):
        held: Counter[str] = Counter()
        for active in [rival.standing_at(told.at_s).generation for rival in rivals]:
            for member in active.data["members"] if active is not None else ():
                held[member["worker"]] += member["nproc"]
        for member in told.data["members"]:
            if held[member["worker"]] + member["nproc"] > slots:
                where = f"{member['worker']}, where other jobs have {held[member['worker']]} of {slots} slots"
                yield f"generation {told.data['generation']} was given to {where}"


def room(story: Story) -> Iterator[str]:
    """A generation is given to no worker that had told this leader of other jobs' trainers in the slots."""
    heard, slots = story.world.witness.heard, story.world.shape.slots
    for told in story.events_of("GenerationStarted"):
        elected_s, leader = story.elected(told).at_s, story.leader(told).name
        moments = story.decided_s(told)
        if len(moments) != 1:
            continue  # its clock was set back: nobody can say what it knew just then
        decided_s = moments[0] + ROUNDED_S
        for member in told.data["members"]:
            known = [h for h in heard.get((leader, member["worker"]), ()) if elected_s < h.at_s <= decided_s]
            behind = sum(h.at_s > decided_s - TAKEN_IN_S for h in known)
            others = [sum(n for job, n in h.running.items() if job != story.job) for h in known[-behind - 1 :]]
            if others and min(others) + member["nproc"] > slots:
                where = f"{member['worker']}, which told of {min(others)} trainers of other jobs in {slots} slots"
                yield f"generation {told.data['generation']} was given to {where}"


def once(story: Story) -> Iterator[str]:
    """A command that is repeated does nothing twice."""
    spawned = Counter(entry.of for entry in story.diary if entry.what == "spawned")
    for of, count in spawned.items():
        if count > 1:
            yield f"{of} was started {count} times"
    staged = Counter((entry.of, entry.detail) for entry in story.diary if entry.what == "staging")
    for (of, attempt), count in staged.items():
        if count > 1:
            yield f"{of} staged attempt {attempt} {count} times"
    submitted = Counter(told.data["request"] for told in story.events_of("JobSubmitted"))
    for request, count in submitted.items():
        if count > 1:
            yield f"the submission {request!r} was recorded {count} times"


def told(story: Story) -> Iterator[str]:
    """What a worker tells of acknowledgements, exits, commands and terms is in its journal by then."""
    yield from story.world.witness.found[:5]


def ended(story: Story) -> Iterator[str]:
    """When the job is over and the world was kind for a while, no trainer lives."""
    if not story.ended or not story.world.healed:
        return
    for node in story.world.nodes:
        for trainer in [living for living in node.living if living.of.job == story.job]:
            yield f"{trainer.of} still lives on {node.machine.name} after the job's end"


def stopped(story: Story) -> Iterator[str]:
    """A worker ends a trainer only if the log says by then that it is over or to end, or if fenced, or leaving."""
    for entry in story.diary:
        if entry.what != "ended" or not entry.detail.endswith(STOPPED):
            continue
        standing = story.standing_at(entry.at_s)
        active = standing.generation is not None and standing.generation.data["generation"] == entry.of.generation
        excused = standing.to_be_cancelled or story.leaving(entry) or story.fenced(entry)
        if active and not excused:
            yield f"{entry.of} was ended by its worker at {entry.at_s:.3f} s while its generation went on"
