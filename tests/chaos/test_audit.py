"""The auditor finds what is wrong: a check that never objects proves nothing."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.chaos.audit import Audit, Json, Objects, audit_chain, audit_records, audit_storage, audit_story
from tests.histories.meanings import LOGS, log_paths


class Held(Objects):
    """Objects in memory."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def keys(self, job: str) -> set[str]:
        return set(self.objects)

    def read(self, key: str) -> bytes:
        return self.objects[key]


def chained(events: list[Json]) -> list[tuple[str, str, bytes]]:
    """The events as etcd would hold them, their chain made anew."""
    raw, before = [], hashlib.sha256(b"").hexdigest()
    for number, event in enumerate(events, start=1):
        value = json.dumps({**event, "seq": number, "prev": before}).encode()
        raw.append((f"/dtrain/jobs/x/events/{number:012d}", "1", value))
        before = hashlib.sha256(value).hexdigest()
    return raw


def findings(events: list[Json]) -> list[str]:
    audit = Audit()
    audit_story(audit, audit_chain(audit, chained(events)))
    return audit.faults


def recorded(name: str) -> list[Json]:
    return [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("path", log_paths(), ids=lambda path: path.stem)
def test_logs_of_real_runs_are_sound(path: Path) -> None:
    audit = Audit()
    values = path.read_bytes().splitlines()
    raw = [(f"/dtrain/jobs/x/events/{n:012d}", "1", value) for n, value in enumerate(values, start=1)]
    audit_story(audit, audit_chain(audit, raw))
    assert audit.faults == []


def test_an_edited_a_lost_and_a_rewritten_event_are_found() -> None:
    raw = chained(recorded("failover"))
    key, version, value = raw[3]
    for changed in (
        [*raw[:3], (key, version, value.replace(b'"time"', b'"tome"')), *raw[4:]],
        raw[:3] + raw[4:],
        [*raw[:3], (key, "2", value), *raw[4:]],
    ):
        audit = Audit()
        audit_chain(audit, changed)
        assert audit.faults


def _drop(kind: str) -> Callable[[list[Json]], list[Json]]:
    def change(events: list[Json]) -> list[Json]:
        at = next(n for n, event in enumerate(events) if event["type"] == kind)
        return events[:at] + events[at + 1 :]

    return change


def _set(kind: str, name: str, value: Any) -> Callable[[list[Json]], list[Json]]:
    def change(events: list[Json]) -> list[Json]:
        last = max(n for n, event in enumerate(events) if event["type"] == kind)
        events[last] = {**events[last], "data": {**events[last]["data"], name: value}}
        return events

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop("CheckpointStarted"),
        _drop("CheckpointCommitted"),
        _drop("GenerationFailed"),
        _set("GenerationStarted", "restore", None),
        _set("GenerationStarted", "generation", 9),
        _set("CheckpointCommitted", "step", 7),
        _set("CheckpointCommitted", "attempt", 99),
        _set("CheckpointCommitted", "world_size", 3),
    ],
)
def test_a_story_that_cannot_be_is_found(change: Callable[[list[Json]], list[Json]]) -> None:
    assert findings(change(recorded("failed-generation")))


def test_a_suspected_checkpoint_that_is_cleared_has_to_be_used_again() -> None:
    committed = {"checkpoint": 1, "attempt": 1, "generation": 1, "step": 10, "world_size": 1, "shards": [{"rank": 0}]}
    story = [
        ("GenerationStarted", {"generation": 1}),
        ("CheckpointStarted", committed),
        ("CheckpointCommitted", committed),
        ("GenerationFailed", {}),
        ("CheckpointQuarantined", {"checkpoint": 1, "suspect": True}),
        ("JobFailed", {"cleared": 1}),
    ]
    for restore, is_sound in ((committed, True), (None, False)):
        told = [*story, ("GenerationStarted", {"generation": 2, "restore": restore})]
        events = [{"type": kind, "data": data, "term": 1} for kind, data in told]
        assert (findings(events) == []) is is_sound


