"""What counts as heard: the newest that a worker told, whatever arrives behind it."""

from dtrain.proto import agent_pb2 as wire
from tests.sim.witnesses import Witness


def snapshot(incarnation: str, number: int, running: int) -> wire.Snapshot:
    ranks = [wire.RankReport(rank=rank, state=wire.RUNNING) for rank in range(running)]
    held = wire.Assignment(job="job", generation=1, ranks=ranks)
    return wire.Snapshot(worker="w1", incarnation=incarnation, number=number, assignments=[held])


def heard(*messages: wire.Snapshot) -> list[int]:
    witness = Witness()
    for at_s, message in enumerate(messages):
        witness.arrives("c1", float(at_s), message)
    return [each.running["job"] for each in witness.heard["c1", "w1"]]


def test_what_a_newer_snapshot_overtook_is_not_heard() -> None:
    assert heard(snapshot("a", 1, 2), snapshot("a", 3, 0), snapshot("a", 2, 1), snapshot("a", 3, 0)) == [2, 0]


def test_an_agent_that_was_started_again_counts_anew_and_its_life_before_no_longer() -> None:
    assert heard(snapshot("a", 7, 2), snapshot("b", 1, 0), snapshot("a", 8, 1), snapshot("b", 2, 3)) == [2, 0, 3]
