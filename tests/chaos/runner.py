"""Chaos: a real job on a real cluster, struck every few seconds, must end as if nothing had happened.

    make chaos MINUTES=10 SEED=7

A quiet run gives the weights that are due. Then the same job runs while faults are drawn from the seed; several may
last at once. After the time is over everything is mended, and the job has to end within a bound. What is asserted:
the same weights bit by bit, an audit of log, storage and records without a finding, no process left, and that enough
happened. The seed gives the same kinds of faults in the same order, at the same times; what they find there depends
on the machine. A run that is interrupted, or killed, leaves no process and no folder behind.
"""

import argparse
import heapq
import itertools
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.chaos.audit import (
    Audit,
    Json,
    Objects,
    Trained,
    audit_chain,
    audit_records,
    audit_storage,
    audit_story,
    owed,
    read_log,
)
from tests.chaos.faults import FAULTS, NothingToStrike
from tests.chaos.world import World, world
from tests.survival.conftest import SCRIPT

MTBF_S = 3.0
RANKS = 2
STEP_MS = 100.0
EVERY_STEPS = 20
KEEP_LAST = 5
FROZEN_KIB = 4096  # of tensors that seldom change: they are sent apart from the others, in packs
QUIET_S = 600.0
END_S = 480.0  # after everything was mended; a machine that does much else needs minutes for the steps that are left
SETTLE_S = 60.0  # for markers and deletions that are still owed
SETTLE_POLL_S = 0.5
POLL_S = 0.05
RESTART_MAX_S = 2.0  # how long a supervisor takes to notice
FAULTS_FLOOR_PER_MINUTE = 8.0
COMMITS_FLOOR_PER_MINUTE = 2.0  # over the whole run
STORM_COMMITS_FLOOR_PER_MINUTE = 1.0  # under faults, for each whole minute: a short storm may pass over a start
GENERATIONS_FLOOR_PER_MINUTE = 0.3  # or no rank was lost, and nothing was restored
STORM_GENERATIONS_FLOOR_PER_MINUTE = 0.2  # that committed under faults, for each whole minute: not the first alone
EVIDENCE_FROM = 8  # so many faults of one kind, and not one of them met any traffic: too little happened
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED_CODE = 130  # of a process that Ctrl-C ended, as shells have it
JOB = "chaos"
ENDS = ("JobSucceeded", "JobFailed", "JobCancelled")


@dataclass(slots=True)
class Ledger:
    """What happened."""

    seed: int
    minutes: float
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    terms: int = 0
    objects_checked: int = 0
    trained: Trained = field(default_factory=Trained)
    met: Counter[str] = field(default_factory=Counter)  # what faults of links and storage did, by their kind's end
    storm_s: float = 0.0
    storm_steps: int = 0  # the furthest that was begun when the storm ended
    storm_commits: int = 0  # by then
    storm_generations: int = 0  # that these commits are of
    job_s: float = 0.0  # from its submission to its end
    findings: list[str] = field(default_factory=list)

    def too_little(self) -> list[str]:
        struck, committed = self.faults.total(), self.events["CheckpointCommitted"]
        found = []
        if struck < FAULTS_FLOOR_PER_MINUTE * self.minutes:
            found.append(f"too little happened: {struck} faults")
        if committed < COMMITS_FLOOR_PER_MINUTE * self.minutes:
            found.append(f"too little happened: {committed} commits")
        if self.storm_commits < STORM_COMMITS_FLOOR_PER_MINUTE * int(self.minutes):
            found.append(f"too little happened: {self.storm_commits} commits under faults")
        if self.storm_generations < STORM_GENERATIONS_FLOOR_PER_MINUTE * int(self.minutes):
            found.append(f"too little happened: {self.storm_generations} generations committed under faults")
        if self.events["GenerationStarted"] < GENERATIONS_FLOOR_PER_MINUTE * self.minutes:
            found.append(f"too little happened: {self.events['GenerationStarted']} generations")
        for ending, count in self.met.items():
            drawn = sum(number for kind, number in self.faults.items() if kind.endswith(ending))
            if drawn >= EVIDENCE_FROM and not count:
                found.append(f"too little happened: {drawn} times {ending!r}, and nothing met it")
        return found

    def __str__(self) -> str:
        trained = self.trained
        useful = trained.begun - trained.repeated
        lines = [f"chaos: seed {self.seed}, {self.minutes:g} minutes, {self.faults.total()} faults"]
        lines += [f"  {count:5}  {kind}" for kind, count in sorted(self.faults.items())]
        lines += [
            f"generations {self.events['GenerationStarted']}, terms {self.terms}, "
            f"commits {self.events['CheckpointCommitted']} ({self.storm_commits} under faults, "
            f"of {self.storm_generations} generations), "
            f"aborted {self.events['CheckpointAborted']}, "
            f"quarantined {self.events['CheckpointQuarantined']}, deleted {self.events['CheckpointDeleted']}, "
            f"salvages {self.events['SalvageStarted']}, packs expired {self.events['PacksExpired']}",
            f"rank steps begun {trained.begun}, recomputed {trained.repeated}, "
            f"goodput {useful / max(1, trained.begun):.1%} of the steps begun, "
            f"{self.storm_steps * STEP_MS / 1000 / max(1.0, self.storm_s):.1%} of the time under faults; "
            f"the job took {self.job_s:.0f} s; {self.objects_checked} objects audited",
            f"requests answered by 503: {self.met['503']}, bytes of answers lost: {self.met['lose answers']}, "
            f"chunks corrupted: {self.met['corrupt']}, bodies damaged: {self.met['flips bits']}, "
            f"etcd members replaced: {self.met['lose etcd member']}",
        ]
        lines += [f"FINDING: {finding}" for finding in self.findings]
        return "\n".join(lines)


