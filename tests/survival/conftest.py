"""What an uninterrupted run gives, and the checks that every interrupted run must pass."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtrain.coordinator.core.events import CheckpointCommitted, GenerationStarted, RecordedEvent
from dtrain.storage.uris import open_store
from dtrain.storage.verify import verify_checkpoint
from tests.support.cluster import Cluster, cluster
from tests.support.facts import wait_for
from tests.support.s3_server import S3Server, seaweedfs

SCRIPT = Path(__file__).with_name("train.py")
STEPS = 100
EVERY = 10


@dataclass(frozen=True)
class Attack:
    """One job under attack, and what its own records say."""

    cluster: Cluster
    job: str
    records: Path
    final: Path
    store: str
    rng: random.Random

    def steps(self, rank: int) -> list[dict[str, int]]:
        """The rank's own record of the steps it began, in order."""
        path = self.records / f"rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def furthest(self) -> int:
        return max((line["step"] for rank in (0, 1) for line in self.steps(rank)), default=0)

    def wait_until_training(self, *, generation: int, deadline_s: float = 60.0) -> dict[int, int]:
        """Wait until both ranks of this generation have begun a step; return their pids, by rank."""

        def look() -> dict[int, int] | None:
            lines = {rank: line for rank in (0, 1) for line in self.steps(rank) if line["generation"] == generation}
            return {rank: line["pid"] for rank, line in lines.items()} if len(lines) == 2 else None

        return wait_for(f"a step of both ranks in generation {generation}", look, deadline_s=deadline_s)

    def hurry(self) -> None:
        """What is to be seen has been seen: let the steps that are left take no longer than they must."""
        hurry_file(self.cluster, self.job).touch()

    def started(self) -> list[RecordedEvent]:
        return [e for e in self.cluster.history(self.job) if isinstance(e.event, GenerationStarted)]

    def committed(self) -> list[CheckpointCommitted]:
        return [e.event for e in self.cluster.history(self.job) if isinstance(e.event, CheckpointCommitted)]


def hurry_file(it: Cluster, job: str) -> Path:
    """Given to the script; once it is there, steps are short."""
    return it.folder / f"{job}-hurry"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Seeded anew each time; the seed is printed with a failure and taken from DTRAINTEST_SEED to repeat it."""
    seed = os.environ.get("DTRAINTEST_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"seed: DTRAINTEST_SEED={seed}")
    return random.Random(f"{seed}/{request.node.name}")


def begin(
    it: Cluster,
    rng: random.Random,
    *,
    steps: int = STEPS,
    store: str = "",
    job: str = "attacked",
    more: tuple[str, ...] = (),
    script: tuple[str, ...] = (),
) -> Attack:
    """Submit the job to the cluster, with ``more`` options, and ``script``'s own arguments."""
    records = it.folder / f"{job}-records"
    records.mkdir()
    final = it.folder / f"{job}.safetensors"
    store = store or f"file://{it.folder}/store"
    options: tuple[str, ...] = ("--name", job, "--nproc-per-node", "2", "--every-steps", str(EVERY), "--store", store)
    options += ("--max-restarts", "20", *more)
    args = ("--steps", str(steps), "--records", str(records), "--final", str(final))
    args += ("--hurry", str(hurry_file(it, job)), *script)
    it.submit(SCRIPT, *args, options=options)
    return Attack(it, job, records, final, store, rng)


@pytest.fixture(scope="session")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bytes]:
    """Final weights of an uninterrupted run of so many steps; each is run once a session."""
    known: dict[int, bytes] = {}

    def run(steps: int) -> bytes:
        if steps not in known:
            with cluster(tmp_path_factory.mktemp("quiet") / "cluster") as it:
                attack = begin(it, random.Random(0), steps=steps, job="quiet")
                assert it.wait_for_end("quiet").type == "JobSucceeded", it.logs()
                check(attack, None)
                assert len(attack.started()) == 1, "a quiet run was restarted"
                known[steps] = attack.final.read_bytes()
        return known[steps]

    return run


def check(attack: Attack, expected: bytes | None) -> None:
    """What must hold after any run that ended well, whatever was killed on the way."""
    committed = attack.committed()
    assert committed, "nothing was committed"
    store = open_store(attack.store)
    for checkpoint in committed:
        findings = verify_checkpoint(store, checkpoint.manifest_key, checkpoint.manifest_digest)
        assert not findings, f"checkpoint {checkpoint.checkpoint} is committed and damaged: {findings}"
    restored = {}
    for event in attack.started():
        assert isinstance(event.event, GenerationStarted)
        point = event.event.restore
        restored[event.event.generation] = point.step if point is not None else 0
        sound = [c.step for e, c in _committed_before(attack, event.seq)]
        assert restored[event.event.generation] == max(sound, default=0), "not the newest committed checkpoint"
    for rank in (0, 1):
        for generation, first in restored.items():
            steps = [line["step"] for line in attack.steps(rank) if line["generation"] == generation]
            assert steps == list(range(first + 1, first + 1 + len(steps))), f"rank {rank}: steps are not gapless"
    if expected is not None:
        assert attack.final.read_bytes() == expected, "the final weights differ from the uninterrupted run's"


def _committed_before(attack: Attack, seq: int) -> list[tuple[RecordedEvent, CheckpointCommitted]]:
    events = attack.cluster.history(attack.job)
    return [(e, e.event) for e in events if isinstance(e.event, CheckpointCommitted) and e.seq < seq]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A real S3 server, and what its clients need in the environment."""
    with seaweedfs(tmp_path / "s3") as it:
        for name, value in it.environment.items():
            monkeypatch.setenv(name, value)
        yield it
