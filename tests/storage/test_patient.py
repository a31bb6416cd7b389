"""Reads outside of a job are tried again, and end."""

import pytest

from dtrain.storage.objects import StorageUnavailable
from dtrain.storage.patient import PatientStore
from dtrain.storage.verify import verify_checkpoint
from tests.support.checkpoints import write_checkpoint
from tests.support.memory_store import Fault, MemoryStore

AWAY = StorageUnavailable("503 slow down")
MARKER = "jobs/mnist/checkpoints/000001/COMMITTED"


def test_every_read_that_a_look_at_a_checkpoint_takes_is_tried_again() -> None:
    store = MemoryStore()
    write_checkpoint(store, [bytes(100)] * 2)
    store.fail_next(*(Fault(operation=name, error=AWAY) for name in ("get", "head", "read_into", "list")))
    patient = PatientStore(store, deadline_s=60)
    assert verify_checkpoint(patient, MARKER) == []
    assert next(info.key for info in patient.list("jobs/mnist/")) == MARKER
    assert store.faults_left == 0


def test_a_store_that_stays_away_is_given_up_at_the_deadline() -> None:
    store = MemoryStore()
    store.fail_next(*[Fault(operation="get", error=AWAY)] * 1000)
    with pytest.raises(StorageUnavailable):
        PatientStore(store, deadline_s=0.2).get(MARKER)
