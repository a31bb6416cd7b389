"""The state of the last step is saved, wherever it falls: a longer run continues from it."""

import random
from pathlib import Path

from tests.support.cluster import cluster
from tests.survival.conftest import SCRIPT, Attack, check


def test_the_last_step_is_saved_though_it_is_no_multiple_and_comes_at_once(tmp_path: Path, rng: random.Random) -> None:
    with cluster(tmp_path / "cluster") as it:
        records = it.folder / "records"
        records.mkdir()
        final, store = it.folder / "final.safetensors", f"file://{it.folder}/store"
        options = ("--name", "short", "--nproc-per-node", "2", "--every-steps", "10", "--store", store)
        args = ("--steps", "23", "--step-ms", "1", "--records", str(records), "--final", str(final))
        it.submit(SCRIPT, *args, options=options)
        attack = Attack(it, "short", records, final, store, rng)
        assert it.wait_for_end("short").type == "JobSucceeded", it.logs()
        check(attack, None)
        assert attack.committed()[-1].step == 23


UNEVEN = """
import torch
import dtrain

with dtrain.join() as run:
    model = torch.nn.Linear(4, 4)
    run.track(model=model)
    for number in run.steps(list(range(100)), until=10):
        if run.rank == 1 and number == 5:
            break
"""


def test_a_rank_that_did_its_last_step_is_not_kept_by_one_that_ended_before_it(tmp_path: Path) -> None:
    """No checkpoint can be of both: it would wait for hours to be asked for its state."""
    with cluster(tmp_path / "cluster") as it:
        script, store = it.folder / "uneven.py", f"file://{it.folder}/store"
        script.write_text(UNEVEN)
        options = ("--name", "uneven", "--nproc-per-node", "2", "--every-seconds", "3600", "--store", store)
        it.submit(script, options=options)
        assert it.wait_for_end("uneven").type == "JobSucceeded", it.logs()
        started, aborted = (it.wait_for_event("uneven", kind) for kind in ("CheckpointStarted", "CheckpointAborted"))
        assert [event.cause.fact for event in started] == ["held_in_vain"]
        assert len(aborted) == 1
