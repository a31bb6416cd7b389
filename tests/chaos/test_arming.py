"""How failpoints are armed, when they fire, and that they cost nothing otherwise."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.common.failpoints import POINTS_VARIABLE, TRACE_VARIABLE, FailpointError, Point, arm, hit


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def test_a_point_fires_at_the_passing_that_was_asked_for_and_once_only(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    asked = {POINTS_VARIABLE: "append.before=error@2", TRACE_VARIABLE: str(trace)}
    arm(asked)
    hit(Point.APPEND_BEFORE)
    hit(Point.APPEND_AFTER)
    assert not trace.exists()
    with pytest.raises(FailpointError):
        hit(Point.APPEND_BEFORE)
    (line,) = map(json.loads, trace.read_text().splitlines())
    assert (line["point"], line["action"], line["passed"]) == ("append.before", "error", 2)
    hit(Point.APPEND_BEFORE)
    arm(asked)  # as another process with the same orders
    for _ in range(3):
        hit(Point.APPEND_BEFORE)
    assert len(trace.read_text().splitlines()) == 1


def test_nothing_fires_unless_it_is_armed() -> None:
    arm({TRACE_VARIABLE: "/nowhere"})
    for point in Point:
        hit(point)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ("append.before", "NAME=ACTION"),
        ("append.never=exit", "append.never"),
        ("append.before=explode", "explode"),
        ("append.before=exit@soon", "soon"),
        ("append.before=delay:long", "long"),
    ],
)
def test_orders_that_cannot_be_understood_are_refused(points: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        arm({POINTS_VARIABLE: points, TRACE_VARIABLE: "/nowhere"})


def test_orders_without_a_trace_are_refused() -> None:
    with pytest.raises(UserError, match=TRACE_VARIABLE):
        arm({POINTS_VARIABLE: "append.before=exit"})
