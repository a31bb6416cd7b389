"""Where generations start, and that a finished run is one unbroken line of steps."""

from collections.abc import Iterator

from tests.sim.checkers.stories import Story
from tests.sim.trainers import NO_STATE


def restore_points(story: Story) -> Iterator[str]:
    """A generation starts from the newest checkpoint that is committed, not quarantined and not expired."""
    for standing, told in story.standings():
        if told.type != "GenerationStarted":
            continue
        newest, restore = standing.newest_sound, told.data.get("restore")
        given = restore["checkpoint"] if restore is not None else None
        wanted = newest.number if newest is not None else None
        if given != wanted:
            yield f"generation {told.data['generation']} starts from checkpoint {given}, newest is {wanted}"


def restored(story: Story) -> Iterator[str]:
    """A trainer begins with exactly the state that the log names."""
    points = {told.data["generation"]: told.data.get("restore") for told in story.events_of("GenerationStarted")}
    committed = {told.data["attempt"]: told for told in story.events_of("CheckpointCommitted")}
    for entry in story.diary:
        if entry.what == "restored" and entry.detail == "garbage":
            yield f"{entry.of} was given bytes that are no state"
        elif entry.what == "restored" and entry.detail != story.job:
            yield f"{entry.of} was given the state of {entry.detail}"
        if entry.what != "began":
            continue
        if entry.of.generation not in points:
            yield f"{entry.of} trains, but the log knows no such generation"
            continue
        point = points[entry.of.generation]
        if entry.step != (point["step"] if point is not None else 0):
            yield f"{entry.of} began at step {entry.step}; the log says {point and point['step']}"
        if point is not None and committed[point["attempt"]].at_s > entry.at_s:
            yield f"{entry.of} began from attempt {point['attempt']} before it was committed"


def ancestry(story: Story) -> Iterator[str]:
    """Followed back from the last step, every step has the one before as its parent, down to step 0."""
    if not story.events_of("JobSucceeded"):
        return
    parents, until = story.world.diary.parents, story.world.habits.until
    last = max(told.data["generation"] for told in story.events_of("GenerationStarted"))
    words = ("began", "trained")  # one that began at the last step had nothing left to do
    final = {e.state for e in story.diary if e.what in words and e.of.generation == last and e.step == until}
    if len(final) != 1:
        yield f"the last step was done in {len(final)} different states"
        return
    points = {told.data["generation"]: told.data.get("restore") for told in story.events_of("GenerationStarted")}
    state, due = final.pop(), until
    while state != NO_STATE:
        before, step, generation = parents[state]
        if step != due:
            yield f"step {step} of generation {generation} is followed by step {due + 1}"
            return
        older = parents[before][2] if before != NO_STATE else None
        point = points[generation]
        if older is not None and older != generation and (point is None or point["step"] != step - 1):
            yield f"generation {generation} went on from step {step - 1} of {older}, but starts from {point}"
        state, due = before, step - 1
    if due != 0:
        yield f"the line of steps ends at {due}"
