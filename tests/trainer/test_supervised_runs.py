"""Two real ranks under a played worker: staged, killed, restored, and in the end the same bits."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from dtrain.common.mailbox import RestoreState, TrainerPhase, pack, unpack
from dtrain.storage.restore_files import NEEDS_FILE
from tests.trainer.playing_worker import RankFolder, offer

SCRIPT = Path(__file__).parent / "ddp_script.py"
UNTIL = 24  # eight batches an epoch and rank: three epochs
WORLD = 2


@contextmanager
def generation(folder: Path, world: int = WORLD) -> Iterator[list[RankFolder]]:
    with ExitStack() as stack:
        yield [stack.enter_context(RankFolder(folder, rank=rank, world_size=world)) for rank in range(world)]


def finish(ranks: list[RankFolder], results: Path, until: int = UNTIL) -> list[dict[str, Any]]:
    """Start all ranks, wait for their normal end, and return what each of them saw."""
    results.mkdir()
    for rank in ranks:
        rank.start(SCRIPT, str(results), str(until), "0")
    for rank in ranks:
        assert rank.wait_exit() == 0, rank.output()
        assert rank.mailbox.phase is TrainerPhase.FINISHED
    return [json.loads((results / f"rank{number}.json").read_text()) for number in range(len(ranks))]


def start_from_nothing(ranks: list[RankFolder]) -> None:
    for rank in ranks:
        rank.mailbox.restore = RestoreState.NOTHING


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    with generation(folder / "g1") as ranks:
        start_from_nothing(ranks)
        return folder / "results", finish(ranks, folder / "results")


@pytest.mark.parametrize("step", [5, 8], ids=["within an epoch", "at an epoch's end"])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(
    step: int, tmp_path: Path, uninterrupted: tuple[Path, list[dict[str, Any]]]
) -> None:
    results, seen = uninterrupted
    staged = tmp_path / "staged"
    staged.mkdir()
    names: set[str] = set()
    with generation(tmp_path / "g1") as ranks:
        start_from_nothing(ranks)
        for rank in ranks:
            rank.mailbox.request = pack(7, step)
            rank.start(SCRIPT, str(tmp_path), str(UNTIL), str(step + 3))
        for number, rank in enumerate(ranks):
            rank.wait_until(lambda mailbox: mailbox.completed_step == step + 2, "the step before the hold")
            word, slot, size_bytes = rank.mailbox.staged
            assert unpack(word) == (7, step), rank.output()
            shard = (rank.path / f"slot{slot}").read_bytes()[:size_bytes]
            (staged / str(number)).write_bytes(shard)
            rank.kill()
            with safe_open(staged / str(number), "pt") as file:
                assert file.metadata()["dtrain.step"] == str(step)
                assert file.metadata()["dtrain.rank"] == str(number)
                names |= set(file.keys())
    assert "model.0.weight" in names, "named as without DDP"

    with generation(tmp_path / "g2") as ranks:
        offer(ranks, [(staged / str(number)).read_bytes() for number in range(WORLD)])
        resumed = finish(ranks, tmp_path / "results")

    for after, whole in zip(resumed, seen, strict=True):
        assert after == {"restored": True, "seen": whole["seen"][step:]}
    expected, got = load_file(results / "final.safetensors"), load_file(tmp_path / "results" / "final.safetensors")
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)


def test_a_trainer_waits_for_the_workers_word_and_shows_its_progress(tmp_path: Path) -> None:
    with generation(tmp_path / "g1", world=1) as (rank,):
        results = tmp_path / "results"
        results.mkdir()
        rank.start(SCRIPT, str(results), "4", "0")
        rank.wait_until(lambda mailbox: mailbox.phase is TrainerPhase.RESTORING, "it waits")
        assert rank.mailbox.tracking and rank.mailbox.completed_step == 0
        rank.mailbox.request = pack(1, 1000)
        rank.mailbox.restore = RestoreState.NOTHING
        assert rank.wait_exit() == 0, rank.output()
        mailbox = rank.mailbox
        assert (mailbox.phase, mailbox.completed_step, mailbox.until_step) == (TrainerPhase.FINISHED, 4, 4)
        assert unpack(mailbox.missed) == (1, 1000), "a request that can no longer be met is answered"
        assert mailbox.step_ns > 0 and isinstance(mailbox.metrics["loss"], float)


def test_more_ranks_than_before_start_from_the_shards_there_are(tmp_path: Path) -> None:
    step = 4
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.mailbox.request = pack(1, step)
        finish([rank], tmp_path / "first", until=step)
        word, slot, size_bytes = rank.mailbox.staged
        assert unpack(word) == (1, step)
        shard = (rank.path / f"slot{slot}").read_bytes()[:size_bytes]
    with generation(tmp_path / "g2") as ranks:
        offer(ranks, [shard])
        resumed = finish(ranks, tmp_path / "second", until=step + 6)
        assert "random numbers are seeded anew" in ranks[1].output()
    numbers = [[batch for _, batch, _ in rank["seen"]] for rank in resumed]
    assert len(numbers[0]) == len(numbers[1]) == 6
    # 4 batches of 4 by one rank were 16 of 60 items; the two ranks go on with the others of that epoch
    first = json.loads((tmp_path / "first" / "rank0.json").read_text())["seen"]
    before = {item for _, batch, _ in first for item in batch}
    after = [item for rank in numbers for batch in rank[:5] for item in batch]
    assert len(after) == len(set(after)) == 40 and not before & set(after)


@pytest.mark.parametrize("at_hand", [False, True], ids=["brought", "read by itself, the worker's word not waited for"])
def test_a_checkpoint_of_the_last_step_leaves_nothing_to_do(at_hand: bool, tmp_path: Path) -> None:
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.mailbox.request = pack(1, 3)
        finish([rank], tmp_path / "first", until=3)
        _, slot, size_bytes = rank.mailbox.staged
        shard = (rank.path / f"slot{slot}").read_bytes()[:size_bytes]
    with generation(tmp_path / "g2", world=1) as (rank,):
        offer([rank], [shard], at_hand=at_hand)
        (seen,) = finish([rank], tmp_path / "second", until=3)
        assert rank.mailbox.restore is (RestoreState.PENDING if at_hand else RestoreState.READY)
        assert (json.loads((rank.path / NEEDS_FILE).read_bytes()) == []) is at_hand, "the worker is told what is needed"
        assert seen == {"restored": True, "seen": []}
        assert rank.mailbox.completed_step == 3
    first, second = (load_file(tmp_path / name / "final.safetensors") for name in ("first", "second"))
    assert all(first[name].equal(second[name]) for name in first)


FAILING = """
import sys, torch, torch.distributed as dist, dtrain
with dtrain.join() as run:
    if run.rank == 0:
        dist.all_reduce(torch.ones(10), async_op=True)  # the peer never joins in
        raise ValueError("the data ran away\\nand more")
    import threading
    threading.Event().wait()
