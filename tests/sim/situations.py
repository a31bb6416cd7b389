"""Which rare situations a schedule met, as its histories tell afterwards. One that never comes is a gap to close."""

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

from tests.sim.checkers import deletions
from tests.sim.checkers.stories import Story
from tests.support.checkpoints import SPREAD

if TYPE_CHECKING:
    from tests.sim.faults import Storm
    from tests.sim.world import World

# What a large number of schedules must have met, or the storms are too kind.
EXPECTED = (
    "attempt committed by another leader than began it",
    "attempt aborted by another leader than began it",
    "leader changed between manifest and commit",
    "leader changed between commit and marker",
    "leader changed between expiry and deletion",
    "leader changed during a salvage",
    "leader changed between a generation's decision and its first step",
    "leader slept beyond its lease and woke up deposed",
    "checkpoint quarantined",
    "generation fell back behind a quarantined checkpoint",
    "attempt aborted for a damaged base",
    "attempt aborted as its parts make no whole",
    "rank staged another's part",
    "agent restarted with an attempt in flight",
    "agent left in order",
    "coordinator left in order",
    "control plane started again after its leases",
    "registration late after a restart, and the leader cut off from the workers",
    "checkpoint expired",
    "attempt missed",
    "attempt aborted for storage",
    "generation began from a checkpoint",
    "generation began smaller than the one before",
    "generation began larger than the one before",
    "generation began on other workers",
    "generation was given the port of the one before",
    "generation failed before its first step",
    "generation failed: script",
    "generation failed: connection",
    "generation failed: killed",
    "generation failed: node",
    "generation failed: hang",
    "generation failed: preempted",
    "generation failed: checkpoint",
    "salvage committed",
    "salvage given up",
    "three leaders or more",
    "lost answer: Txn",
    "etcd write took effect late",
    "append overtaken by another leader's election",
    "append in doubt and done",
    "append in doubt and never done",
    "leader cut off from etcd only",
    "leader cut off from workers only",
    "leader killed",
    "coordinator paused",
    "agent restarted at once",
    "machine lost power",
    "machine lost its disk",
    "cache torn",
    "one-way partition",
    "blob rotted",
    "object cut short",
    "store full",
    "put arrived in the midst of a deletion",
    "watch met a compacted revision",
    "command arrived behind one of a newer generation",
    "request repeated though it was answered",
    "trainer hung",
    "checkpoint named an older one's pack",
    "pack deleted",
    "trainers of two jobs on one machine",
    "job began when another had ended",
    "job cancelled",
    "leader killed when ranks had ended and their node was gone",
)


def never_met(seen: Container[str]) -> list[str]:
    """What was expected and did not come."""
    return [situation for situation in EXPECTED if situation not in seen]


def met(world: "World", storm: "Storm") -> set[str]:
    """Situations that only the whole history shows."""
    stories = [Story(world, storm, job) for job in world.jobs]
    found = {situation for story in stories for situation in _of_one(story)}
    return found.union(_of_two(*stories) if len(stories) > 1 else ())


def _of_two(one: Story, other: Story) -> Iterator[str]:
    alive: set[tuple[str, str, int, int]] = set()
    for entry in one.world.diary.entries:
        of = entry.node, entry.of.job, entry.of.generation, entry.of.rank
        if entry.what == "spawned":
            alive.add(of)
            if any(node == entry.node and job != entry.of.job for node, job, _, _ in alive):
                yield "trainers of two jobs on one machine"
        elif entry.what == "ended":
            alive.discard(of)
    for first, second in ((one, other), (other, one)):
        ends, begins = first.events_of(first.ended), second.events_of("GenerationStarted")
        submitted = second.events_of("JobSubmitted")
        if ends and begins and submitted[0].at_s < ends[0].at_s < begins[0].at_s:
            yield "job began when another had ended"


