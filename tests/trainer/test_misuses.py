"""What scripts do that would end badly later, or hide what happened: said at once, and with the mend."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dtrain
from dtrain.common.errors import UserError
from dtrain.common.mailbox import RestoreState, TrainerPhase, pack, unpack
from dtrain.trainer.process_group import choose_device
from dtrain.trainer.surroundings import read
from tests.trainer.playing_worker import RankFolder


class Counter:
    """Something to track."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Bad(torch.utils.data.Dataset[int]):
    """A dataset one of whose items cannot be read."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise OSError("item 3 cannot be read")
        return index


STOPPING = """
import dtrain

class Still:
    def state_dict(self): return {"of": 1}
    def load_state_dict(self, state): pass

with dtrain.join() as run:
    run.track(still=Still())
    for _ in run.steps([0], until=1000):
        if run.step == 4:
            run.stop()
    print(f"stopped behind {run.step}")
"""


def test_a_run_that_stops_itself_saves_its_last_step_as_any_other_does(tmp_path: Path) -> None:
    script = tmp_path / "stopping.py"
    script.write_text(STOPPING)
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as rank:
        rank.environment["DTRAIN_SAVE_LAST"] = "1"
        rank.mailbox.restore = RestoreState.NOTHING
        rank.start(script)
        rank.wait_until(lambda mailbox: mailbox.phase is TrainerPhase.HOLDING, "it holds its last state")
        assert (rank.mailbox.completed_step, rank.mailbox.until_step) == (5, 5)
        rank.mailbox.request = pack(3, 5)
        assert rank.wait_exit() == 0, rank.output()
        assert unpack(rank.mailbox.staged[0]) == (3, 5)
        assert "stopped behind 5" in rank.output()


def test_local_mode_saves_the_step_that_a_run_stops_at_and_says_from_where_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for until, steps in ((100, [0, 1, 2]), (4, [3])):
        counter = Counter()
        with dtrain.join(store=f"file://{tmp_path}/store", every_steps=50) as run:
            run.track(counter=counter)
            seen = []
            for _ in run.steps([0], until=until):
                seen.append(run.step)
                counter.steps += 1
                if run.step == 2:
                    run.stop()
        assert (seen, counter.steps) == (steps, steps[-1] + 1)
    assert "goes on from step 3 of job local" in caplog.text


def test_only_a_step_that_is_under_way_can_be_the_last() -> None:
    with dtrain.join() as run:
        with pytest.raises(UserError, match="belongs into the body of the loop"):
            run.stop()
        for _ in run.steps([0], until=1):
            pass
        with pytest.raises(UserError, match="belongs into the body of the loop"):
            run.stop()


def test_steps_that_ended_with_an_error_do_not_look_like_steps_that_are_over() -> None:
    with dtrain.join() as run:
        steps = run.steps(torch.utils.data.DataLoader(Bad(), batch_size=None), until=9)
        seen = []
        for _ in range(3):
            seen.append(next(steps))
        with pytest.raises(OSError, match="item 3"):
            next(steps)
        for ask in (lambda: next(steps), lambda: list(steps)):
            with pytest.raises(UserError, match="skipped in the dataset"):
                ask()
    assert seen == [0, 1, 2]


def test_a_rank_joins_once(tmp_path: Path) -> None:
    script = tmp_path / "again.py"
    script.write_text(
        "import dtrain\ntry:\n    with dtrain.join() as run:\n        for _ in run.steps([0], until=9):\n"
        "            raise MemoryError\nexcept MemoryError:\n    dtrain.join()\n"
    )
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as rank:
        rank.mailbox.restore = RestoreState.NOTHING
        rank.start(script)
        assert rank.wait_exit() == 1
        assert "a rank joins once" in rank.output()


def test_what_keeps_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with dtrain.join(every_steps=10):
        pass
    assert "every_steps=10 keeps nothing without a store" in caplog.text


@pytest.mark.parametrize(("gpus", "device"), [(1, "cpu"), (2, "cuda:1"), (8, "cuda:1")])
def test_ranks_that_cannot_each_have_a_gpu_say_so(
    gpus: int, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    of_rank = {rank: choose_device(read(environment(rank))) for rank in (0, 1)}
    assert str(of_rank[1]) == device
    assert ("1 GPU(s) can be seen by 2 ranks" in caplog.text) == (gpus == 1)


def environment(rank: int) -> dict[str, str]:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    return {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in named.items()}}


class Endless(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10_000))


def test_a_long_way_back_to_its_place_in_the_data_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for until in (1200, 1201):
        with dtrain.join(store=f"file://{tmp_path}/store", every_steps=5000) as run:
            run.track(counter=Counter())
            for _ in run.steps(torch.utils.data.DataLoader(Endless(), batch_size=None), until=until):
                pass
    assert "reads 1200 batches again to find its place in the data" in caplog.text


def test_an_error_of_half_a_character_can_be_told(tmp_path: Path) -> None:
    with RankFolder(tmp_path / "g1", rank=0, world_size=1) as rank:
        rank.mailbox.error = "no such file: caf\udce9"
        assert rank.mailbox.error == "no such file: caf?"
