"""Records logs of real runs into tests/histories/logs: python -m tests.histories.record [NAME...]

A recorded log is never recorded again when dtrain changes: that old logs are read as ever is the point. New
situations get new logs. Names of the machine (folders, the interpreter, the host) are replaced, and the chain of the
events is made anew over what then stands there; nothing else is changed. The digests come from

    pytest tests/histories --regenerate
"""

import functools
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.chaos.audit import read_log
from tests.histories.meanings import LOGS
from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.support.processes import free_shared_memory
from tests.support.s3_server import seaweedfs
from tests.survival.conftest import SCRIPT, Attack, begin
from tests.survival.test_damage import flip_one_bit, forget_staged_bytes
from tests.survival.test_nodes import begin_on_nodes, lose_node, outlive
from tests.survival.test_salvage import SAVED

SPOILS = Path(__file__).with_name("spoils.py")
STEPS = 60
QUICK = ("--step-ms", "60")
SLOW = ("--step-ms", "250")  # where something has to happen meanwhile


def quiet(it: Cluster) -> str:
    attack = begin(it, random.Random(1), steps=STEPS, script=QUICK, job="quiet")
    it.wait_for_end(attack.job)
    return attack.job


def failover(it: Cluster) -> str:
    """Two leaders die, one of them while a checkpoint is in flight."""
    attack = begin(it, random.Random(1), steps=STEPS, script=SLOW, job="failover")
    for count in (2, 4):
        it.wait_for_event(attack.job, "CheckpointStarted", count=count)
        it.coordinators[0].kill()
        it.coordinators[0].start()
    it.wait_for_end(attack.job)
    return attack.job


def failed_generation(it: Cluster) -> str:
    """A rank is killed between checkpoints, another while one is in flight, so that it is aborted."""
    attack = begin(it, random.Random(1), steps=STEPS, script=SLOW, job="failed-generation")
    it.wait_for_event(attack.job, "CheckpointMarked")
    os.kill(attack.steps(0)[-1]["pid"], signal.SIGKILL)
    it.wait_for_event(attack.job, "GenerationStarted", count=2)
    started = len([e for e in it.history(attack.job) if e.type == "CheckpointStarted"])
    it.wait_for_event(attack.job, "CheckpointStarted", count=started + 1)
    _both(attack, signal.SIGKILL)
    it.wait_for_event(attack.job, "CheckpointAborted")
    it.wait_for_end(attack.job)
    it.wait_for_event(attack.job, "AttemptSwept")
    return attack.job


def quarantined(it: Cluster) -> str:
    attack = begin(it, random.Random(1), steps=STEPS, script=SLOW, job="quarantined")
    it.wait_for_event(attack.job, "CheckpointCommitted", count=2)
    _both(attack, signal.SIGSTOP)
    path = it.folder / "store" / attack.committed()[-1].shards[0].key
    flip_one_bit(path, path.stat().st_size - 5)
    forget_staged_bytes(it)
    _both(attack, signal.SIGKILL)
    it.wait_for_event(attack.job, "CheckpointQuarantined")
    it.wait_for_end(attack.job)
    return attack.job


