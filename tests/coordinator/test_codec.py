"""Events as bytes: what is written is read again, by a person too, and what cannot be read names its key."""

import json
from typing import get_args

import pytest

from dtrain.common.errors import LogDamagedError, UserError
from dtrain.common.names import JobName
from dtrain.common.specs import CheckpointPolicy
from dtrain.coordinator import codec
from dtrain.coordinator.codec import Entry
from dtrain.coordinator.core.events import Cause, Decision, Event
from tests.coordinator.support.clusters import JOB, PREFIX, WALL_START_S, spec
from tests.coordinator.support.samples import EVENTS

NAME = JobName(JOB)
KEY = codec.event_key(PREFIX, NAME, 9)
CAUSES = [
    Cause(fact="f"),
    Cause(fact="f", worker="w", snapshot=4, rank=0, exit_code=-9, detail="d", traceback="Traceback:\n  a\nb"),
]


def record(event: Event, cause: Cause = CAUSES[0]) -> Entry:
    return codec.record(
        Decision(event=event, cause=cause),
        prefix=PREFIX, job=NAME, seq=9, term=7, time_s=WALL_START_S + 0.123456, prev="0" * 64,
    )  # fmt: skip


def test_there_is_a_sample_of_every_type_of_event() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("cause", CAUSES, ids=["plain", "full"])
def test_an_event_is_read_as_it_was_written_with_the_same_digest(event: Event, cause: Cause) -> None:
    entry = record(event, cause)
    assert codec.decode(KEY, entry.value, NAME) == entry.record


def test_an_event_is_json_that_a_person_reads_without_empty_causes() -> None:
    value = json.loads(record(EVENTS[-2]).value)
    assert list(value) == ["seq", "term", "time", "type", "data", "cause", "prev"]
    assert value["type"] == "JobFailed"
    assert value["cause"] == {"fact": "f"}
    assert value["time"] == WALL_START_S + 0.123


def test_a_rank_of_zero_is_a_cause_that_says_something() -> None:
    assert json.loads(record(EVENTS[-2], CAUSES[1]).value)["cause"]["rank"] == 0


def test_keys_of_events_sort_as_their_numbers() -> None:
    keys = [codec.event_key(PREFIX, NAME, seq) for seq in (1, 9, 10, 99_999, 10**11)]
    assert keys == sorted(keys)


def changed(**fields: object) -> bytes:
    value = json.loads(record(EVENTS[0]).value)
    for path, new in fields.items():
        place = value
        *folders, last = path.split("__")
        for folder in folders:
            place = place[folder]
        place[last] = new
    return json.dumps(value).encode()


def test_fields_that_a_newer_dtrain_added_are_tolerated_everywhere() -> None:
    value = changed(new=1, data__new=[2], data__spec__new={"a": 1}, cause__new="x", data__spec__checkpoints__new=0)
    assert codec.decode(KEY, value, NAME).event == EVENTS[0]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        changed(type="JobExploded"),
        changed(seq="nine"),
        changed(term=None),
        changed(data__run="two"),
        changed(data={}),
        changed(cause={}),
        changed(data__spec__nnodes_min=0),
        changed(data__spec__checkpoints__every_seconds=None),
    ],
)
def test_what_is_not_an_event_is_refused_by_the_name_of_its_key(value: bytes) -> None:
    with pytest.raises(LogDamagedError) as caught:
        codec.decode(KEY, value, NAME)
    assert caught.value.key == KEY


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), float("-inf")])
def test_a_spec_that_json_cannot_hold_can_never_be_submitted(seconds: float) -> None:
    with pytest.raises(UserError, match="every-seconds"):
        spec(checkpoints=CheckpointPolicy(every_seconds=seconds))
