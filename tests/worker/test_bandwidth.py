"""The cap on uploads, by a clock that only the test moves."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.common.errors import UserError
from dtrain.worker.bandwidth import MIB_BYTES, BandwidthCap, TokenBucket

RATE = 1000.0


def test_one_seconds_worth_goes_at_once_and_the_rest_at_the_rate() -> None:
    bucket = TokenBucket(bytes_per_s=RATE, now_s=50.0)
    assert [bucket.take(500, 50.0) for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]
    assert bucket.take(500, 51.5) == 0.0, "1.5 s later the debt is paid, and 500 came in"
    assert bucket.take(1000, 60.0) == 0.0
    assert bucket.take(1, 60.0) > 0.0, "a long pause saves up no more than one second's worth"


def test_a_slice_larger_than_what_a_second_brings_passes_late_and_not_never() -> None:
    bucket = TokenBucket(bytes_per_s=RATE, now_s=0.0)
    assert bucket.take(8000, 0.0) == 7.0
    assert bucket.take(1000, 7.0) == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000), st.floats(0.0, 2.0)), min_size=1, max_size=60))
def test_however_many_uploads_ask_together_they_stay_under_the_cap(asks: list[tuple[int, int, float]]) -> None:
    """Each of four uploads sends one slice after another; between two it does something else for a while."""
    bucket = TokenBucket(bytes_per_s=RATE, now_s=0.0)
    free_s = [0.0] * 4  # when each upload asks next
    sent: list[tuple[float, int]] = []
    now_s = 0.0
    for upload, count, pause_s in asks:
        now_s = max(now_s, free_s[upload])
        at_s = now_s + bucket.take(count, now_s)
        free_s[upload] = at_s + pause_s
        sent.append((at_s, count))
    for until_s, _ in sent:
        assert sum(count for at_s, count in sent if at_s <= until_s) <= RATE * (until_s + 1.0) * (1 + 1e-9)


def test_a_cap_waits_by_its_clock_and_no_longer_than_anybody_wants_the_upload() -> None:
    cap, wanted, dropped = BandwidthCap(1.0, clock=lambda: 0.0), threading.Event(), threading.Event()
    dropped.set()
    cap.wait_for(MIB_BYTES, wanted)
    started_s = time.monotonic()
    cap.wait_for(1_000_000 * MIB_BYTES, dropped)
    assert time.monotonic() - started_s < 60.0


def test_without_a_cap_nothing_waits() -> None:
    BandwidthCap(None).wait_for(1 << 60, threading.Event())


@pytest.mark.parametrize("rate", [0.0, -1.0, 0.5, float("nan")])
def test_a_cap_that_would_stop_uploads_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="give 1 or more"):
        BandwidthCap(rate)