def retention(it: Cluster) -> str:
    """Two runs of one name; of their checkpoints two are kept, and one is pinned for a while."""
    for run in (1, 2):
        steps = run * STEPS  # the second goes on where the first ended
        attack = begin(it, random.Random(1), steps=steps, script=SLOW, job="retention", more=("--keep-last", "2"))
        started = sum(event.type == "CheckpointStarted" for event in it.history(attack.job))
        it.wait_for_event(attack.job, "CheckpointMarked", count=started // run + 1)
        newest = str(attack.committed()[-1].checkpoint)
        assert it.run("pin", attack.job, newest).returncode == 0
        it.wait_for_event(attack.job, "JobSucceeded", count=run)
        assert it.run("unpin", attack.job, newest).returncode == 0
        it.wait_for_event(attack.job, "CheckpointDeleted", count=2 * run)
        (it.folder / "retention-records").rename(it.folder / f"records{len(it.history(attack.job))}")
    return attack.job


def cancelled(it: Cluster) -> str:
    attack = begin(it, random.Random(1), steps=STEPS, script=SLOW, job="cancelled")
    it.wait_for_event(attack.job, "CheckpointMarked")
    assert it.run("cancel", attack.job).returncode == 0
    it.wait_for_end(attack.job)
    return attack.job


def packed(it: Cluster) -> str:
    """Layers that change at two steps only lie in packs, which expire when no checkpoint that is kept names them."""
    script = ("--frozen-kib", "4096", "--step-ms", "40")
    attack = begin(it, random.Random(1), steps=250, script=script, job="packed", more=("--keep-last", "2"))
    it.wait_for_end(attack.job)
    it.wait_for_event(attack.job, "PacksDeleted")
    return attack.job


def hung(it: Cluster) -> str:
    more, script = ("--hang-timeout", "3"), ("--hang-at", "25", *QUICK)
    attack = begin(it, random.Random(1), steps=STEPS, script=script, job="hung", more=more)
    it.wait_for_end(attack.job)
    it.wait_for_event(attack.job, "HangFound")
    return attack.job


def suspected(it: Cluster) -> str:
    """What the newest checkpoint holds leads to the same error again and again; an older one is gone back to."""
    store = f"file://{it.folder}/store"
    options = ("--name", "suspected", "--nproc-per-node", "2", "--every-steps", "10", "--store", store)
    it.submit(SPOILS, "--steps", str(STEPS), "--spoil-at", "25", options=(*options, "--max-restarts", "10"))
    it.wait_for_end("suspected")
    return "suspected"


def shrunk(it: Cluster) -> str:
    """One of two nodes is lost, and the job goes on with the other."""
    it.add_worker(slots=2)
    attack = begin_on_nodes(it, random.Random(1), "1:2")
    it.wait_for_event(attack.job, "CheckpointCommitted")
    lose_node(attack, 1)
    it.wait_for_end(attack.job)
    free_shared_memory(it.folder)  # a killed node cannot tidy up after itself
    return attack.job


def outlived(it: Cluster) -> str:
    """A rank ends well before the other; its node leaves, and the leader dies."""
    it.add_worker(slots=1)
    outlive(it, "outlived")
    it.wait_for_end("outlived")
    return "outlived"


def _both(attack: Attack, number: signal.Signals) -> None:
    for pid in {wait_for("a step", lambda r=rank: attack.steps(r), deadline_s=30)[-1]["pid"] for rank in (0, 1)}:  # type: ignore[misc]
        os.kill(pid, number)


def on_a_cluster(play: Callable[[Cluster], str], folder: Path) -> list[bytes]:
    """The log of a job whose story ``play`` has told to a cluster."""
    with cluster(folder / "cluster") as it:
        job = play(it)
        return [value for _, _, value in read_log(it.etcd.endpoint, job)]


def salvaged(folder: Path) -> list[bytes]:
    """A rank is killed while its checkpoint waits for a store that takes nothing."""
    with seaweedfs(folder / "s3") as server:
        os.environ.update(server.environment)

        def play(it: Cluster) -> str:
            store, rarely = server.uri("runs/salvaged"), ("--every-steps", str(SAVED))
            script = ("--step-ms", "150")
            attack = begin(it, random.Random(1), steps=STEPS, script=script, job="salvaged", store=store, more=rarely)
            it.wait_for_event(attack.job, "CheckpointStarted")
            os.kill(server.pid, signal.SIGSTOP)
            wait_for("a step after the staged one", lambda: attack.furthest() >= SAVED + 2, deadline_s=60)
            os.kill(attack.steps(1)[-1]["pid"], signal.SIGKILL)
            it.wait_for_event(attack.job, "SalvageStarted")
            os.kill(server.pid, signal.SIGCONT)
            it.wait_for_end(attack.job)
            return attack.job

        return on_a_cluster(play, folder)


def interrupted(folder: Path) -> list[bytes]:
    """A standalone run whose launcher is killed; the same command goes on."""
    records, data = folder / "records", folder / "data"
    records.mkdir()
    argv = [sys.executable, "-m", "dtrain", "run", "--data-dir", str(data), "--name", "interrupted"]
    argv += ["--nproc-per-node", "2", "--every-steps", "10", str(SCRIPT), "--steps", str(STEPS), *QUICK]
    argv += ["--records", str(records), "--final", str(folder / "final.safetensors")]
    first = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = records / "rank0.jsonl"
    wait_for("25 steps", lambda: record.exists() and len(record.read_text().splitlines()) > 25, deadline_s=90)
    first.kill()
    first.wait()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True, timeout=120)
    look = [sys.executable, "-m", "dtrain", "etcd", "--data-dir", str(data), "get", "--prefix"]
    look += ["/dtrain/jobs/interrupted/events/", "--print-value-only"]
    shown = subprocess.run(look, capture_output=True, check=True, timeout=60).stdout
    return [line for line in shown.splitlines() if line.startswith(b"{")]


STORIES = (
    *(quiet, failover, failed_generation, quarantined, retention, cancelled),
    *(packed, hung, suspected, shrunk, outlived),
)
RECORDINGS: dict[str, Callable[[Path], list[bytes]]] = {
    **{story.__name__.replace("_", "-"): functools.partial(on_a_cluster, story) for story in STORIES},
    "salvaged": salvaged,
    "interrupted": interrupted,
}


_S3_PORT = re.compile(r"(endpoint=http://127\.0\.0\.1:)\d+")


def neutral(values: list[bytes], folder: Path) -> list[bytes]:
    """The log without names of this machine, its chain made anew."""
    names = {str(folder): "/data", str(SCRIPT.parents[2]): "/src", sys.executable: "/usr/bin/python3"}
    names |= {str(Path.cwd()): "/src", socket.gethostname(): "node", sys.base_prefix: "/usr"}
    before = hashlib.sha256(b"").hexdigest()
    found = []
    for value in values:
        text = value.decode()
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        text = _S3_PORT.sub(r"\g<1>8333", text)
        prev = json.loads(text)["prev"]
        assert text.count(prev) == 1
        text = text.replace(prev, before)
        found.append(text.encode())
        before = hashlib.sha256(found[-1]).hexdigest()
    return found


def main() -> None:
    for name in sys.argv[1:] or RECORDINGS:
        target = LOGS / f"{name}.jsonl"
        if target.exists():
            print(f"{name} is recorded already: remove {target} first if you must")
            continue
        with tempfile.TemporaryDirectory(prefix="dtrain-history-") as scratch:
            folder = Path(scratch)
            values = RECORDINGS[name](folder)
            target.write_bytes(b"".join(value + b"\n" for value in neutral(values, folder)))
        print(f"{name}: {len(values)} events")


if __name__ == "__main__":
    main()