def storage() -> tuple[list[Json], dict[str, bytes]]:
    """One committed and marked checkpoint of one rank, and what lies in storage for it."""
    folder = "jobs/x/checkpoints/000001"
    shard, index = b"shard", b"index"
    digest = lambda data: f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"  # noqa: E731
    told = {"rank": 0, "key": f"{folder}/attempt-000001/rank-00000.safetensors", "size_bytes": 5}
    told |= {"digest": digest(shard), "index_key": f"{folder}/attempt-000001/rank-00000.index.json"}
    told |= {"index_digest": digest(index)}
    data = {"checkpoint": 1, "attempt": 1, "generation": 1, "step": 10, "world_size": 1}
    manifest = json.dumps({**data, "shards": [told]}).encode()
    committed = {**data, "shards": [told], "manifest_key": f"{folder}/attempt-000001/manifest.json"}
    committed["manifest_digest"] = digest(manifest)
    objects = {
        told["key"]: shard,
        told["index_key"]: index,
        committed["manifest_key"]: manifest,
        f"{folder}/COMMITTED": json.dumps({"manifest_digest": digest(manifest)}).encode(),
    }
    events = [
        {"type": "CheckpointStarted", "data": data},
        {"type": "CheckpointCommitted", "data": committed},
        {"type": "CheckpointMarked", "data": {"checkpoint": 1}},
    ]
    return events, objects


def storage_findings(events: list[Json], objects: dict[str, bytes]) -> list[str]:
    audit = Audit()
    audit_storage(audit, events, Held(objects), "x")
    return audit.faults


def test_storage_that_holds_what_the_log_says_is_sound() -> None:
    assert storage_findings(*storage()) == []


@pytest.mark.parametrize("part", ["safetensors", "index.json", "manifest.json", "COMMITTED"])
def test_every_missing_and_every_damaged_object_is_found(part: str) -> None:
    events, objects = storage()
    (key,) = (key for key in objects if key.endswith(part))
    assert storage_findings(events, {name: data for name, data in objects.items() if name != key})
    assert storage_findings(
        events, {**objects, key: objects[key].replace(b"xxh3", b"xxx3") if b"xxh3" in objects[key] else b"other"}
    )


def test_what_the_log_does_not_know_or_has_deleted_is_found() -> None:
    events, objects = storage()
    assert storage_findings(events[:1], objects), "a marker without a commit"
    assert storage_findings(events, {**objects, "jobs/x/checkpoints/000001/attempt-000002/rank-00000": b""})
    gone = [{"type": kind, "data": {"checkpoint": 1}} for kind in ("CheckpointExpired", "CheckpointDeleted")]
    assert storage_findings(events + gone, objects)
    assert storage_findings(events + gone, {}) == []


@pytest.mark.parametrize(
    ("steps", "why"),
    [([1, 2, 4], "not from 1 on"), ([2, 3, 4], "not from 1 on"), ([1, 2, 3], "last step")],
)
def test_a_rank_that_left_out_a_step_is_found(steps: list[int], why: str, tmp_path: Path) -> None:
    lines = [json.dumps({"generation": 1, "step": step, "sum": 0.0}) for step in steps]
    (tmp_path / "rank0.jsonl").write_text("\n".join(lines))
    audit = Audit()
    started = [{"type": "GenerationStarted", "data": {"generation": 1}}]
    audit_records(audit, started, tmp_path, ranks=1, steps=4)
    assert any(why in fault for fault in audit.faults)


@pytest.mark.parametrize(
    ("generations", "is_sound"), [("1122", True), ("1121", True), ("11211", False), ("1212121", False)]
)
def test_a_generation_that_trains_on_beside_a_newer_one_is_found(
    generations: str, is_sound: bool, tmp_path: Path
) -> None:
    steps = {"1": 0, "2": 0}
    lines = []
    for generation in generations:
        steps[generation] += 1
        lines.append(json.dumps({"generation": int(generation), "step": steps[generation], "sum": 0.0}))
    (tmp_path / "rank0.jsonl").write_text("\n".join(lines))
    audit = Audit()
    started = [{"type": "GenerationStarted", "data": {"generation": number}} for number in (1, 2)]
    audit_records(audit, started, tmp_path, ranks=1, steps=max(steps.values()))
    assert audit.faults == ([] if is_sound else ["rank 0: generation 1 trained on beside a newer one"])