class Storm:
    """Strikes and mends, one thread, until the time is over."""

    def __init__(self, it: World, ledger: Ledger, mtbf_s: float, only: str) -> None:
        self._it = it
        self._faults = [fault for fault in FAULTS if only in fault.kind]
        # Apart, so that what depends on the machine (whom there is to strike) does not change what follows.
        self._kinds, self._targets, self._restarts = (random.Random(f"{ledger.seed}/{use}") for use in range(3))
        self._ledger = ledger
        self._mtbf_s = mtbf_s
        self._numbers = itertools.count()
        self._mends: list[tuple[float, int, Callable[[], None]]] = []

    def rage(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        next_strike = time.monotonic()
        try:
            while time.monotonic() < end:
                self._mend_due(time.monotonic())
                self._it.supervise(self._restarts.uniform(0.0, RESTART_MAX_S))
                if time.monotonic() >= next_strike:
                    self._strike()
                    next_strike = time.monotonic() + min(self._kinds.expovariate(1 / self._mtbf_s), 3 * self._mtbf_s)
                time.sleep(POLL_S)
        finally:
            self._mend_due(float("inf"))

    def _strike(self) -> None:
        (fault,) = self._kinds.choices(self._faults, weights=[fault.weight for fault in self._faults])
        seconds = self._kinds.uniform(fault.shortest_s, fault.longest_s)
        try:
            mend = fault.strike(self._it, self._targets)
        except NothingToStrike:
            return
        self._ledger.faults[fault.kind] += 1
        print(f"{time.strftime('%H:%M:%S')} {fault.kind}, {seconds:.1f} s", flush=True)
        heapq.heappush(self._mends, (time.monotonic() + seconds, next(self._numbers), mend))

    def _mend_due(self, now: float) -> None:
        while self._mends and self._mends[0][0] <= now:
            heapq.heappop(self._mends)[2]()


def submit(it: World, job: str, steps: int, hurry: Path) -> None:
    records = it.folder / f"{job}-records"
    records.mkdir()
    options = ["--name", job, "--nnodes", str(RANKS), "--nproc-per-node", "1", "--max-restarts", "100000"]
    options += ["--every-steps", str(EVERY_STEPS), "--keep-last", str(KEEP_LAST), "--store", it.store]
    script = ["--frozen-kib", str(FROZEN_KIB), "--steps", str(steps), "--step-ms", str(STEP_MS), "--hurry", str(hurry)]
    script += ["--records", str(records), "--final", str(it.folder / f"{job}.safetensors")]
    done = it.run("submit", *options, str(SCRIPT), *script)
    assert done.returncode == 0, done.stderr


def wait_for_end(it: World, job: str, deadline_s: float) -> None:
    """Supervise until the job has ended."""
    end = time.monotonic() + deadline_s
    while True:
        it.supervise(0.2)
        types = [json.loads(value)["type"] for _, _, value in read_log_patiently(it, job)]
        if any(kind in ENDS for kind in types):
            assert "JobSucceeded" in types, f"{job}: {types[-5:]}"
            return
        assert time.monotonic() < end, f"{job} has not ended within {deadline_s:g} s: {types[-8:]}"
        time.sleep(0.5)


def read_log_patiently(it: World, job: str) -> list[tuple[str, str, bytes]]:
    for endpoint in it.etcd.endpoints:
        try:
            return read_log(endpoint, job)
        except OSError:
            continue  # the next member may answer
    return []


def settle(read: Callable[[], list[Json]], within_s: float = SETTLE_S) -> list[str]:
    """Wait until the log owes nothing to storage any more; return what it still owes, or that nobody could read it."""
    end = time.monotonic() + within_s
    while True:
        events = read()
        left = owed(events) if events else ["the log cannot be read"]
        if not left or time.monotonic() > end:
            return left
        time.sleep(SETTLE_POLL_S)


def weigh(it: World, ledger: Ledger) -> None:
    """Note what the storm has left to see, as long as it is fresh."""
    links = [it.storage_link, *it.doors.values(), *(link for each in it.etcd_links.values() for link in each)]
    ledger.met["lose etcd member"] = it.etcd.replaced
    ledger.met["503"] = it.storage_proxy.refused
    ledger.met["flips bits"] = it.storage_proxy.damaged
    ledger.met["lose answers"] = sum(link.answers_lost for link in links)
    ledger.met["corrupt"] = sum(link.chunks_corrupted for link in links)
    records = (it.folder / f"{JOB}-records").glob("rank*.jsonl")
    events = [json.loads(value) for _, _, value in read_log_patiently(it, JOB)]
    commits = [event["data"] for event in events if event["type"] == "CheckpointCommitted"]
    ledger.storm_commits = len(commits)
    ledger.storm_generations = len({commit["generation"] for commit in commits})
    ledger.storm_steps = max((json.loads(line)["step"] for path in records for line in path.open()), default=0)


def audit(it: World, ledger: Ledger, steps: int) -> None:
    left = settle(lambda: [json.loads(value) for _, _, value in read_log_patiently(it, JOB)])
    ledger.findings += [f"{what}, {SETTLE_S:g} s after the job's end" for what in left]
    found = Audit()
    events = audit_chain(found, read_log_patiently(it, JOB))
    audit_story(found, events)
    objects = Objects(it.storage.client(), it.storage.bucket, "runs/")
    audit_storage(found, events, objects, JOB)
    ledger.trained = audit_records(found, events, it.folder / f"{JOB}-records", RANKS, steps)
    ledger.events = Counter(event["type"] for event in events)
    ledger.terms = len({event["term"] for event in events})
    ledger.objects_checked = found.objects_checked
    ledger.findings += found.faults
    if quarantined := ledger.events["CheckpointQuarantined"]:
        ledger.findings.append(f"{quarantined} checkpoints were quarantined, and nothing was damaged where it lies")


def run(
    folder: Path, *, seed: int, minutes: float, mtbf_s: float = MTBF_S, only: str = "", remove: Path | None = None
) -> Ledger:
    """One chaos run in ``folder``. What is wrong is in the ledger's findings, or raised with all logs printed.

    ``only``: strike by faults whose kind holds this; whether enough happened is not judged then. If this process is
    killed, ``remove`` is removed.
    """
    ledger = Ledger(seed=seed, minutes=minutes)
    steps = round(minutes * 60 * 1000 / STEP_MS)  # more than can be done before the time is over
    hurry = folder / "hurry"
    with world(folder / "world", remove=remove) as it:
        try:
            hurry.touch()
            submit(it, "quiet", steps, hurry)
            wait_for_end(it, "quiet", QUIET_S)
            expected = (it.folder / "quiet.safetensors").read_bytes()
            hurry.unlink()
            began = time.monotonic()
            submit(it, JOB, steps, hurry)
            Storm(it, ledger, mtbf_s, only).rage(minutes * 60)
            ledger.storm_s = time.monotonic() - began
            it.etcd.start()
            it.etcd.wait_replaced()
            it.etcd.wait_ready()
            weigh(it, ledger)
            hurry.touch()
            wait_for_end(it, JOB, END_S)
            ledger.job_s = time.monotonic() - began
            audit(it, ledger, steps)
            if (it.folder / f"{JOB}.safetensors").read_bytes() != expected:
                ledger.findings.append("the final weights differ from the quiet run's")
            it.stop()
        except KeyboardInterrupt:
            raise  # nothing went wrong
        except BaseException:
            print(it.logs(), ledger, sep="\n")
            raise
    ledger.findings += [] if only else ledger.too_little()
    return ledger


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as at Ctrl-C, whatever the signal; more of them must not keep this process from tidying up."""
    for each in INTERRUPTIONS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--mtbf", type=float, default=MTBF_S, help="mean seconds between two faults")
    parser.add_argument("--only", default="", help="only faults whose kind holds this")
    parser.add_argument("--keep", type=Path, help="a new folder for all data, kept; default: one that is removed")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"repeat with: make chaos MINUTES={arguments.minutes:g} SEED={seed}", flush=True)
    for number in INTERRUPTIONS:
        signal.signal(number, _interrupt)  # a shell may have had SIGINT ignored
    with tempfile.TemporaryDirectory(prefix="dtrain-chaos-") as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            remove = None if arguments.keep else folder
            ledger = run(
                folder,
                seed=seed,
                minutes=arguments.minutes,
                mtbf_s=arguments.mtbf,
                only=arguments.only,
                remove=remove,
            )
        except KeyboardInterrupt:
            print("interrupted")
            return INTERRUPTED_CODE
        except Exception:
            traceback.print_exc()
            print(f"FAILED. Repeat with: make chaos MINUTES={arguments.minutes:g} SEED={seed} KEEP=/new/folder")
            return 1
    print(ledger)
    return 1 if ledger.findings else 0


if __name__ == "__main__":
    sys.exit(main())
