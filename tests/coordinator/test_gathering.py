"""How long a job that could start with fewer nodes than it may have waits for more of them."""

from dtrain.coordinator.core.placement import GATHER_S
from tests.coordinator.support.clusters import Cluster, spec


def test_a_job_of_some_nodes_gathers_more_from_when_it_could_start() -> None:
    cluster = Cluster()
    cluster.submits(spec(nnodes_min=1, nnodes_max=4))  # the machines are still booting
    for _ in range(20):
        cluster.passes(0.25)
        assert cluster.decides() == []
    for name in ("w1", "w2", "w3", "w4"):
        cluster.joins(name)
        cluster.decides()
        cluster.passes(0.3)
        cluster.decides()
    assert cluster.generation().world_size == 8, f"it runs on {len(cluster.generation().members)} of 4 nodes"


def test_it_gathers_anew_where_those_that_were_there_have_left() -> None:
    cluster = Cluster()
    cluster.submits(spec(nnodes_min=1, nnodes_max=2))
    cluster.joins("w1")
    assert cluster.decides() == []
    cluster.loses("w1")
    cluster.passes(GATHER_S)
    assert cluster.decides() == []
    cluster.joins("w2")
    cluster.passes(GATHER_S - 0.1)
    assert cluster.decides() == []
    cluster.joins("w3")
    assert cluster.decides() == ["GenerationStarted"]
    assert len(cluster.generation().members) == 2
