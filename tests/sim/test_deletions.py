"""What the checkers of deletions object to, each on a story of a few events and objects."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.sim.blobs import Deed, Look
from tests.sim.checkers import deletions
from tests.sim.checkers.stories import Story
from tests.sim.etcd import Change

ATTEMPT = "jobs/job/checkpoints/000001/attempt-000001"
SHARD, MANIFEST = f"{ATTEMPT}/rank-00000.safetensors", f"{ATTEMPT}/manifest.json"
MARKER, PACK = "jobs/job/checkpoints/000001/COMMITTED", "jobs/job/packs/attempt-000001/rank-00000-00.bin"
COMMITTED = {"checkpoint": 1, "attempt": 1, "manifest_key": MANIFEST, "shards": [
    {"key": SHARD, "index_key": f"{ATTEMPT}/rank-00000.index.json", "packs": [{"key": PACK}]}]}  # fmt: skip
LIFE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("CheckpointCommitted", COMMITTED),
    ("CheckpointExpired", {"checkpoint": 1}),
    ("CheckpointDeleted", {"checkpoint": 1}),
    ("PacksExpired", {"keys": [PACK], "store": ""}),
    ("PacksDeleted", {"expired": 4}),
)  # events 1 to 5, each at the second of its number
SWEPT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("CheckpointAborted", {"checkpoint": 1, "attempt": 1}),
    ("AttemptSwept", {"checkpoint": 1, "attempt": 1}),
)
PUTS = [(0.5, key, b"") for key in (SHARD, MANIFEST, PACK)] + [(1.5, MARKER, b"")]
GONE = [(2.2, MARKER, None), (2.4, MANIFEST, None), (2.6, SHARD, None), (4.5, PACK, None)]


def story(
    events: tuple[tuple[str, dict[str, Any]], ...],
    deeds: list[tuple[float, str, bytes | None]],
    looked_s: tuple[float, ...] = (),
    by: dict[float, str] | None = None,
) -> Story:
    """``looked_s``: when both folders of the attempt were listed; ``by``: who did a second's deed, if not c1."""

    def change(seq: int, kind: str, data: dict[str, Any]) -> Change:
        value = json.dumps({"term": 1, "time": float(seq), "type": kind, "data": data}).encode()
        at = {"at_s": float(seq), "key": f"/dtrain/jobs/job/events/{seq:012d}", "value": value, "revision": seq}
        return cast(Change, SimpleNamespace(**at))

    world = SimpleNamespace(
        etcd=SimpleNamespace(history=[change(n, *event) for n, event in enumerate(events, start=1)]),
        blobs=SimpleNamespace(
            history=[Deed(at_s, (by or {}).get(at_s, "c1"), key, data, True) for at_s, key, data in sorted(deeds)],
            looks=[
                Look(at_s, prefix) for at_s in looked_s for prefix in (f"{ATTEMPT}/", f"{PACK.rpartition('/')[0]}/")
            ],
        ),
        diary=SimpleNamespace(entries=[]),
        loop=SimpleNamespace(now_s=99.0),
        ends={"job": "JobSucceeded"},
        healed=True,
    )
    return Story(cast(Any, world), cast(Any, None), "job")


def found(it: Story) -> set[str]:
    checkers = (deletions.order, deletions.confirmed, deletions.packs_expire, deletions.leftovers)
    return {checker.__name__ for checker in checkers if list(checker(it))}


def test_a_whole_life_is_sound() -> None:
    assert found(story(LIFE, [*PUTS, *GONE])) == set()


@pytest.mark.parametrize(
    ("early", "late"), [(MANIFEST, MARKER), (SHARD, MARKER), (SHARD, MANIFEST)], ids=lambda key: key.rsplit("/")[-1]
)
def test_what_is_promised_must_not_go_first(early: str, late: str) -> None:
    times = {key: at_s for at_s, key, _ in GONE}
    swapped = {**times, early: times[late], late: times[early]}
    assert found(story(LIFE, [*PUTS, *((at_s, key, None) for key, at_s in swapped.items())])) == {"order"}


