"""What a machine's clocks show, and what was when by them."""

import pytest

from tests.sim.machines import EPOCH_S, Machine


def test_the_moment_of_a_time_that_the_wall_clock_showed() -> None:
    machine = Machine("c1")
    machine.jump(10.0, 3600.0)
    machine.jump(20.0, -3605.0)
    for moment_s, ahead_s in ((0.0, 0.0), (5.0, 0.0), (12.0, 3600.0), (19.9, 3600.0), (30.0, -5.0)):
        assert machine.when(EPOCH_S + moment_s + ahead_s)[:1] == [pytest.approx(moment_s, abs=1e-3)]
    machine.jump(40.0, -8.0)
    assert machine.when(EPOCH_S + 30.0) == [pytest.approx(35.0, abs=1e-3), pytest.approx(43.0, abs=1e-3)]
    assert machine.when(EPOCH_S - 500.0) == []
