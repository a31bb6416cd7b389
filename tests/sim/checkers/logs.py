"""One log, whole, in order, written by one leader after another."""

import hashlib
import json
from collections.abc import Iterator

from tests.sim.checkers.stories import Story


def contiguous(story: Story) -> Iterator[str]:
    """Sequence numbers without a gap, each written once and never touched again, each naming the one before."""
    before, seq = hashlib.sha256(b"").hexdigest(), 0
    for change in story.changes:
        if "/events/" not in change.key:
            continue
        if change.value is None:
            yield f"{change.key} was deleted"
            continue
        if change.version != 1:
            yield f"{change.key} was written {change.version} times"
            continue
        told = json.loads(change.value)
        seq += 1
        if not change.key.endswith(f"/{seq:012d}") or told["seq"] != seq:
            yield f"{change.key} says seq {told['seq']}; {seq} was due"
            return
        if told["prev"] != before:
            yield f"{change.key} does not name the event before it"
        before = hashlib.sha256(change.value).hexdigest()


def fenced(story: Story) -> Iterator[str]:
    """Terms never go back, and every event is of the term that etcd had given when it was written."""
    term, leading = 0, 0
    for change in story.changes:
        if change.key.endswith("/leader"):
            leading = 0 if change.value is None else change.create_revision
            if change.value is not None and change.version != 1:
                yield f"the leader key of term {leading} was given to another without a new term"
        elif "/events/" in change.key and change.value is not None:
            told = json.loads(change.value)
            if told["term"] < term:
                yield f"{change.key} is of term {told['term']}, behind one of term {term}"
            if told["term"] != leading:
                yield f"{change.key} is of term {told['term']} while term {leading} led"
            term = max(term, told["term"])
