"""The simulator can fail: faults planted into copies of the product are caught within a few schedules."""

import pytest

from tests.sim.planted.faults import PLANTED, Planted
from tests.sim.planted.hunts import ROOT, hunt

# Caught so early that a hunt costs seconds; the others are hunted by `make sim-planted`.
QUICK = (
    "take the leader key from whoever has it",
    "commit before the manifest is written",
    "put the marker before the event",
    "delete before the event",
)
SEEDS = 40
DEADLINE_S = 200.0


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_every_planted_fault_has_its_place(fault: Planted) -> None:
    text = (ROOT / "dtrain" / fault.file).read_text()
    assert text.count(fault.old) == 1, "the product was changed: plant this fault anew"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in PLANTED if fault.name in QUICK], ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught(fault: Planted) -> None:
    assert hunt(fault, seeds=SEEDS, first=1, timeout_s=DEADLINE_S).checker