"""


def test_a_failing_rank_says_why_and_leaves_although_a_collective_is_under_way(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    with generation(tmp_path / "g1") as ranks:
        for rank in ranks:
            rank.start(script)
        assert ranks[0].wait_exit() == 1
        assert ranks[0].mailbox.error == "ValueError: the data ran away"
        record = json.loads((ranks[0].path / "error.json").read_text())["message"]
        assert record["message"] == "ValueError: the data ran away"
        assert "Traceback" in record["extraInfo"]["py_callstack"] and int(record["extraInfo"]["timestamp"]) > 0
        assert "Traceback" in ranks[0].output()
        assert ranks[1].process is not None and ranks[1].process.poll() is None


EXITING = """
import atexit, sys
import torch, torch.distributed as dist
import dtrain
atexit.register(print, "first handler")
try:
    with dtrain.join() as run:
        if run.rank == 0:
            dist.all_reduce(torch.ones(10), async_op=True)  # the peer never joins in
            sys.exit({code})
        import threading
        threading.Event().wait()
finally:
    print("outer block")
    atexit.register(print, "last handler")
"""


@pytest.mark.parametrize(("code", "number", "said"), [("7", 7, ""), ("'enough'", 1, "enough")])
def test_a_rank_that_exits_by_a_code_leaves_with_it_although_a_collective_is_under_way(
    code: str, number: int, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "exiting.py"
    script.write_text(EXITING.format(code=code))
    with generation(tmp_path / "g1") as ranks:
        for rank in ranks:
            rank.start(script)
        assert ranks[0].wait_exit() == number
        order = ["outer block", *filter(None, [said]), "last handler", "first handler"]
        assert [line for line in ranks[0].output().splitlines() if line in order] == order
        assert ranks[0].mailbox.error == f"SystemExit: {said or number}"
        assert ranks[1].process is not None and ranks[1].process.poll() is None


LEAVING = """
import sys, time
from pathlib import Path
import dtrain

