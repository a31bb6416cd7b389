"""What is deleted was given up in the log first, and never the newest."""

from collections.abc import Iterator

from tests.sim.blobs import Deed
from tests.sim.checkers.stories import Checkpoint, Story, Told, attempt_in


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


def packs(story: Story) -> Iterator[str]:
    """A pack stays for as long as any committed checkpoint that is not expired names it."""
    for deed in story.deeds:
        if deed.data is not None or "/packs/" not in deed.key:
            continue
        for checkpoint in story.standing_at(deed.at_s).committed.values():
            if not checkpoint.expired and deed.key in checkpoint.keys:
                yield f"{deed.key} was deleted by {deed.by}, but checkpoint {checkpoint.number} names it"


def order(story: Story) -> Iterator[str]:
    """While a marker or a manifest is there, everything it promises is there."""
    for deed in story.deeds:
        attempt = attempt_in(deed.key)
        if deed.data is not None or attempt is None:
            continue
        folder = deed.key.rsplit("/", 1)[0]
        promises = [f"{folder}/manifest.json"]
        promises += [story.marker_of(told) for told in story.events_of("CheckpointCommitted")
                     if told.data["attempt"] == attempt and told.at_s < deed.at_s]  # fmt: skip
        for promise in promises:
            if promise != deed.key and story.is_there(promise, deed.at_s) and not _came_back(story, promise, deed):
                yield f"{deed.key} was deleted by {deed.by} while {promise} promised it"


def _came_back(story: Story, promise: str, deed: Deed) -> bool:
    """Whether the promise was put by another when it was over: a leader before, who slept and did not know.

    It was over when it had been deleted, or when the log had called the attempt aborted.
    """
    before = [other for other in story.deeds_of(promise) if other.at_s < deed.at_s]
    over_s = [other.at_s for other in before if other.data is None and other.by == deed.by]
    over_s += [
        told.at_s for told in story.events_of("CheckpointAborted") if told.data["attempt"] == attempt_in(promise)
    ]
    newest = before[-1]
    return newest.data is not None and newest.by != deed.by and any(at_s < newest.at_s for at_s in over_s)


def confirmed(story: Story) -> Iterator[str]:
    """What the log calls deleted or swept is gone by then, to the last object.

    But for what came behind the last deletion, when it had been looked at again: see :func:`leftovers`.
    """
    committed = {told.data["checkpoint"]: told for told in story.events_of("CheckpointCommitted")}
    for told in story.events_of("CheckpointDeleted"):
        number = told.data["checkpoint"]
        for key in _left(
            story, committed[number].data["attempt"], told.at_s, marker=story.marker_of(committed[number])
        ):
            packed = "/packs/" in key  # these expire by an event of their own
            if not packed and not _came_behind(story, committed[number].data["attempt"], key, told.at_s):
                yield f"checkpoint {number} was noted as deleted, but {key} is there"
    for told in story.events_of("AttemptSwept"):
        for key in _left(story, told.data["attempt"], told.at_s):
            if not _came_behind(story, told.data["attempt"], key, told.at_s):
                yield f"attempt {told.data['attempt']} was noted as swept, but {key} is there"
    for told, keys in _packs_deleted(story):
        for key in keys:
            if story.is_there(key, told.at_s):
                yield f"{key} was noted as deleted, but is there"


def packs_expire(story: Story) -> Iterator[str]:
    """PacksExpired names only packs that no checkpoint in the log names, and none ever does again."""
    expired: set[str] = set()
    for standing, told in story.standings():
        if told.type == "PacksExpired":
            for checkpoint in standing.committed.values():
                for key in sorted(set(told.data["keys"]) & set(checkpoint.keys)):
                    yield f"{key} expired, but checkpoint {checkpoint.number} names it"
            expired |= set(told.data["keys"])
        elif told.type == "CheckpointCommitted":
            for key in sorted(expired & set(Checkpoint(told).keys)):
                yield f"checkpoint {told.data['checkpoint']} names {key}, which had expired"


def leftovers(story: Story) -> Iterator[str]:
    """At the end nothing lies where the log says that nothing is, and no pack that nobody needs.

    Counted, and no rule: a put that was on its way when its attempt was swept may arrive behind the sweep, and only a
    later look at the store could find it. It costs room, and promises nothing.
    """
    if not story.ended or not story.world.healed:
        return
    end_s, standing = story.world.loop.now_s, story.final()
    for told in story.events_of("CheckpointCommitted"):
        if told.data["checkpoint"] not in standing.committed:
            for key in _left(story, told.data["attempt"], end_s, marker=story.marker_of(told)):
                if "/packs/" not in key:
                    yield f"checkpoint {told.data['checkpoint']} is deleted, but {key} is there"
    for told in story.events_of("AttemptSwept"):
        for key in _left(story, told.data["attempt"], end_s):
            yield f"attempt {told.data['attempt']} is swept, but {key} is there"
    for told, keys in _packs_deleted(story):
        for key in keys:
            if story.is_there(key, end_s):
                yield f"{key} was deleted at {told.at_s:.3f} s, but is there"


def _left(story: Story, attempt: int, at_s: float, *, marker: str = "") -> list[str]:
    """Keys of the attempt's objects that are there, packs and the given marker included."""
    keys = [key for key in story.keys_of(attempt) if story.is_there(key, at_s)]
    return [*keys, marker] if marker and story.is_there(marker, at_s) else keys


def _came_behind(story: Story, attempt: int, key: str, at_s: float) -> bool:
    """Whether it was put when its attempt's objects had been deleted, and its folder had been found empty after that.

    A commit marker is in no such folder: behind the deletions is enough.
    """
    deeds = [deed for name in story.keys_of(attempt) for deed in story.deeds_of(name)]
    last_s = max((deed.at_s for deed in deeds if deed.data is None and deed.at_s <= at_s), default=0.0)
    put, folder = story.object_at(key, at_s), f"{key.rpartition('/')[0]}/"
    if put is None or key.endswith("/COMMITTED"):
        return put is not None and put.at_s > last_s
    return any(last_s < look.at_s < put.at_s for look in story.world.blobs.looks if look.prefix == folder)


def _packs_deleted(story: Story) -> Iterator[tuple[Told, list[str]]]:
    """Each PacksDeleted, and the keys of which it speaks."""
    batches = {told.seq: told.data["keys"] for told in story.events_of("PacksExpired")}
    for told in story.events_of("PacksDeleted"):
        yield told, batches[told.data["expired"]]
