"""Replay: every prefix of a log gives the same state, in another process with another order of its sets.

`python -m tests.sim.replays` reads lines of JSON, each a log as a list of keys and values, and prints for each the
digest over the states of all its prefixes.
"""

import json
import os
import subprocess
import sys

import msgspec
import xxhash

from dtrain.common.names import JobName
from dtrain.coordinator import codec
from dtrain.coordinator.core.evolve import evolve
from dtrain.coordinator.core.states import JobState
from tests.sim.world import job_of

OTHER_HASH_SEED = "4242"
Log = list[tuple[str, str]]


def digest(log: Log) -> str:
    """Fold the log; return one digest over the state after each of its events, in the order of their dicts."""
    hasher, state = xxhash.xxh3_128(), None
    for key, value in log:
        state = evolve(state, codec.decode(key, value.encode(), JobName(job_of(key))))
        hasher.update(_encoded(state))
    return hasher.hexdigest()


def _encoded(state: JobState) -> bytes:
    return msgspec.json.encode(state)


def elsewhere(logs: list[Log]) -> list[str]:
    """The digests as another process finds them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim.replays"],
        input="".join(json.dumps(log) + "\n" for log in logs),
        env={**os.environ, "PYTHONHASHSEED": OTHER_HASH_SEED},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


if __name__ == "__main__":
    for line in sys.stdin:
        print(digest([(key, value) for key, value in json.loads(line)]))
