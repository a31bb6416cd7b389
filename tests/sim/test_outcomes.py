"""What the checkers of outcomes object to, each on a story of a few events and steps."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dtrain.common.names import Generation, JobName
from dtrain.worker.rank_dirs import RankId
from tests.sim.checkers import outcomes
from tests.sim.checkers.stories import Story
from tests.sim.etcd import Change
from tests.sim.machines import EPOCH_S, Machine
from tests.sim.trainers import Entry

RANK = RankId(job=JobName("job"), generation=Generation(1), rank=0)
TIMEOUT_S = 5.0


def story(*, decided_s: float, appended_s: float, steps_s: tuple[float, ...]) -> Story:
    """A generation was found to hang, by a leader that was elected at once."""

    def change(at_s: float, key: str, value: dict[str, Any], revision: int) -> Change:
        at = {"at_s": at_s, "key": f"/dtrain/{key}", "value": json.dumps(value).encode(), "revision": revision}
        return cast(Change, SimpleNamespace(**at))

    found = {"term": 1, "time": EPOCH_S + decided_s, "type": "HangFound", "data": {"generation": 1}}
    world = SimpleNamespace(
        etcd=SimpleNamespace(
            history=[
                change(0.0, "leader", {"id": "c1"}, 1),
                change(appended_s, f"jobs/job/events/{1:012d}", found, 2),
            ]
        ),
        blobs=SimpleNamespace(history=[]),
        diary=SimpleNamespace(entries=[Entry(at_s, "w1", RANK, "trained") for at_s in steps_s]),
        ends={},
        hosts=[Machine("c1")],
        shape=SimpleNamespace(hang_timeout_s=TIMEOUT_S, drift=0.0),
    )
    return Story(cast(Any, world), cast(Any, None), "job")


@pytest.mark.parametrize(
    ("decided_s", "appended_s", "steps_s", "found"),
    [
        (20.0, 20.0, (1.0, 14.0), False),
        (20.0, 20.0, (1.0, 16.0), True),
        (20.0, 20.0, (1.0, 14.0, 19.9), False),  # nobody could have heard of the last one
        (20.0, 25.0, (1.0, 14.0, 24.0), False),  # etcd took its time
        (20.0, 25.0, (1.0, 16.0), True),
    ],
)
def test_a_hang_is_one_by_what_was_known_when_it_was_decided(
    decided_s: float, appended_s: float, steps_s: tuple[float, ...], found: bool
) -> None:
    told = list(outcomes.hangs(story(decided_s=decided_s, appended_s=appended_s, steps_s=steps_s)))
    assert bool(told) == found
