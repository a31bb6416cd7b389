"""Logs of real runs of older dtrains, replayed for ever: every prefix must mean what it meant."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.histories.meanings import LOGS, digest, digest_lines, job_of, log_paths, meaning, states_of

# What the recorded runs must have gone through together, or they prove less than they seem to.
SITUATIONS = {
    "AttemptSwept",
    "CancelRequested",
    "CheckpointAborted",
    "CheckpointCommitted",
    "CheckpointDeleted",
    "CheckpointExpired",
    "CheckpointMarked",
    "CheckpointQuarantined",
    "GenerationFailed",
    "HangFound",
    "HangSuspected",
    "JobCancelled",
    "JobSucceeded",
    "MembersFinished",
    "PacksDeleted",
    "PacksExpired",
    "RunInterrupted",
    "SalvageStarted",
}


@pytest.mark.parametrize("path", log_paths(), ids=lambda path: path.stem)
def test_every_prefix_of_an_old_log_means_what_it_meant(path: Path, regenerate: bool) -> None:
    values = path.read_bytes().splitlines()
    stored = path.with_suffix(".digests")
    found = digest_lines(values)
    if regenerate:
        stored.write_text("".join(f"{line}\n" for line in found))
    for number, (line, due) in enumerate(zip(found, stored.read_text().splitlines(), strict=True)):
        if line != due:
            state = json.dumps(meaning(states_of(values)[number][1]), indent=2, sort_keys=True)
            raise AssertionError(f"after {due} this dtrain reads {line} ({job_of(values)}):\n{state}")


def test_the_recorded_runs_went_through_all_there_is() -> None:
    types: set[str] = set()
    failovers = suspected = shrunk = 0
    for path in log_paths():
        events = [json.loads(line) for line in path.read_bytes().splitlines()]
        types |= {event["type"] for event in events}
        failovers += len({event["term"] for event in events}) > 1
        suspected += any(event["data"].get("suspect") for event in events)
        shrunk += len({event["data"]["world_size"] for event in events if event["type"] == "GenerationStarted"}) > 1
    assert types >= SITUATIONS
    assert failovers and suspected and shrunk
    salvage = [json.loads(line)["type"] for line in (LOGS / "salvaged.jsonl").read_bytes().splitlines()]
    at = salvage.index("SalvageStarted")
    assert salvage[at : at + 4] == ["SalvageStarted", "CheckpointCommitted", "GenerationFailed", "GenerationStarted"]


@pytest.mark.parametrize("changed", [{"restarts": 7}, {"last_attempt": 99}, {"placed": {}}, {"reason": "another"}])
def test_a_log_that_is_read_differently_has_another_digest(changed: dict[str, Any]) -> None:
    _, state = states_of((LOGS / "failed-generation.jsonl").read_bytes().splitlines())[-1]
    assert digest(replace(state, **changed)) != digest(state)


def test_a_field_that_stands_at_its_default_changes_no_digest() -> None:
    @dataclass(frozen=True)
    class Before:
        step: int

    @dataclass(frozen=True)
    class After:
        step: int
        added: dict[str, int] = field(default_factory=dict)
        more: float = 1.5

    assert meaning(Before(step=3)) == meaning(After(step=3)) != meaning(After(step=3, more=1.0))
