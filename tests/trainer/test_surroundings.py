"""The environment is read once, and what cannot be right is refused by name."""

from pathlib import Path

import pytest

from dtrain.common.errors import UserError
from dtrain.trainer.surroundings import Launcher, read

RANKS = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_a_script_started_by_hand_is_a_world_of_one() -> None:
    found = read({"LOCAL_RANK": "7", "DTRAIN_RENDEZVOUS": "file:///somewhere"})
    assert found.launcher is Launcher.PLAIN
    assert (found.rank, found.world_size, found.local_rank, found.rendezvous) == (0, 1, 0, "")
    assert found.job == "local" and found.rank_dir is None


def test_torchruns_variables_are_taken() -> None:
    found = read({**RANKS, "TORCHELASTIC_ERROR_FILE": "/e.json"})
    assert found.launcher is Launcher.TORCHRUN
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert found.error_file == Path("/e.json")


def test_a_workers_variables_go_before_torchruns() -> None:
    worker = {
        "DTRAIN_RANK_DIR": "/shm/r",
        "DTRAIN_RENDEZVOUS": "file:///m",
        "DTRAIN_JOB": "j",
        "DTRAIN_GENERATION": "5",
    }
    found = read({**RANKS, **worker})
    assert found.launcher is Launcher.WORKER
    assert (found.rank_dir, found.rendezvous, found.job, found.generation) == (Path("/shm/r"), "file:///m", "j", 5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        ({"DTRAIN_GENERATION": "0"}, "DTRAIN_GENERATION='0'"),
        ({"DTRAIN_JOB": "../x"}, "job name '../x'"),
        ({"DTRAIN_LOCAL_EVERY_STEPS": "often"}, "DTRAIN_LOCAL_EVERY_STEPS='often'"),
    ],
)
def test_a_variable_that_cannot_be_right_is_named(changed: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read({**RANKS, **changed})
    assert says in str(caught.value)
