"""Golden scenarios of the reconciler. `pytest tests/scenarios --regenerate` writes the traces; look at the diff."""

from pathlib import Path

import pytest

from tests.scenarios.playing import played

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenario_goes_as_it_is_written(path: Path, regenerate: bool) -> None:
    found = played(path.read_text())
    if regenerate:
        path.write_text(found)
    assert found == path.read_text()


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 8
