"""What people do in a schedule: they ask for checkpoints, pin them, find them damaged, and cancel a job."""

import json
from typing import TYPE_CHECKING

from dtrain.proto import agent_pb2 as wire
from tests.sim.world import OTHER_JOB, job_of

if TYPE_CHECKING:
    from tests.sim.faults import Storm


def ask(storm: "Storm") -> None:
    world, number = storm.world, storm.rng.randint(1, 8)
    job = storm.rng.choice(world.jobs)
    match storm.rng.randrange(4):
        case 0 if job == OTHER_JOB:
            storm.say(f"a person cancels {job}")
            world.cancelled.add(job)
            world.ask("Cancel", wire.CancelRequest(job=job))
        case 0 | 1:
            storm.say(f"a person asks for a checkpoint of {job}")
            world.ask("Checkpoint", wire.CheckpointRequest(job=job, request=f"r{number}"))
        case 2:
            storm.say(f"a person pins checkpoint {number} of {job}")
            world.ask("Pin", wire.PinRequest(job=job, checkpoint=number, pinned=storm.rng.random() < 0.7))
        case _:
            _condemn(storm, job, number)


def condemn_newest(storm: "Storm") -> None:
    """The newest checkpoint is found damaged; then the leader dies, and then a trainer: what was decided must last."""
    committed = [change for kind, change in storm.world.log if kind == "CheckpointCommitted"]
    if not committed or storm.trainer() is None:
        return
    _condemn(storm, job_of(committed[-1].key), json.loads(committed[-1].value or b"")["data"]["checkpoint"])
    storm.world.loop.after(storm.rng.uniform(0.05, 0.5), storm.strike, "coordinator dies")
    storm.world.loop.after(storm.rng.uniform(0.3, 2.0), storm.strike, "trainer dies")


def _condemn(storm: "Storm", job: str, number: int) -> None:
    storm.say(f"a person finds checkpoint {number} of {job} damaged")
    request = wire.QuarantineRequest(job=job, checkpoint=number, key="some blob", reason="a person said so")
    storm.world.ask("Quarantine", request)
