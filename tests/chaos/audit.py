"""Compares a job's log with its storage and its ranks' own records, by rules written down a second time.

Nothing here is the product's: the log is read as raw JSON through etcd's gateway, storage with a plain S3 client,
digests are computed with hashlib and xxhash. A bug that writer and reader share cannot hide from it.
"""

import base64
import hashlib
import json
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Json = dict[str, Any]


@dataclass(slots=True)
class Objects:
    """What lies in one bucket below the prefix of a store."""

    client: "S3Client"
    bucket: str
    prefix: str

    def keys(self, job: str) -> set[str]:
        found: set[str] = set()
        below = f"{self.prefix}jobs/{job}/"
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below):
            found |= {entry["Key"].removeprefix(self.prefix) for entry in page.get("Contents", [])}
        return found

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()


@dataclass(slots=True)
class Audit:
    """What was found wrong, and what was counted on the way."""

    faults: list[str] = field(default_factory=list)
    objects_checked: int = 0

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)


def read_log(endpoint: str, job: str, prefix: str = "/dtrain") -> list[tuple[str, str, bytes]]:
    """Key, version and value of every event of the job, in the order of their keys."""
    start = f"{prefix}/jobs/{job}/events/"
    encode = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
    question = {"key": encode(start), "range_end": encode(start[:-1] + "0")}
    request = urllib.request.Request(f"http://{endpoint}/v3/kv/range", data=json.dumps(question).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        found = json.load(answer).get("kvs", [])
    return [(base64.b64decode(kv["key"]).decode(), kv["version"], base64.b64decode(kv["value"])) for kv in found]


def audit_chain(audit: Audit, raw: list[tuple[str, str, bytes]]) -> list[Json]:
    """One contiguous chain, written once, terms never going back. Returns the events."""
    events: list[Json] = []
    before, term = hashlib.sha256(b"").hexdigest(), 0
    for number, (key, version, value) in enumerate(raw, start=1):
        event = json.loads(value)
        audit.require(key.endswith(f"/{number:012d}") and event["seq"] == number, f"{key}: not event {number}")
        audit.require(version == "1", f"{key}: written {version} times")
        audit.require(event["prev"] == before, f"{key}: does not follow the event before it")
        audit.require(event["term"] >= term, f"{key}: its term goes back")
        before, term = hashlib.sha256(value).hexdigest(), event["term"]
        events.append(event)
    return events


def audit_story(audit: Audit, events: list[Json]) -> None:
    """Attempts, generations and restores, in the order of the log."""
    inflight: Json | None = None
    attempts = generations = 0
    running = False
    committed: dict[int, Json] = {}  # restorable ones, by number
    suspected: dict[int, Json] = {}
    for event in events:
        kind, data, seq = event["type"], event["data"], event["seq"]
        if kind == "GenerationStarted":
            generations += 1
            audit.require(not running and data["generation"] == generations, f"event {seq}: a second generation")
            newest = committed[max(committed)] if committed else None
            point = data.get("restore")
            said = None if point is None else (point["checkpoint"], point["attempt"], point["step"])
            due = None if newest is None else (newest["checkpoint"], newest["attempt"], newest["step"])
            audit.require(said == due, f"event {seq}: starts from {said}, not from the newest, {due}")
            running = True
        elif kind in ("GenerationFailed", "JobSucceeded", "JobFailed", "JobCancelled", "RunInterrupted"):
            audit.require(inflight is None, f"event {seq}: a checkpoint is still in flight")
            running = False
            if data.get("cleared") in suspected:
                committed[data["cleared"]] = suspected.pop(data["cleared"])
        elif kind == "CheckpointStarted":
            audit.require(running and inflight is None, f"event {seq}: a second attempt in flight")
            audit.require(data["attempt"] == attempts + 1, f"event {seq}: not the next attempt")
            attempts, inflight = data["attempt"], data
        elif kind in ("CheckpointAborted", "CheckpointCommitted"):
            audit.require(inflight is not None and inflight["attempt"] == data["attempt"], f"event {seq}: not started")
            if kind == "CheckpointCommitted":
                same = inflight is not None and all(
                    inflight[k] == data[k] for k in ("step", "generation", "checkpoint")
                )
                audit.require(same, f"event {seq}: commits something else than was started")
                ranks = sorted(shard["rank"] for shard in data["shards"])
                audit.require(ranks == list(range(data["world_size"])), f"event {seq}: shards of {ranks}")
                committed[data["checkpoint"]] = data
            inflight = None
        elif kind in ("CheckpointQuarantined", "CheckpointExpired"):
            gone = committed.pop(data["checkpoint"], None)
            newest_expired = (
                kind == "CheckpointExpired"
                and gone is not None
                and not any(number > data["checkpoint"] for number in committed)
            )
            audit.require(not newest_expired, f"event {seq}: the newest checkpoint expires")
            if data.get("suspect") and gone is not None:
                suspected[data["checkpoint"]] = gone


def audit_storage(audit: Audit, events: list[Json], objects: Objects, job: str) -> None:
    """What the log promises is there, bit by bit; what is there, the log knows."""
    there = objects.keys(job)
    committed = {e["data"]["checkpoint"]: e["data"] for e in events if e["type"] == "CheckpointCommitted"}
    ended = {
        kind: {e["data"]["checkpoint"] for e in events if e["type"] == kind}
        for kind in ("CheckpointExpired", "CheckpointDeleted")
    }
    started = {(e["data"]["checkpoint"], e["data"]["attempt"]) for e in events if e["type"] == "CheckpointStarted"}
    swept = {e["data"]["attempt"] for e in events if e["type"] == "AttemptSwept"}
    lost = _lost_packs(events)
    _audit_packs(audit, events, there)
    for key in there:
        if "/packs/" in key:
            made_in = int(key.split("/attempt-")[1].split("/")[0])
            audit.require(made_in in {attempt for _, attempt in started}, f"{key}: of an attempt that nobody knows")
            audit.require(made_in not in swept and key not in lost, f"{key}: a pack that was deleted")
            continue
        number, attempt = _numbers(key)
        if key.endswith("/COMMITTED"):
            audit.require(number in committed, f"{key}: a marker without its event")
            audit.require(number not in ended["CheckpointDeleted"], f"{key}: a marker of a deleted checkpoint")
            continue
        audit.require((number, attempt) in started, f"{key}: of an attempt that the log does not know")
        audit.require(attempt not in swept, f"{key}: of an attempt that was swept")
        is_deleted = number in ended["CheckpointDeleted"] and committed[number]["attempt"] == attempt
        audit.require(not is_deleted, f"{key}: of a checkpoint that was deleted")
    for number, data in committed.items():
        if number in ended["CheckpointExpired"]:
            continue
        _audit_checkpoint(audit, data, objects, there)
        marker_key = f"{data['manifest_key'].split('/attempt-')[0]}/COMMITTED"
        audit.require(marker_key in there, f"checkpoint {number}: its marker is not there")
        if marker_key in there:
            marker = json.loads(objects.read(marker_key))
            audit.require(marker["manifest_digest"] == data["manifest_digest"], f"{marker_key}: of another manifest")


def owed(events: list[Json]) -> list[str]:
    """What the log still owes to storage. The log of an ended job owes nothing, after a while."""

    def told(kind: str, name: str) -> set[int]:
        return {e["data"][name] for e in events if e["type"] == kind}

    expired = told("CheckpointExpired", "checkpoint")
    unmarked = told("CheckpointCommitted", "checkpoint") - told("CheckpointMarked", "checkpoint") - expired
    undeleted = expired - told("CheckpointDeleted", "checkpoint")
    unswept = told("CheckpointAborted", "attempt") - told("AttemptSwept", "attempt")
    packs = {e["seq"] for e in events if e["type"] == "PacksExpired"} - told("PacksDeleted", "expired")
    return [
        *(f"checkpoint {number}: never marked" for number in sorted(unmarked)),
        *(f"checkpoint {number}: expired and never deleted" for number in sorted(undeleted)),
        *(f"attempt {number}: aborted and never swept" for number in sorted(unswept)),
        *(f"packs of event {number}: expired and never deleted" for number in sorted(packs)),
    ]


def _lost_packs(events: list[Json]) -> set[str]:
    """Packs that the log calls deleted."""
    batches = {e["seq"]: e["data"]["keys"] for e in events if e["type"] == "PacksExpired"}
    return {key for e in events if e["type"] == "PacksDeleted" for key in batches[e["data"]["expired"]]}


def _audit_packs(audit: Audit, events: list[Json], there: set[str]) -> None:
    """A pack lives as long as a checkpoint names it. That those which are named are there is seen with the shards."""
    expired = {e["data"]["checkpoint"] for e in events if e["type"] == "CheckpointExpired"}
    committed = [e["data"] for e in events if e["type"] == "CheckpointCommitted"]
    named = {pack["key"] for c in committed for shard in c["shards"] for pack in shard.get("packs", [])}
    living = [c for c in committed if c["checkpoint"] not in expired]
    needed = {pack["key"] for c in living for shard in c["shards"] for pack in shard.get("packs", [])}
    for event in events:
        if event["type"] == "PacksExpired":
            audit.require(
                not needed & set(event["data"]["keys"]), f"event {event['seq']}: a pack that is needed expires"
            )
    for key in {key for key in there if "/packs/" in key}:
        audit.require(key in named, f"{key}: a pack that no checkpoint ever named")
        audit.require(key in needed, f"{key}: a pack that no checkpoint needs any more")


def _numbers(key: str) -> tuple[int, int]:
    """Checkpoint and attempt of an object's key; attempt 0 for a marker."""
    parts = key.split("/")
    number = int(parts[parts.index("checkpoints") + 1])
    attempt = next((int(part.removeprefix("attempt-")) for part in parts if part.startswith("attempt-")), 0)
    return number, attempt


def _audit_checkpoint(audit: Audit, data: Json, objects: Objects, there: set[str]) -> None:
    def is_intact(key: str, digest: str, size_bytes: int | None = None) -> bytes:
        if key not in there:
            audit.faults.append(f"{key}: committed and missing")
            return b""
        body = objects.read(key)
        audit.objects_checked += 1
        audit.require(f"xxh3-128:{xxhash.xxh3_128_hexdigest(body)}" == digest, f"{key}: committed and damaged")
        audit.require(size_bytes in (None, len(body)), f"{key}: {len(body)} bytes, not {size_bytes}")
        return body

    manifest = is_intact(data["manifest_key"], data["manifest_digest"])
    for shard in data["shards"]:
        is_intact(shard["key"], shard["digest"], shard["size_bytes"])
        is_intact(shard["index_key"], shard["index_digest"])
        for pack in shard.get("packs", []):
            is_intact(pack["key"], pack["digest"], pack["size_bytes"])
    if manifest:
        said = json.loads(manifest)
        for name in ("checkpoint", "attempt", "generation", "step", "world_size"):
            audit.require(said[name] == data[name], f"{data['manifest_key']}: {name} is {said[name]}")
        keys = [(s["rank"], s["key"], s["size_bytes"], s["digest"]) for s in said["shards"]]
        due = [(s["rank"], s["key"], s["size_bytes"], s["digest"]) for s in data["shards"]]
        audit.require(sorted(keys) == sorted(due), f"{data['manifest_key']}: lists other shards than the event")


@dataclass(slots=True)
class Trained:
    """What the ranks' own records say."""

    begun: int = 0  # steps begun, over all ranks and generations
    repeated: int = 0  # of these, begun before


def audit_records(audit: Audit, events: list[Json], records: Path, ranks: int, steps: int) -> Trained:
    """Each rank, in each generation, did every step from its restore on, on the same data as at any other time.

    And no generation trained on when a newer one did.
    """
    starts = {
        e["data"]["generation"]: (e["data"].get("restore") or {"step": 0})["step"]
        for e in events
        if e["type"] == "GenerationStarted"
    }
    trained = Trained()
    for rank in range(ranks):
        path = records / f"rank{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        _audit_order(audit, rank, [line["generation"] for line in lines])
        fed: dict[int, float] = {}
        by_generation: dict[int, list[int]] = {}
        for line in lines:
            by_generation.setdefault(line["generation"], []).append(line["step"])
            same = fed.setdefault(line["step"], line["sum"]) == line["sum"]
            audit.require(same, f"rank {rank}: step {line['step']} was given other data when it was repeated")
        for generation, done in by_generation.items():
            first = starts.get(generation, -1) + 1
            gapless = done == list(range(first, first + len(done)))
            audit.require(gapless, f"rank {rank}, generation {generation}: steps {done[:3]}..., not from {first} on")
        audit.require(bool(fed) and max(fed) == steps, f"rank {rank}: its last step is not {steps}")
        trained.begun += len(lines)
        trained.repeated += len(lines) - len(fed)
    return trained


def _audit_order(audit: Audit, rank: int, generations: list[int]) -> None:
    """Find ranks that trained on when a newer generation did, given the generation of each step in the order of time.

    One step may still begin: a rank that was stopped between two steps only sees its peers missing when it has.
    """
    newest, late = 0, Counter[int]()
    for generation in generations:
        newest = max(newest, generation)
        late[generation] += generation < newest
    for generation, count in late.items():
        audit.require(count <= 1, f"rank {rank}: generation {generation} trained on beside a newer one")