class Still:
    def state_dict(self): return {{}}
    def load_state_dict(self, state): pass

class Bar:  # as progress bars do, it holds what it shows the progress of
    def __init__(self, steps): self.steps = steps
    def __iter__(self):
        for batch in self.steps:
            yield batch

def train():
    global kept
    {keeps}
    for batch in kept:
        if run.step == 3:
            {how}

wait = lambda name: [time.sleep(0.005) for _ in iter((Path(sys.argv[1]) / name).exists, True)]
try:
    with dtrain.join() as run:
        run.track(still=Still())
        try:
            train()
        finally:
            print("evaluates"); wait("evaluated")
finally:
    print("is out"); wait("go")
"""


@pytest.mark.parametrize("keeps", ["kept = run.steps([0], until=100)", "kept = Bar(run.steps([0], until=100))"])
@pytest.mark.parametrize("how", ["break", "return", "raise ValueError('no luck')"])
def test_a_loop_that_was_left_early_is_no_step_and_only_a_rank_that_did_not_fail_has_finished(
    how: str, keeps: str, tmp_path: Path
) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING.format(how=how, keeps=keeps))
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.mailbox.request = pack(1, 50)
        rank.start(script, str(tmp_path))
        rank.wait_until(lambda _: "evaluates" in rank.output(), "the loop is left")
        assert rank.mailbox.phase is TrainerPhase.LEFT and rank.mailbox.completed_step == 3
        assert unpack(rank.mailbox.missed) == (1, 50)
        (tmp_path / "evaluated").touch()
        rank.wait_until(lambda _: "is out" in rank.output(), "join() is over")
        failed = "raise" in how
        assert rank.mailbox.phase is (TrainerPhase.LEFT if failed else TrainerPhase.FINISHED)
        (tmp_path / "go").touch()
        assert rank.wait_exit() == int(failed)


def test_steps_that_one_loop_left_are_gone_on_with_by_the_next(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nimport dtrain\n"
        "wait = lambda name: [time.sleep(0.005) for _ in iter((Path(sys.argv[1]) / name).exists, True)]\n"
        "with dtrain.join() as run:\n"
        "    steps = run.steps([0], until=6)\n"
        "    for _ in steps:\n        if run.step == 2: break\n"
        "    print('left'); wait('go')\n"
        "    for _ in steps:\n        if run.step == 4: print('again'); wait('end')\n"
        "    print(f'done {run.step}')\n"
    )
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.start(script, str(tmp_path))
        rank.wait_until(lambda _: "left" in rank.output(), "the first loop is left")
        assert rank.mailbox.phase is TrainerPhase.LEFT
        (tmp_path / "go").touch()
        rank.wait_until(lambda _: "again" in rank.output(), "the second loop is under way")
        assert rank.mailbox.phase is TrainerPhase.TRAINING
        (tmp_path / "end").touch()
        assert rank.wait_exit() == 0, rank.output()
        assert "done 6" in rank.output() and rank.mailbox.phase is TrainerPhase.FINISHED


def test_a_loop_that_is_closed_after_the_run_has_no_word_on_it(tmp_path: Path) -> None:
    script = tmp_path / "kept.py"
    script.write_text(
        "import dtrain\nwith dtrain.join() as run:\n    kept = run.steps([0], until=9)\n    next(kept)\nkept.close()"
    )
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.start(script)
        assert rank.wait_exit() == 0, rank.output()
        assert rank.mailbox.phase is TrainerPhase.FINISHED


def test_a_model_that_does_not_fit_the_checkpoint_is_one_clear_sentence(tmp_path: Path) -> None:
    with generation(tmp_path / "g1", world=1) as (rank,):
        start_from_nothing([rank])
        rank.mailbox.request = pack(1, 2)
        finish([rank], tmp_path / "first", until=2)
        _, slot, size_bytes = rank.mailbox.staged
        shard = (rank.path / f"slot{slot}").read_bytes()[:size_bytes]
    changed = tmp_path / "changed.py"
    changed.write_text(SCRIPT.read_text().replace("nn.Linear(8, 16)", "nn.Linear(8, 32)"))
    with generation(tmp_path / "g2", world=1) as (rank,):
        offer([rank], [shard])
        rank.start(changed, str(tmp_path), "4", "0")
        assert rank.wait_exit() == 1
        assert "UserError: model (DistributedDataParallel) does not accept its state of step 2" in rank.mailbox.error
