"""Retries: only what may pass, only until the deadline, and not once it is no longer wanted."""

import threading
import time

import pytest

from dtrain.common.errors import ShardDamagedError
from dtrain.storage import retrying
from dtrain.storage.objects import StorageFull, StorageRefused, StorageUnavailable
from dtrain.storage.retrying import DAMAGED_READS, GaveUp, read_again_if_damaged, with_retries


class Flaky:
    """Fails with each of the errors in turn, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAIT_FIRST_S", 0.001)


def test_tries_again_until_it_succeeds() -> None:
    call = Flaky(StorageUnavailable("away"), StorageFull("full"), StorageUnavailable("away"))
    assert with_retries(call, deadline_s=60) == "answer"
    assert call.calls == 4


@pytest.mark.parametrize("error", [StorageRefused("no"), ValueError("a bug")])
def test_does_not_try_again_what_cannot_pass(error: Exception) -> None:
    call = Flaky(error)
    with pytest.raises(type(error)):
        with_retries(call, deadline_s=60)
    assert call.calls == 1


def test_raises_the_last_error_at_the_deadline() -> None:
    call = Flaky(*[StorageUnavailable(f"failure {number}") for number in range(10_000)])
    begun = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        with_retries(call, deadline_s=0.2)
    assert 0.2 <= time.monotonic() - begun < 10
    assert call.calls > 1
    assert str(caught.value) == f"failure {call.calls - 1}"


def test_what_advances_is_tried_for_as_long_as_it_does() -> None:
    """As a large upload over a link that breaks now and then: each try comes further than those before."""
    come = 0

    def call() -> str:
        nonlocal come
        if come < 20:
            come += 1
            time.sleep(0.02)
            raise StorageUnavailable("cut off")
        return "answer"

    assert with_retries(call, deadline_s=0.1, advance=lambda: come) == "answer"


def test_sending_the_same_again_is_no_advance() -> None:
    call = Flaky(*[StorageUnavailable("cut off") for _ in range(10_000)])
    with pytest.raises(StorageUnavailable):
        with_retries(call, deadline_s=0.1, advance=lambda: 1000 - call.calls)


def test_calls_once_even_without_any_time() -> None:
    call = Flaky()
    assert with_retries(call, deadline_s=0) == "answer"
    failing = Flaky(StorageUnavailable("away"))
    with pytest.raises(StorageUnavailable):
        with_retries(failing, deadline_s=0)
    assert failing.calls == 1


def test_does_nothing_that_is_no_longer_wanted() -> None:
    call, given_up = Flaky(), threading.Event()
    given_up.set()
    with pytest.raises(GaveUp):
        with_retries(call, deadline_s=60, give_up=given_up)
    assert call.calls == 0


def test_giving_up_ends_a_long_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "WAIT_FIRST_S", 1_000_000.0)
    monkeypatch.setattr(retrying, "WAIT_MAX_S", 1_000_000.0)
    given_up = threading.Event()

    def fail() -> None:
        threading.Timer(0.05, given_up.set).start()
        raise StorageUnavailable("away")

    begun = time.monotonic()
    with pytest.raises(GaveUp) as caught:
        with_retries(fail, deadline_s=1_000_000, give_up=given_up)
    assert time.monotonic() - begun < 30
    assert isinstance(caught.value.__cause__, StorageUnavailable)


def test_what_came_damaged_is_read_again_and_called_damaged_only_when_it_stays_so() -> None:
    damaged = ShardDamagedError("a shard", "a flipped bit")
    assert read_again_if_damaged(Flaky(*[damaged] * (DAMAGED_READS - 1))) == "answer"
    stays = Flaky(*[damaged] * DAMAGED_READS)
    with pytest.raises(ShardDamagedError):
        read_again_if_damaged(stays)
    assert stays.calls == DAMAGED_READS
    away = Flaky(StorageUnavailable("away"))
    with pytest.raises(StorageUnavailable):
        read_again_if_damaged(away)
    assert away.calls == 1
