"""Liveness, and that nothing was disturbed without a reason."""

import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.sim.checkers.stories import Story

STANDS_BY_S = 10.0  # several of the turns in which a standby looks at the leader's key
HEARD_S = 0.5  # a hang that ends in this very moment may still be called one: a step is told by the next snapshot
KIND_S = 20.0  # so long after the storm nothing of it is under way any more
LATE_S = 60.0  # a collective that hangs, a process group that breaks, a report that is late


def peers(story: Story) -> Iterator[str]:
    """What trainers themselves found wrong with their peers."""
    yield from story.world.faults_seen


def undisturbed(story: Story) -> Iterator[str]:
    """A generation fails only if something happened to one of its members, or to what it starts from.

    What happens to a member whose ranks have all ended well, and were noted to have, is no reason.
    """
    started = {told.data["generation"]: told for told in story.events_of("GenerationStarted")}
    failures = story.events_of("GenerationFailed")
    fences = [entry for entry in story.diary if entry.detail.endswith("told to end") and story.fenced(entry)]
    hurts = [(at_s, where) for at_s, where, job in story.world.hurts if job in ("", story.job)]
    hurts += [(entry.at_s, entry.node) for entry in fences]
    if story.storm.mix.spares_workers and failures and not fences:
        yield f"nothing touched the workers, but {failures[0].data['reason']}"
        return
    for told in failures:
        begin = started[told.data["generation"]]
        done_s = {
            worker: noted.at_s
            for noted in story.events_of("MembersFinished")
            for worker in noted.data["workers"]
            if noted.data["generation"] == begin.data["generation"]
        }
        until_s = {m["worker"]: min(told.at_s, done_s.get(m["worker"], told.at_s)) for m in begin.data["members"]}
        reasons = [
            (at_s, where)
            for at_s, where in hurts
            if (where == "store" and at_s <= told.at_s)
            or (where in until_s and begin.at_s - LATE_S <= at_s <= until_s[where])
        ]
        if not reasons:
            yield f"generation {told.data['generation']} failed though nothing happened: {told.data['reason']}"


def hangs(story: Story) -> Iterator[str]:
    """Nothing is called hung in which a step was done within the job's own timeout, but for one not heard of yet."""
    shape = story.world.shape
    for told in story.events_of("HangFound"):
        steps = [e.at_s for e in story.diary if e.what == "trained" and e.of.generation == told.data["generation"]]
        idle_s = max(
            moment_s - max((at_s for at_s in steps if at_s <= moment_s - HEARD_S), default=0.0)
            for moment_s in story.decided_s(told) or [told.at_s]
        )
        if idle_s < (shape.hang_timeout_s or float("inf")) * (1 - 2 * shape.drift):
            yield f"generation {told.data['generation']} was called hung {idle_s:.1f} s after a step"


def endings(story: Story) -> Iterator[str]:
    """No process of the product ends by itself, and no callback of it raises."""
    for ending in story.world.endings:
        error = ending.error
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        places = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" at {Path(place.filename).name}:{place.lineno}" for place in places)
        yield f"{ending.who} ended at {ending.at_s:.3f} s: {type(error).__name__}: {error}{where}"
    for error in story.world.loop.errors:
        yield f"a callback raised {type(error).__name__}: {error}"


def standing_by(story: Story) -> Iterator[str]:
    """Whoever does not lead asks again and again who does, to take over."""
    world = story.world
    if not world.healed or world.loop.now_s < story.storm.healed_s + STANDS_BY_S:
        return
    for host in world.hosts:
        for process in host.living if host is not world.leader else ():
            looked_s = world.net.looked.get(process.name)
            if looked_s is not None and looked_s < world.loop.now_s - STANDS_BY_S:
                yield f"{process.name} does not lead and has not asked who does since {looked_s:.1f} s"


def finished(story: Story) -> Iterator[str]:
    """After the storm the job ends, and well, unless a person cancelled it."""
    if not story.ended:
        last = story.events[-1] if story.events else None
        yield f"{story.job} has not ended {story.world.loop.now_s:.0f} s after the begin; last event: {last}"
    elif story.ended == "JobCancelled" and story.job in story.world.cancelled:
        return
    elif story.ended != "JobSucceeded":
        yield f"{story.job} ended with {story.events_of(story.ended)[-1]}"


def succeeded(story: Story) -> Iterator[str]:
    """A job is called a success once every rank of its generation has left by itself with 0, and not before."""
    left = {(e.of.generation, e.of.rank): e.at_s for e in story.diary if e.what == "ended" and e.detail == "0"}
    for standing, told in story.standings():
        if told.type != "JobSucceeded":
            continue
        if standing.generation is None:
            yield "the job succeeded without a generation"
            continue
        generation = standing.generation.data
        for rank in range(generation["world_size"]):
            if left.get((generation["generation"], rank), float("inf")) > told.at_s:
                yield f"the job succeeded before rank {rank} of generation {generation['generation']} had finished"


def saved(story: Story) -> Iterator[str]:
    """A job that ends in kind times ends with its last step saved."""
    if story.ended != "JobSucceeded" or story.storm.healed_s + KIND_S > story.events_of("JobSucceeded")[-1].at_s:
        return
    steps = [told.data["step"] for told in story.events_of("CheckpointCommitted")]
    if story.world.habits.until not in steps:
        yield f"the last step {story.world.habits.until} was not saved; saved: {steps}"


def settled(story: Story) -> Iterator[str]:
    """Whatever the coordinator owed at the job's end is done soon after."""
    if not story.ended:
        return
    objects = story.world.blobs.objects
    swept = {told.data["attempt"] for told in story.events_of("AttemptSwept")}
    for attempt in story.final().aborted:
        if attempt not in swept:
            yield f"attempt {attempt} was aborted and not swept"
    gone = {told.data["expired"] for told in story.events_of("PacksDeleted")}
    for told in story.events_of("PacksExpired"):
        if told.seq not in gone:
            yield f"packs that expired by event {told.seq} were not deleted"
    for number, checkpoint in story.final().committed.items():
        folder = checkpoint.told.data["manifest_key"].rsplit("/", 2)[0]
        there = f"{folder}/COMMITTED" in objects
        if checkpoint.expired:
            yield f"checkpoint {number} is expired and was not deleted"
        elif not there or not checkpoint.marked:
            yield f"checkpoint {number} has no marker"
        else:
            yield from (f"checkpoint {number}: {key} is missing" for key in checkpoint.keys if key not in objects)