def test_a_manifest_that_a_leader_before_puts_in_the_midst_of_the_deletion_promises_nothing() -> None:
    deeds = [*PUTS, *GONE, (2.5, MANIFEST, b""), (2.7, MANIFEST, None)]
    assert found(story(LIFE, deeds)) == {"order"}
    assert found(story(LIFE, deeds, by={2.5: "c0"})) == set()
    assert found(story(LIFE, deeds, by={2.4: "c0", 2.5: "c0"})) == {"order"}, "who deletes has not deleted it yet"


@pytest.mark.parametrize(
    ("put_s", "by", "objects"), [(1.2, "c0", set()), (1.2, "c1", {"order"}), (0.8, "c0", {"order"})]
)
def test_a_manifest_that_a_leader_before_puts_when_its_attempt_was_aborted_promises_nothing(
    put_s: float, by: str, objects: set[str]
) -> None:
    deeds = [(0.5, SHARD, b""), (put_s, MANIFEST, b""), (1.5, SHARD, None), (1.6, MANIFEST, None)]
    assert found(story(SWEPT, deeds, by={put_s: by})) == objects


@pytest.mark.parametrize("key", [MARKER, MANIFEST, SHARD, PACK], ids=lambda key: key.rsplit("/")[-1])
def test_what_is_called_deleted_must_be_gone_and_must_not_come_back(key: str) -> None:
    kept = [deed for deed in GONE if deed[1] != key]
    assert {"confirmed", "leftovers"} <= found(story(LIFE, [*PUTS, *kept]))
    assert "confirmed" in found(story(LIFE, [*PUTS, *kept, (9.0, key, None)]))
    assert found(story(LIFE, [*PUTS, *GONE, (9.0, key, b"")])) == {"leftovers"}


@pytest.mark.parametrize("key", [MANIFEST, SHARD, PACK], ids=lambda key: key.rsplit("/")[-1])
def test_what_is_called_swept_must_be_gone_and_must_not_come_back(key: str) -> None:
    gone = [(1.5, name, None) for name in (MANIFEST, SHARD, PACK)]
    assert found(story(SWEPT, [(0.5, key, b""), *gone])) == set()
    assert found(story(SWEPT, [(0.5, key, b"")])) == {"confirmed", "leftovers"}
    assert found(story(SWEPT, [(0.5, key, b""), *gone, (9.0, key, b"")])) == {"leftovers"}
    late = [(1.4, key, b""), *((1.5, name, None) for name in (MANIFEST, SHARD, PACK) if name != key)]
    others = [(0.5, name, b"") for name in (MANIFEST, SHARD, PACK) if name != key]
    assert "confirmed" in found(story(SWEPT, [*others, *late], (1.3,))), "it came while the others were deleted"
    behind = [*others, *late[1:], (1.9, key, b"")]
    assert "confirmed" in found(story(SWEPT, behind, (1.3,))), "nobody looked again"
    assert found(story(SWEPT, behind, (1.3, 1.8))) == {"leftovers"}, "it came behind the last look"
    assert found(story(SWEPT, [(1.9, key, b"")], (1.8,))) == {"leftovers"}, "there had been nothing"
    assert "confirmed" in found(story(SWEPT, [(1.7, key, b"")], (1.8,))), "the last look had found it"


def test_packs_that_are_named_must_not_expire() -> None:
    too_soon = (LIFE[0], ("PacksExpired", {"keys": [PACK], "store": ""}))
    assert found(story(too_soon, PUTS)) == {"packs_expire"}
    again = (*LIFE, ("CheckpointCommitted", {**COMMITTED, "checkpoint": 2, "attempt": 2}))
    assert "packs_expire" in found(story(again, [*PUTS, *GONE]))
