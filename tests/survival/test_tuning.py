"""Fine-tuning a frozen model: what does not change is sent twice and then never again, and nothing else differs."""

import json
import os
import signal
from pathlib import Path

from safetensors.numpy import load_file

from dtrain.coordinator.core.events import CheckpointCommitted, RecordedEvent
from dtrain.storage.uris import open_store
from dtrain.storage.verify import verify_checkpoint
from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.survival.test_retention import folded, objects_of

SCRIPT = Path(__file__).with_name("tune.py")
STEPS, EVERY, THAW_AT = 100, 10, 65
LAYER_BYTES = 2 * 1024 * 1024


def begin(it: Cluster, job: str) -> Path:
    final = it.folder / f"{job}.safetensors"
    options = ("--name", job, "--nproc-per-node", "2", "--every-steps", str(EVERY), "--max-restarts", "5")
    options += ("--store", f"file://{it.folder}/store", "--keep-last", "1")
    it.submit(SCRIPT, "--steps", str(STEPS), "--thaw-at", str(THAW_AT), "--final", str(final), options=options)
    return final


def sent(events: list[RecordedEvent], job: str) -> dict[int, int]:
    """How many bytes were sent for the checkpoint of each step."""
    found = {}
    for number in range(1, len(events) + 1):
        if isinstance(event := events[number - 1].event, CheckpointCommitted):
            state = folded(events[:number])
            found[int(event.step)] = state.committed[event.checkpoint].uploaded_bytes(state.name)
    return found


def test_frozen_layers_are_sent_twice_and_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    with cluster(tmp_path / "cluster") as it:
        expected = begin(it, "quiet")
        assert it.wait_for_end("quiet").type == "JobSucceeded", it.logs()
        bytes_at = sent(it.history("quiet"), "quiet")
        first, second, *later = sorted(bytes_at)
        assert bytes_at[first] > 2 * LAYER_BYTES, "all of it"
        assert bytes_at[second] > 2 * LAYER_BYTES, "once more, into packs"
        frozen = [bytes_at[step] for step in later if step <= THAW_AT]
        assert frozen and max(frozen) < LAYER_BYTES / 2, "only what is trained"
        assert LAYER_BYTES < bytes_at[STEPS] < 2 * LAYER_BYTES, "the layer that thawed, and not the other"

        final = begin(it, "killed")
        it.wait_for_event("killed", "CheckpointCommitted", count=3)
        victim = it.status("killed")["ranks"][0]["pid"]
        os.kill(victim, signal.SIGKILL)
        assert it.wait_for_end("killed").type == "JobSucceeded", it.logs()
        assert final.read_bytes() == expected.read_bytes()

        store, folder = open_store(f"file://{it.folder}/store"), it.folder
        for job in ("quiet", "killed"):

            def settled(job: str = job) -> bool:
                state = folded(it.history(job))
                return not (state.doomed or state.aborted or any(c.expired for c in state.committed.values()))

            wait_for("the end of all deletions", settled, deadline_s=30)
            state = folded(it.history(job))
            assert {info.key for info in store.list(f"jobs/{job}/")} == objects_of(state)
            newest = state.newest_restorable
            assert newest is not None and newest.packs
            assert verify_checkpoint(store, newest.manifest_key, newest.manifest_digest) == []
            [shown] = json.loads(it.run("checkpoints", job, "-o", "json").stdout)[-1:]
            assert shown["size_bytes"] > 2 * LAYER_BYTES > shown["uploaded_bytes"]
        exported = folder / "exported.safetensors"
        done = it.run("export", "killed", str(exported))
        assert done.returncode == 0, done.stderr
        weights, trained = load_file(exported), load_file(final)
        assert {name: weights[f"model.{name}"].tobytes() for name in trained} == {
            name: value.tobytes() for name, value in trained.items()
        }
        pack = folder / "store" / sorted(newest.packs)[0].key
        with pack.open("r+b") as file:
            file.write(b"damaged!")
        assert it.run("verify", "killed").returncode == 0, "all is there"
        deep = it.run("verify", "killed", "--deep")
        assert deep.returncode == 1 and str(pack.relative_to(folder / "store")) in deep.stdout
