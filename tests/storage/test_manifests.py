"""Manifests and markers: the same bytes whoever writes them, and nothing else is accepted."""

import json
from dataclasses import replace

import msgspec
import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.common.names import AttemptNumber, CheckpointNumber, Generation, JobName, Step
from dtrain.storage.keys import index_key, manifest_key, shard_key
from dtrain.storage.manifests import CommitMarker, Manifest, ShardEntry, decode_manifest, decode_marker, encode

JOB, CHECKPOINT, ATTEMPT = JobName("mnist"), CheckpointNumber(2), AttemptNumber(3)
DIGEST = "xxh3-128:" + "0f" * 16
PACK = {"key": "jobs/mnist/packs/attempt-000001/rank-00000-0f.bin", "size_bytes": 10, "digest": DIGEST}

MANIFEST = Manifest(
    job=JOB,
    checkpoint=CHECKPOINT,
    attempt=ATTEMPT,
    generation=Generation(1),
    step=Step(100),
    world_size=2,
    shards=tuple(
        ShardEntry(
            rank=rank,
            key=shard_key(JOB, CHECKPOINT, ATTEMPT, rank),
            size_bytes=4096,
            digest=DIGEST,
            index_key=index_key(JOB, CHECKPOINT, ATTEMPT, rank),
            index_digest=DIGEST,
        )
        for rank in range(2)
    ),
)
MARKER = CommitMarker(
    job=JOB,
    checkpoint=CHECKPOINT,
    attempt=ATTEMPT,
    step=Step(100),
    manifest_key=manifest_key(JOB, CHECKPOINT, ATTEMPT),
    manifest_digest=DIGEST,
    position_seq=12,
    position_digest="ab" * 32,
)


def test_a_manifest_survives_the_round_trip() -> None:
    assert decode_manifest(encode(MANIFEST)) == MANIFEST


def test_a_marker_survives_the_round_trip() -> None:
    assert decode_marker(encode(MARKER)) == MARKER


def test_encoding_is_json_with_sorted_keys_and_no_white_space() -> None:
    data = encode(MANIFEST)
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    assert set(json.loads(data)) == {
        "version", "job", "checkpoint", "attempt", "generation", "step", "world_size", "shards"
    }  # fmt: skip
    assert set(json.loads(data)["shards"][0]) == {
        "rank", "key", "size_bytes", "digest", "index_key", "index_digest", "packs"
    }  # fmt: skip


def test_a_manifest_from_before_there_were_packs_is_read_and_written_back_as_it_was() -> None:
    document = json.loads(encode(MANIFEST)) | {"version": 2}
    for shard in document["shards"]:
        del shard["packs"]
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert decode_manifest(data) == replace(MANIFEST, version=2)
    assert encode(decode_manifest(data)) == data


def changed(change: dict[str, object]) -> bytes:
    return json.dumps({**json.loads(encode(MANIFEST)), **change}, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"{}", "cannot be read"),
        (b"[1]", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (encode(MANIFEST)[:-1], "cannot be read"),
        (encode(MANIFEST) + b"\n", "not in canonical form"),
        (encode(MANIFEST).replace(b'"step":', b'"step": '), "not in canonical form"),
        (changed({"extra": 1}), "not in canonical form"),
        (changed({"version": 1}), "has version 1; this dtrain reads version 2 and 3"),
        (changed({"version": "1"}), "cannot be read"),
        (changed({"step": -1}), "negative"),
        (changed({"step": 1.5}), "cannot be read"),
        (changed({"step": "100"}), "cannot be read"),
        (changed({"job": "../up"}), "job name"),
        (changed({"checkpoint": 0}), "out of range"),
        (changed({"world_size": 3}), "ranks 0 to 2"),
        (changed({"shards": []}), "ranks 0 to 1"),
        (changed({"shards": json.loads(encode(MANIFEST))["shards"][::-1]}), "ranks 0 to 1"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(ShardDamagedError, match=why) as caught:
        decode_manifest(data, key="jobs/mnist/x/manifest.json")
    assert caught.value.key == "jobs/mnist/x/manifest.json"


@pytest.mark.parametrize(
    "change",
    [
        {"key": "jobs/other/blob"},
        {"key": "jobs/mnist/../other/blob"},
        {"size_bytes": 0},
        {"digest": "md5:00"},
        {"digest": DIGEST.upper()},
        {"packs": [PACK | {"key": "jobs/mnist/checkpoints/pack"}]},
        {"packs": [PACK | {"key": "jobs/other/packs/pack"}]},
        {"packs": [PACK | {"size_bytes": 0}]},
        {"packs": [PACK | {"digest": "none"}]},
        {"packs": [PACK, PACK]},
        {"packs": [PACK | {"key": f"{PACK['key']}{number}"} for number in range(9)]},
    ],
)
def test_a_manifest_with_a_bad_entry_is_neither_written_nor_read(change: dict[str, object]) -> None:
    document = json.loads(encode(MANIFEST))
    document["shards"][1].update(change)
    with pytest.raises(ShardDamagedError):
        decode_manifest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    entry = msgspec.convert(document["shards"][1], type=ShardEntry)
    with pytest.raises(ValueError, match=r"."):
        encode(replace(MANIFEST, shards=(MANIFEST.shards[0], entry)))


@pytest.mark.parametrize(
    "bad",
    [
        replace(MARKER, manifest_key="jobs/other/checkpoints/000002/attempt-000003/manifest.json"),
        replace(MARKER, manifest_digest="none"),
        replace(MARKER, position_seq=0),
        replace(MARKER, position_digest="AB" * 32),
        replace(MARKER, step=Step(-1)),
    ],
)
def test_a_bad_marker_is_not_written(bad: CommitMarker) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode(bad)


def test_a_manifest_is_no_marker() -> None:
    with pytest.raises(ShardDamagedError):
        decode_marker(encode(MANIFEST))