def _of_one(story: Story) -> Iterator[str]:
    began = {told.data["attempt"]: told for told in story.events_of("CheckpointStarted")}
    for told in story.events_of("CheckpointCommitted", "CheckpointAborted"):
        word = "committed" if told.type == "CheckpointCommitted" else "aborted"
        if told.term != began[told.data["attempt"]].term:
            yield f"attempt {word} by another leader than began it"
        if told.data.get("missed"):
            yield "attempt missed"
        yield from _aborted_for(told.data.get("reason", ""))
    if any(pack for told in story.events_of("CheckpointCommitted") for pack in _packs_of_others(told.data)):
        yield "checkpoint named an older one's pack"
    if any(deed.data is None and "/packs/" in deed.key for deed in story.deeds):
        yield "pack deleted"
    for kind in ("CheckpointQuarantined", "CheckpointExpired", "CheckpointPinned"):
        if story.events_of(kind):
            yield f"checkpoint {kind.removeprefix('Checkpoint').lower()}"
    if story.ended == "JobCancelled":
        yield "job cancelled"
    for told in story.events_of("GenerationFailed"):
        yield f"generation failed: {told.data.get('kind') or 'unknown'}"
    salvaged = {told.data["attempt"] for told in story.events_of("SalvageStarted")}
    for told in story.events_of("CheckpointCommitted", "CheckpointAborted"):
        if told.data["attempt"] in salvaged:
            yield "salvage committed" if told.type == "CheckpointCommitted" else "salvage given up"
    if len({told.term for told in story.events}) > 2:
        yield "three leaders or more"
    if any(deletions.leftovers(story)):
        yield "object put behind its deletion, and left"
    yield from _generations(story)
    yield from _leaders_changed(story)


def _aborted_for(reason: str) -> Iterator[str]:
    if "could not store" in reason:
        yield "attempt aborted for storage"
    if "builds upon, was found damaged" in reason:
        yield "attempt aborted for a damaged base"
    if SPREAD in reason:
        yield "attempt aborted as its parts make no whole"


def _leaders_changed(story: Story) -> Iterator[str]:
    """Between which two acts that belong together another leader was elected."""
    elected = [c.at_s for c in story.changes if c.key.endswith("/leader") and c.value is not None]
    put: dict[str, float] = {}
    for deed in story.deeds:
        if deed.data is not None:
            put.setdefault(deed.key, deed.at_s)
    first_steps: dict[int, float] = {}
    for entry in story.diary:
        if entry.what == "trained":
            first_steps.setdefault(entry.of.generation, entry.at_s)
    spans: list[tuple[str, float, float]] = []
    deleted = {told.data["checkpoint"]: told.at_s for told in story.events_of("CheckpointDeleted")}
    settled = {t.data["attempt"]: t.at_s for t in story.events_of("CheckpointCommitted", "CheckpointAborted")}
    for told in story.events_of("CheckpointCommitted"):
        key, marker = told.data["manifest_key"], f"{told.data['manifest_key'].rsplit('/', 2)[0]}/COMMITTED"
        spans.append(("between manifest and commit", put.get(key, told.at_s), told.at_s))
        spans.append(("between commit and marker", told.at_s, put.get(marker, told.at_s)))
    for told in story.events_of("CheckpointExpired"):
        spans.append(("between expiry and deletion", told.at_s, deleted.get(told.data["checkpoint"], told.at_s)))
    for told in story.events_of("SalvageStarted"):
        spans.append(("during a salvage", told.at_s, settled.get(told.data["attempt"], told.at_s)))
    for told in story.events_of("GenerationStarted"):
        begun_s = first_steps.get(told.data["generation"], told.at_s)
        spans.append(("between a generation's decision and its first step", told.at_s, begun_s))
    for what, begin_s, end_s in spans:
        if any(begin_s < at_s < end_s for at_s in elected):
            yield f"leader changed {what}"


def _packs_of_others(data: dict[str, Any]) -> list[str]:
    made = f"/packs/attempt-{data['attempt']:06d}/"
    keys = [pack["key"] for shard in data["shards"] for pack in shard.get("packs", ())]
    return [key for key in keys if made not in key]


def _generations(story: Story) -> Iterator[str]:
    first_steps = {entry.of.generation for entry in story.diary if entry.what == "trained"}
    before: set[str] = set()
    met_at: tuple[str, int] | None = None
    quarantined: set[int] = set()
    for told in story.events_of("GenerationStarted", "CheckpointQuarantined"):
        if told.type == "CheckpointQuarantined":
            quarantined.add(told.data["checkpoint"])
            continue
        if any(number > (told.data.get("restore") or {"checkpoint": 0})["checkpoint"] for number in quarantined):
            yield "generation fell back behind a quarantined checkpoint"
        workers = {member["worker"] for member in told.data["members"]}
        if told.data.get("restore"):
            yield "generation began from a checkpoint"
        if before and len(workers) < len(before):
            yield "generation began smaller than the one before"
        if before and len(workers) > len(before):
            yield "generation began larger than the one before"
        if before and workers - before:
            yield "generation began on other workers"
        meets_at = told.data["members"][0]["worker"], told.data["master_port"]
        if meets_at == met_at:
            yield "generation was given the port of the one before"
        met_at = meets_at
        if told.data["generation"] not in first_steps:
            yield "generation failed before its first step"
        before = workers
