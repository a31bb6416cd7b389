"""Records logs of real runs into tests/histories/logs: python -m tests.histories.record [NAME...]

A recorded log is never recorded again when dtrain changes: that old logs are read as ever is the point. New
situations get new logs. Names of the machine (folders, the interpreter, the host) are replaced, and the chain of the
events is made anew over what then stands there; nothing else is changed. The digests come from

    pytest tests/histories --regenerate
"""

import hashlib
import json
import os
import random
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
from tests.survival.conftest import SCRIPT, Attack, begin
from tests.survival.test_damage import flip_one_bit, forget_staged_bytes

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


def _both(attack: Attack, number: signal.Signals) -> None:
    for pid in {wait_for("a step", lambda r=rank: attack.steps(r), deadline_s=30)[-1]["pid"] for rank in (0, 1)}:  # type: ignore[misc]
        os.kill(pid, number)


def record_interrupted(folder: Path) -> list[bytes]:
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


SCENARIOS: dict[str, Callable[[Cluster], str]] = {
    "quiet": quiet,
    "failover": failover,
    "failed-generation": failed_generation,
    "quarantined": quarantined,
    "retention": retention,
    "cancelled": cancelled,
}


def neutral(values: list[bytes], folder: Path) -> list[bytes]:
    """The log without names of this machine, its chain made anew."""
    names = {str(folder): "/data", str(SCRIPT.parents[2]): "/src", sys.executable: "/usr/bin/python3"}
    names |= {str(Path.cwd()): "/src", socket.gethostname(): "node"}
    before = hashlib.sha256(b"").hexdigest()
    found = []
    for value in values:
        text = value.decode()
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        prev = json.loads(text)["prev"]
        assert text.count(prev) == 1
        text = text.replace(prev, before)
        found.append(text.encode())
        before = hashlib.sha256(found[-1]).hexdigest()
    return found


def main() -> None:
    asked = sys.argv[1:] or [*SCENARIOS, "interrupted"]
    for name in asked:
        target = LOGS / f"{name}.jsonl"
        if target.exists():
            print(f"{name} is recorded already: remove {target} first if you must")
            continue
        with tempfile.TemporaryDirectory(prefix="dtrain-history-") as scratch:
            folder = Path(scratch)
            if name == "interrupted":
                values = record_interrupted(folder)
            else:
                with cluster(folder / "cluster") as it:
                    job = SCENARIOS[name](it)
                    values = [value for _, _, value in read_log(it.etcd.endpoint, job)]
            target.write_bytes(b"".join(value + b"\n" for value in neutral(values, folder)))
        print(f"{name}: {len(values)} events")


if __name__ == "__main__":
    main()
