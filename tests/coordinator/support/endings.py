"""The newest failures in a cluster's log."""

from dtrain.coordinator.core.events import GenerationFailed, JobFailed
from tests.coordinator.support.clusters import Cluster


def failed(cluster: Cluster) -> GenerationFailed:
    event = cluster.last("GenerationFailed")
    assert isinstance(event, GenerationFailed)
    return event


def job_failed(cluster: Cluster) -> JobFailed:
    event = cluster.last("JobFailed")
    assert isinstance(event, JobFailed)
    return event
