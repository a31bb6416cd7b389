"""One schedule: a world from its seed, a job in it, a storm, the calm after it, and what the checkers say."""

import gc
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.proto import agent_pb2 as wire
from tests.sim import checkers, faults, replays, situations
from tests.sim.surroundings import installed
from tests.sim.world import JOB, OTHER_JOB, Shape, World, job_of, swept

CPU_S = time.process_time
CALM_S = 150.0  # after the storm a job ends within this, and what its steps take twice over; two one after the other
REST_S = (5.0, 12.0)  # behind its end, for what is still owed: at least, and at most
ROOM = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())


@dataclass
class Verdict:
    """What became of one schedule."""

    seed: int
    findings: list[checkers.Finding]
    virtual_s: float
    events: int
    generations: int
    committed: int
    seen: dict[str, int]
    storm: list[tuple[float, str]]
    cpu_s: float
    logs: list[replays.Log] = field(default_factory=list)  # of each job, for the replay elsewhere


def draw_shape(rng: random.Random) -> Shape:
    nnodes = rng.choice((2, 3, 4, 4, 4))
    step_s = rng.choice((0.15, 0.25))
    nproc = rng.choice((1, 1, 2))
    return Shape(
        workers=rng.choice((4, 4, 5)),
        slots=nproc * rng.choice((1, 1, 2)),
        coordinators=rng.choice((2, 2, 3)),
        nnodes_min=rng.choice((1, 2, nnodes)) if nnodes > 1 else 1,
        nnodes_max=nnodes,
        nproc=nproc,
        every_steps=rng.choice((4, 5, 6) if step_s > 0.2 else (7, 8, 9)),
        checkpoints=rng.choice((8, 8, 12, 20)),  # a short job meets its faults nearer to its end
        step_s=step_s,
        keep_last=rng.choice((0, 1, 2, 3)),
        fence_after_s=rng.choice((1800.0, 1800.0, 10.0)),
        drift=rng.choice((0.0, 0.0, 0.03)),
        hang_timeout_s=rng.choice((None, None, 5.0)),
        other_after_s=rng.choice((None, None, None, None, None, None, 0.0, rng.uniform(0.0, 20.0))),
    )


def jobs_of(shape: Shape) -> list[tuple[float, wire.Spec]]:
    """What is submitted, and when. The other job is content with fewer nodes, and as often needs all of its own."""
    jobs = [(0.0, _spec(shape, JOB, shape.nnodes_min, shape.nnodes_max))]
    if shape.other_after_s is not None:
        jobs.append((shape.other_after_s, _spec(shape, OTHER_JOB, 1, min(2, shape.nnodes_max))))
    return jobs


def _spec(shape: Shape, name: str, nnodes_min: int, nnodes_max: int) -> wire.Spec:
    return wire.Spec(
        name=name,
        python="python",
        script="/train.py",
        cwd="/",
        nnodes_min=min(nnodes_min, nnodes_max),
        nnodes_max=nnodes_max,
        nproc_per_node=shape.nproc,
        max_restarts=10_000,
        store="file:///simulated",
        every_steps=shape.every_steps,
        keep_last=shape.keep_last,
        hang_timeout_s=shape.hang_timeout_s,
    )


def run(seed: int, *, watch: Callable[[World, faults.Storm], None] | None = None) -> Verdict:
    """Run the schedule of ``seed``. ``watch`` is called before it begins: for a trace."""
    with swept():
        return _run(seed, watch)


def _run(seed: int, watch: Callable[[World, faults.Storm], None] | None) -> Verdict:
    rng = random.Random(f"schedule {seed}")
    folder = ROOM / f"dtrain-sim-{os.getpid()}-{seed}"
    shape = draw_shape(rng)
    world = World(seed, shape, folder)
    storm = faults.Storm(world, faults.draw(rng), rng)
    gc.disable()
    began_s = CPU_S()
    try:
        with installed(world):
            if watch is not None:
                watch(world, storm)
            world.begin(jobs_of(shape))
            storm.begin()
            bound_s = storm.mix.safety_s + len(world.jobs) * (CALM_S + 2 * world.habits.until * shape.step_s)
            world.loop.run_while(lambda: not world.ended, until_s=bound_s)
            ended_s = world.loop.now_s
            if not world.healed:
                storm.heal()
            for rest_s in REST_S:
                if rest_s == REST_S[0] or checkers.owes(world, storm):
                    world.loop.run_while(lambda: not world.loop.errors, until_s=ended_s + rest_s)
            findings = checkers.check(world, storm)
            for situation in set() if findings else situations.met(world, storm):
                world.saw(situation)
        return Verdict(
            seed=seed,
            findings=findings,
            virtual_s=ended_s,
            events=len(world.log),
            generations=sum(kind == "GenerationStarted" for kind, _ in world.log),
            committed=sum(kind == "CheckpointCommitted" for kind, _ in world.log),
            seen=dict(world.seen),
            storm=storm.log,
            cpu_s=CPU_S() - began_s,
            logs=[_log(world, job) for job in world.jobs],
        )
    finally:
        world.close()
        gc.enable()


def _log(world: World, job: str) -> replays.Log:
    """Key and value of each event of a job."""
    return [(change.key, (change.value or b"").decode()) for _, change in world.log if job_of(change.key) == job]
