"""What a worker's registration says, and whose it is."""

import json

import pytest

from dtrain.common.names import WorkerId
from dtrain.worker.registration import is_of, registration
from dtrain.worker.rpc.convert import Identity

IDENTITY = Identity(worker=WorkerId("w1"), journal="j1", incarnation="a", version="1", host="node", address="node:7071")


def test_a_registration_is_its_data_folders_whatever_life_put_it() -> None:
    value = registration(IDENTITY, slots=8, fence_after_s=1800.0)
    said = json.loads(value)
    assert (said["slots"], said["fence_after_s"]) == (8, 1800.0)
    assert is_of("j1", value)
    assert not is_of("j2", value)


@pytest.mark.parametrize("value", [b"", b"{}", b"[1]", b"\xff", b'{"journal": 1}'])
def test_what_is_no_registration_is_nobodys(value: bytes) -> None:
    assert not is_of("j1", value)
