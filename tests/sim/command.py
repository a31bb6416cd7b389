"""Runs many schedules on all cores, or one with its story told, and says how to see a failure again.

A run that Ctrl-C or SIGTERM ends says what it has met until then.
"""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim import replays, schedules

MET_WITHIN = 2000  # schedules: in so many everything that is expected comes, or the storms are too kind
REPLAYED_AT_ONCE = 500  # logs that another process replays as well: a bound on what is kept of them
INTERRUPTED_CODE = 130  # as shells have it
HASH_SEED = "0"  # sets of strings have one order, so that a seed gives the same schedule in every process


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many fresh schedules")
    parser.add_argument("--first", type=int, default=None, help="the first seed; by default drawn from the clock")
    parser.add_argument("--seed", type=int, default=None, help="run this one schedule only")
    parser.add_argument("--trace", action="store_true", help="with --seed: tell what happens, line by line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that share the work")
    parser.add_argument("--until-found", action="store_true", help="stop at the first finding")
    parser.add_argument("--within-s", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--quiet", action="store_true", help="say nothing but findings and the last line")
    options = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        environment = {**os.environ, "PYTHONHASHSEED": HASH_SEED}
        os.execve(sys.executable, [sys.executable, "-m", "tests.sim", *arguments], environment)
    sys.unraisablehook = lambda _: None  # coroutines of ended worlds that would like to wind up
    if options.seed is not None:
        return _one(options.seed, trace=options.trace)
    return _many(options)


def _one(seed: int, *, trace: bool) -> int:
    from tests.sim import schedules, traces

    if not trace:
        logging.disable(logging.CRITICAL)
    verdict = schedules.run(seed, watch=traces.tell if trace else None)
    print(f"seed {seed}: {verdict.events} events, {verdict.generations} generations, {verdict.committed} commits")
    for finding in verdict.findings:
        print(f"  {finding.checker}: {finding.text}")
    return 1 if verdict.findings else 0


def _work(seed: int) -> "schedules.Verdict":
    from tests.sim import schedules

    return schedules.run(seed)


def _prepare() -> None:
    import gc

    sys.unraisablehook = lambda _: None
    logging.disable(logging.CRITICAL)
    from tests.sim import schedules  # noqa: F401

    gc.collect()
    gc.freeze()  # what is loaded once need not be looked at after each schedule


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Give what says whether somebody has asked this process to end."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(heard)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _many(options: argparse.Namespace) -> int:
    with _interruptible() as asked_to_end:
        return _search(options, asked_to_end)


def _prepare_helper(room: str) -> None:
    from tests.sim import schedules

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for all processes of a group: the first one ends the run
    schedules.ROOM = Path(room)
    _prepare()


def _search(options: argparse.Namespace, asked_to_end: Callable[[], bool]) -> int:
    from tests.sim import replays, schedules, situations  # noqa: F401  what cannot be loaded fails here, once

    first = options.first if options.first is not None else int(time.time() * 1000) % 1_000_000_000
    began_s, cpu_s = time.monotonic(), 0.0
    seen: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    failed = []
    logs: list[replays.Log] = []
    interrupted = False
    for verdict in _verdicts(range(first, first + options.seeds), options.jobs):
        totals.update(schedules=1, events=verdict.events, generations=verdict.generations, commits=verdict.committed)
        seen.update(verdict.seen.keys())
        cpu_s += verdict.cpu_s
        if not verdict.findings:
            logs += verdict.logs
        if len(logs) >= REPLAYED_AT_ONCE:
            failed += _replayed_otherwise(logs, first)
            logs.clear()
        if verdict.findings:
            failed.append(verdict.seed)
            _say_failure(verdict)
            if options.until_found:
                break
        interrupted = asked_to_end()
        if interrupted or time.monotonic() - began_s > options.within_s:
            break
    took_s = time.monotonic() - began_s
    failed += _replayed_otherwise(logs, first)
    if not options.quiet:
        for situation, count in sorted(seen.items(), key=lambda item: -item[1]):
            print(f"{count:7d}  {situation}")
        for situation in situations.never_met(seen):
            print(f"  never  {situation}")
    print(
        f"{totals['schedules']} schedules from seed {first}: {len(failed)} with findings, {totals['commits']} commits, "
        f"{totals['generations']} generations, {totals['events']} events, "
        f"{totals['schedules'] / took_s:.1f} a second, {totals['schedules'] / max(cpu_s, 1e-9):.1f} a core-second"
    )
    missed = situations.never_met(seen) if totals["schedules"] >= MET_WITHIN else []
    if missed:
        print(f"too little happened: {totals['schedules']} schedules never met {'; '.join(missed)}")
    if failed or missed:
        return 1
    return INTERRUPTED_CODE if interrupted else 0


def _replayed_otherwise(logs: "list[replays.Log]", first: int) -> list[int]:
    """Have another process replay these logs; return ``first`` if it finds other states."""
    from tests.sim import replays

    if replays.elsewhere(logs) == [replays.digest(log) for log in logs]:
        return []
    print("  replay is the same everywhere: another process folds a log into other states")
    return [first]


def _verdicts(seeds: range, jobs: int) -> "Iterator[schedules.Verdict]":
    if jobs <= 1 or len(seeds) == 1:
        _prepare()
        yield from map(_work, seeds)
        return
    from tests.sim import schedules

    spawn = multiprocessing.get_context("spawn")
    with (  # helpers that are ended in the middle of a schedule leave its folder there
        tempfile.TemporaryDirectory(prefix=f"dtrain-sim-{os.getpid()}-", dir=schedules.ROOM) as room,
        spawn.Pool(jobs, _prepare_helper, (room,)) as pool,
    ):
        yield from pool.imap_unordered(_work, seeds, chunksize=1)


def _say_failure(verdict: "schedules.Verdict") -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    again = f"python -m tests.sim --seed {verdict.seed} --trace"
    print(f"seed {verdict.seed} at commit {commit.stdout.strip()}; to see it again: {again}")
    for finding in verdict.findings[:6]:
        print(f"  {finding.checker}: {finding.text[:400]}")
    sys.stdout.flush()
