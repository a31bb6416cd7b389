"""A run in which too little happened, or after which something is still owed, proves nothing and fails."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from tests.chaos import runner
from tests.chaos.audit import Json, owed
from tests.chaos.runner import MTBF_S, Ledger, settle
from tests.chaos.test_chaos import MINUTES

LONG = 10.0  # minutes, of `make chaos`


def full(minutes: float) -> Ledger:
    """A ledger of a run in which just enough happened."""
    return Ledger(
        seed=1,
        minutes=minutes,
        faults=Counter({"kill worker": math.ceil(8 * minutes)}),
        events=Counter(CheckpointCommitted=math.ceil(2 * minutes), GenerationStarted=math.ceil(0.3 * minutes)),
        storm_commits=int(minutes),
        storm_generations=math.ceil(0.2 * int(minutes)),
        met=Counter({"503": 1}),
    )


@pytest.mark.parametrize("minutes", [MINUTES, LONG])
def test_enough_is_enough(minutes: float) -> None:
    assert full(minutes).too_little() == []


@pytest.mark.parametrize("minutes", [MINUTES, LONG])
@pytest.mark.parametrize("what", ["faults", "commits", "generations"])
def test_too_few_in_the_whole_run_are_found(what: str, minutes: float) -> None:
    ledger = full(minutes)
    counter, name = {
        "faults": (ledger.faults, "kill worker"),
        "commits": (ledger.events, "CheckpointCommitted"),
        "generations": (ledger.events, "GenerationStarted"),
    }[what]
    counter[name] -= 1
    assert ledger.too_little() == [f"too little happened: {counter[name]} {what}"]


def test_too_few_commits_under_faults_are_found() -> None:
    assert replace(full(LONG), storm_commits=9).too_little() == ["too little happened: 9 commits under faults"]
    first_alone = replace(full(LONG), storm_generations=1, storm_commits=100)
    assert first_alone.too_little() == ["too little happened: 1 generations committed under faults"]
    assert replace(full(MINUTES), storm_commits=0, storm_generations=0).too_little() == []


def test_a_ledger_of_nothing_is_found_however_short_the_run_was() -> None:
    for minutes in (MINUTES, LONG):
        assert len(Ledger(seed=1, minutes=minutes).too_little()) >= 3


def test_faults_that_met_nothing_are_found() -> None:
    ledger = full(LONG)
    ledger.faults["storage 503"] = runner.EVIDENCE_FROM
    assert ledger.too_little() == []
    ledger.met["503"] = 0
    assert any("nothing met it" in found for found in ledger.too_little())


def test_the_floor_of_faults_is_well_below_what_is_drawn_and_far_above_nothing() -> None:
    drawn_per_minute = 60 / MTBF_S
    assert 0.25 * drawn_per_minute < runner.FAULTS_FLOOR_PER_MINUTE < 0.5 * drawn_per_minute


OWED: list[tuple[list[Json], str]] = [
    ([{"type": "CheckpointCommitted", "data": {"checkpoint": 3}}], "checkpoint 3: never marked"),
    ([{"type": "CheckpointExpired", "data": {"checkpoint": 3}}], "checkpoint 3: expired and never deleted"),
    ([{"type": "CheckpointAborted", "data": {"attempt": 4}}], "attempt 4: aborted and never swept"),
    ([{"type": "PacksExpired", "seq": 5, "data": {}}], "packs of event 5: expired and never deleted"),
]
DONE: list[Json] = [
    {"type": "CheckpointMarked", "data": {"checkpoint": 3}},
    {"type": "CheckpointDeleted", "data": {"checkpoint": 3}},
    {"type": "AttemptSwept", "data": {"attempt": 4}},
    {"type": "PacksDeleted", "data": {"expired": 5}},
]


@pytest.mark.parametrize(("events", "what"), OWED, ids=lambda given: given if isinstance(given, str) else "")
def test_what_is_still_owed_at_the_end_is_found(events: list[Json], what: str) -> None:
    assert owed(events) == [what]
    assert owed(events + DONE) == []
    assert settle(lambda: events, within_s=0.0) == [what]
    assert settle(lambda: events + DONE, within_s=0.0) == []


def test_a_log_that_nobody_can_read_is_not_settled() -> None:
    assert settle(list, within_s=0.0) == ["the log cannot be read"]
