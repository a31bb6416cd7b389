"""What is deleted was given up in the log first, and never the newest."""

from collections.abc import Iterator

from tests.sim.checkers.stories import Story, attempt_in


def expiries(story: Story) -> Iterator[str]:
    """CheckpointExpired never names the newest sound one, a pinned or unmarked one, or what is being started from."""
    for standing, told in story.standings():
        if told.type != "CheckpointExpired":
            continue
        number = told.data["checkpoint"]
        checkpoint = standing.committed.get(number)
        if checkpoint is None:
            yield f"checkpoint {number} expired but was not committed"
            continue
        newest = standing.newest_sound
        if newest is None or newest.number == number:
            yield f"checkpoint {number} expired though it is the newest sound one, or none is"
        if checkpoint.pinned or not checkpoint.marked or checkpoint.expired:
            yield f"checkpoint {number} expired though pinned, unmarked or expired already"
        active = standing.generation.data if standing.generation is not None else {}
        if (active.get("restore") or {}).get("checkpoint") == number:
            yield f"checkpoint {number} expired though generation {active['generation']} starts from it"


def deleted(story: Story) -> Iterator[str]:
    """An object goes only after its checkpoint expired, or its attempt was aborted and is of no use to anybody."""
    for deed in story.deeds:
        attempt = attempt_in(deed.key)
        if deed.data is not None or attempt is None:
            continue
        standing = story.standing_at(deed.at_s)
        newest = standing.newest_sound
        for checkpoint in standing.committed.values():
            if checkpoint.attempt == attempt and not checkpoint.expired:
                yield f"{deed.key} was deleted by {deed.by}, but its checkpoint is committed and not expired"
        if newest is not None and newest.attempt == attempt:
            yield f"{deed.key} of the newest sound checkpoint was deleted"
        if attempt in standing.started:
            yield f"{deed.key} was deleted while its attempt was under way"
        if attempt in standing.aborted and not standing.ended:
            later = any(checkpoint.attempt > attempt for checkpoint in standing.committed.values())
            gone = any(told.data["attempt"] > attempt for told in story.events_of("CheckpointCommitted")
                       if told.at_s <= deed.at_s)  # fmt: skip
            if not later and not gone:
                yield f"{deed.key} of an aborted attempt was deleted before a later one was committed"
    for told in story.events_of("CheckpointDeleted"):
        number = told.data["checkpoint"]
        committed = next(t for t in story.events_of("CheckpointCommitted") if t.data["checkpoint"] == number)
        for shard in committed.data["shards"]:
            found = story.object_at(shard["key"], told.at_s)
            if found is not None and found.data is not None:
                yield f"checkpoint {number} was noted as deleted, but {shard['key']} is there"


def packs(story: Story) -> Iterator[str]:
    """A pack stays for as long as any committed checkpoint that is not expired names it."""
    for deed in story.deeds:
        if deed.data is not None or "/packs/" not in deed.key:
            continue
        for checkpoint in story.standing_at(deed.at_s).committed.values():
            if not checkpoint.expired and deed.key in checkpoint.keys:
                yield f"{deed.key} was deleted by {deed.by}, but checkpoint {checkpoint.number} names it"


def order(story: Story) -> Iterator[str]:
    """While a marker is there, everything it promises is there."""
    for told in story.events_of("CheckpointCommitted"):
        keys = [shard["key"] for shard in told.data["shards"]] + [told.data["manifest_key"]]
        for key in keys:
            for deed in story.deeds_of(key):
                if deed.data is None and deed.at_s > told.at_s:
                    folder = told.data["manifest_key"].rsplit("/", 2)[0]
                    marker = story.object_at(f"{folder}/COMMITTED", deed.at_s)
                    if marker is not None and marker.data is not None:
                        yield f"{key} was deleted while {folder}/COMMITTED promised it"
