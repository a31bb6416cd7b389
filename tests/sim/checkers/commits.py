"""A committed checkpoint is whole, was made by the trainers it names, and stays as it was."""

import json
from collections.abc import Iterator

from tests.sim.checkers.stories import Story, Told, digest

PAYLOAD_BYTES = 96  # at the end of each shard


def stored(story: Story) -> Iterator[str]:
    """When the event was written, every object was there with its size and digest, and all were of one state."""
    for told in story.events_of("CheckpointCommitted"):
        yield from _one_stored(story, told)


def _one_stored(story: Story, told: Told) -> Iterator[str]:
    what = f"checkpoint {told.data['checkpoint']} of attempt {told.data['attempt']}"
    shards = told.data["shards"]
    if [shard["rank"] for shard in shards] != list(range(told.data["world_size"])):
        yield f"{what} has shards of ranks {[shard['rank'] for shard in shards]}"
    objects = [(shard["key"], shard["digest"]) for shard in shards]
    objects += [(shard["index_key"], shard["index_digest"]) for shard in shards]
    objects += [(pack["key"], pack["digest"]) for shard in shards for pack in shard.get("packs", ())]
    objects.append((told.data["manifest_key"], told.data["manifest_digest"]))
    states = set()
    for key, wanted in objects:
        found = story.object_at(key, told.at_s)
        if found is None or found.data is None:
            yield f"{what}: {key} was not there"
        elif found.rot:
            continue  # the store's own fault, which may come at any moment
        elif digest(found.data) != wanted:
            yield f"{what}: {key} had other bytes"
        elif key.endswith(".safetensors"):
            saved = json.loads(found.data[-PAYLOAD_BYTES:])
            states.add((saved["step"], saved["state"]))
    if len(states) > 1:
        yield f"{what}: its shards are of different states: {sorted(states)}"
    if any(step != told.data["step"] for step, _ in states):
        yield f"{what} of step {told.data['step']} holds steps {sorted(step for step, _ in states)}"


def whole(story: Story) -> Iterator[str]:
    """The parts that the shards of a committed checkpoint say they hold make up each tensor, once."""
    for told in story.events_of("CheckpointCommitted"):
        images = [_as_committed(story, shard["key"], shard["digest"], told.at_s) for shard in told.data["shards"]]
        if None in images:
            continue  # another checker's
        parts: dict[str, list[tuple[int, int]]] = {}
        sizes: dict[str, int] = {}
        for image in filter(None, images):
            header = json.loads(image[8 : 8 + int.from_bytes(image[:8], "little")])
            for name, place in json.loads(header["__metadata__"]["dtrain.layout"]).items():
                begin, length = place["offsets"][0], header[name]["shape"][0]
                parts.setdefault(name, []).append((begin, begin + length))
                sizes[name] = place["global_shape"][0]
        for name, spans in parts.items():
            ends = [0, *(end for _, end in sorted(spans))]
            if [begin for begin, _ in sorted(spans)] != ends[:-1] or ends[-1] != sizes[name]:
                yield f"checkpoint {told.data['checkpoint']}: {name} of {sizes[name]} is made of {sorted(spans)}"


def _as_committed(story: Story, key: str, wanted: str, at_s: float) -> bytes | None:
    """The bytes that the commit meant, if they were there: the store may have damaged them in the very same moment."""
    for deed in story.deeds_of(key):
        if deed.at_s <= at_s and deed.data is not None and digest(deed.data) == wanted:
            return deed.data
    return None


def acknowledged(story: Story) -> Iterator[str]:
    """Every rank of the generation had staged exactly this attempt before."""
    entries = [entry for entry in story.diary if entry.what == "staged"]
    staged = {(entry.of.generation, entry.of.rank, int(entry.detail)): entry for entry in entries}
    for told in story.events_of("CheckpointCommitted"):
        data = told.data
        for rank in range(data["world_size"]):
            entry = staged.get((data["generation"], rank, data["attempt"]))
            if entry is None or entry.at_s > told.at_s:
                yield f"attempt {data['attempt']} was committed, but rank {rank} had not staged it"
            elif entry.step != data["step"]:
                yield f"attempt {data['attempt']} of step {data['step']}: rank {rank} staged step {entry.step}"


def markers(story: Story) -> Iterator[str]:
    """A marker is put behind its event and says what the event says; it is noted behind its being put."""
    events = {told.data["checkpoint"]: told for told in story.events_of("CheckpointCommitted")}
    put: dict[int, float] = {}
    for deed in story.deeds:
        if deed.data is None or not deed.key.endswith("/COMMITTED"):
            continue
        marker = json.loads(deed.data)
        put.setdefault(marker["checkpoint"], deed.at_s)
        told = events.get(marker["checkpoint"])
        if told is None or told.at_s > deed.at_s:
            yield f"{deed.key} was put by {deed.by} before the log said so"
        elif (marker["attempt"], marker["manifest_digest"], marker["position_seq"]) != (
            told.data["attempt"],
            told.data["manifest_digest"],
            told.seq,
        ):
            yield f"{deed.key} says other things than the event"
    for told in story.events_of("CheckpointMarked"):
        if put.get(told.data["checkpoint"], float("inf")) > told.at_s:
            yield f"checkpoint {told.data['checkpoint']} was noted as marked before its marker was there"


def untouched(story: Story) -> Iterator[str]:
    """Nothing of a committed checkpoint is written over with other bytes."""
    for told in story.events_of("CheckpointCommitted"):
        shards = told.data["shards"]
        objects = [(shard["key"], shard["digest"]) for shard in shards]
        objects += [(shard["index_key"], shard["index_digest"]) for shard in shards]
        objects += [(pack["key"], pack["digest"]) for shard in shards for pack in shard.get("packs", ())]
        for key, due in objects:
            for deed in story.deeds_of(key):
                later = deed.at_s > told.at_s and deed.data is not None and not deed.rot
                if later and digest(deed.data or b"") != due:
                    yield f"{deed.key} was written over by {deed.by} after its commit"
        for deed in story.deeds_of(told.data["manifest_key"]):
            if deed.data is not None and digest(deed.data) != told.data["manifest_digest"]:
                yield f"{deed.key} was put with different bytes"
