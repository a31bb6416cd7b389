"""Which rare situations a schedule met, as its histories tell afterwards. One that never comes is a gap to close."""

from collections.abc import Iterator
from typing import Any

from tests.sim.checkers.stories import Story

# What a large number of schedules must have met, or the storms are too kind.
EXPECTED = (
    "attempt committed by another leader than began it",
    "attempt aborted by another leader than began it",
    "checkpoint quarantined",
    "checkpoint expired",
    "attempt missed",
    "attempt aborted for storage",
    "generation began from a checkpoint",
    "generation began smaller than the one before",
    "generation began on other workers",
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
    "lost answer: Put",
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
    "watch met a compacted revision",
    "command arrived behind one of a newer generation",
    "request repeated though it was answered",
    "trainer hung",
    "checkpoint named an older one's pack",
    "pack deleted",
)


def met(story: Story) -> Iterator[str]:
    """Situations that only the whole history shows."""
    began = {told.data["attempt"]: told for told in story.events_of("CheckpointStarted")}
    for told in story.events_of("CheckpointCommitted", "CheckpointAborted"):
        word = "committed" if told.type == "CheckpointCommitted" else "aborted"
        if told.term != began[told.data["attempt"]].term:
            yield f"attempt {word} by another leader than began it"
        if told.data.get("missed"):
            yield "attempt missed"
        if "could not store" in told.data.get("reason", ""):
            yield "attempt aborted for storage"
    if any(pack for told in story.events_of("CheckpointCommitted") for pack in _packs_of_others(told.data)):
        yield "checkpoint named an older one's pack"
    if any(deed.data is None and "/packs/" in deed.key for deed in story.deeds):
        yield "pack deleted"
    for kind in ("CheckpointQuarantined", "CheckpointExpired", "CheckpointPinned"):
        if story.events_of(kind):
            yield f"checkpoint {kind.removeprefix('Checkpoint').lower()}"
    for told in story.events_of("GenerationFailed"):
        yield f"generation failed: {told.data.get('kind') or 'unknown'}"
    salvaged = {told.data["attempt"] for told in story.events_of("SalvageStarted")}
    for told in story.events_of("CheckpointCommitted", "CheckpointAborted"):
        if told.data["attempt"] in salvaged:
            yield "salvage committed" if told.type == "CheckpointCommitted" else "salvage given up"
    if len({told.term for told in story.events}) > 2:
        yield "three leaders or more"
    yield from _generations(story)


def _packs_of_others(data: dict[str, Any]) -> list[str]:
    made = f"/packs/attempt-{data['attempt']:06d}/"
    keys = [pack["key"] for shard in data["shards"] for pack in shard.get("packs", ())]
    return [key for key in keys if made not in key]


def _generations(story: Story) -> Iterator[str]:
    first_steps = {entry.of.generation for entry in story.diary if entry.what == "trained"}
    before: set[str] = set()
    for told in story.events_of("GenerationStarted"):
        workers = {member["worker"] for member in told.data["members"]}
        if told.data.get("restore"):
            yield "generation began from a checkpoint"
        if before and len(workers) < len(before):
            yield "generation began smaller than the one before"
        if before and workers - before:
            yield "generation began on other workers"
        if told.data["generation"] not in first_steps:
            yield "generation failed before its first step"
        before = workers
