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
