"""What an undisturbed run of so many steps gives."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import cluster
from tests.survival.conftest import begin, rng  # noqa: F401

_known: dict[int, bytes] = {}


@pytest.fixture
def undisturbed(tmp_path: Path) -> Callable[[int], bytes]:
    """Final weights of an undisturbed run of so many steps; each is run once a session, as fast as it can."""

    def run(steps: int) -> bytes:
        if steps not in _known:
            hurry = tmp_path / "hurry-undisturbed"
            hurry.touch()
            with cluster(tmp_path / "undisturbed") as it:
                attack = begin(it, random.Random(0), steps=steps, job="quiet", script=("--hurry", str(hurry)))
                assert it.wait_for_end("quiet").type == "JobSucceeded", it.logs()
                assert len(attack.started()) == 1, "an undisturbed run was restarted"
                _known[steps] = attack.final.read_bytes()
        return _known[steps]

    return run
