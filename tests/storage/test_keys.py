"""No name, number or key leaves its prefix, whatever is thrown at the layout."""

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain.common.errors import PermanentError, UserError
from dtrain.common.names import AttemptNumber, CheckpointNumber, JobName
from dtrain.storage import keys
from dtrain.storage.keys import InvalidKey
from dtrain.storage.local import LocalFolder

NASTY = st.text(alphabet=st.sampled_from("./\\ab\x00-_%2e~é\u202e\ud800\n"), max_size=12) | st.text(max_size=40)
NUMBERS = st.integers(min_value=-10, max_value=2_000_000)


def test_the_layout_is_that_of_the_architecture() -> None:
    job, checkpoint, attempt = JobName("mnist"), CheckpointNumber(3), AttemptNumber(12)
    folder = "jobs/mnist/checkpoints/000003/"
    assert keys.job_prefix(job) == "jobs/mnist/"
    assert keys.checkpoint_prefix(job, checkpoint) == folder
    assert keys.marker_key(job, checkpoint) == folder + "COMMITTED"
    assert keys.manifest_key(job, checkpoint, attempt) == folder + "attempt-000012/manifest.json"
    assert keys.shard_key(job, checkpoint, attempt, 5) == folder + "attempt-000012/rank-00005.safetensors"


@given(job=NASTY, checkpoint=NUMBERS, attempt=NUMBERS, rank=NUMBERS)
@example(job="..", checkpoint=1, attempt=1, rank=0)
@example(job="a/../../b", checkpoint=1, attempt=1, rank=0)
@example(job="a", checkpoint=1, attempt=1, rank=0)
def test_every_key_stays_below_its_job_or_is_refused(job: str, checkpoint: int, attempt: int, rank: int) -> None:
    name, number, try_number = JobName(job), CheckpointNumber(checkpoint), AttemptNumber(attempt)
    try:
        made = [
            keys.shard_key(name, number, try_number, rank),
            keys.manifest_key(name, number, try_number),
            keys.marker_key(name, number),
        ]
    except (UserError, InvalidKey):
        return
    for key in made:
        keys.validate_key(key)
        parts = PurePosixPath(key).parts
        assert parts[:2] == ("jobs", job)
        assert ".." not in parts
        assert "/".join(parts) == key


@given(key=NASTY | st.lists(NASTY, max_size=4).map("/".join))
@example(key="a/../../etc/passwd")
@example(key="a/%2e%2e/b")
def test_a_key_that_passes_is_a_path_below_the_root(key: str) -> None:
    try:
        keys.validate_key(key)
    except InvalidKey:
        return
    root = Path("/srv/store")
    path = Path(root, key)
    assert root in path.parents
    assert str(path) == f"{root}/{key}"  # nothing was folded away
    assert 1 <= len(key.encode()) <= keys.KEY_MAX_BYTES
    assert "\x00" not in key
    assert "\\" not in key


@given(key=NASTY)
def test_what_starts_a_valid_key_is_a_valid_prefix(key: str) -> None:
    try:
        keys.validate_key(key)
    except InvalidKey:
        return
    assert keys.validate_prefix(key) == key
    assert keys.validate_prefix(key + "/") == key + "/"


@pytest.mark.parametrize(
    ("checkpoint", "attempt", "rank"),
    [(0, 1, 0), (-1, 1, 0), (1_000_000, 1, 0), (1, 0, 0), (1, 1_000_000, 0), (1, 1, -1), (1, 1, 100_000)],
)
def test_a_number_out_of_range_is_refused(checkpoint: int, attempt: int, rank: int) -> None:
    with pytest.raises(InvalidKey, match="out of range"):
        keys.shard_key(JobName("a"), CheckpointNumber(checkpoint), AttemptNumber(attempt), rank)


def test_the_order_of_keys_is_the_order_of_numbers() -> None:
    numbers = [1, 2, 9, 10, 99, 100, 9_999, 10_000, 99_999]
    made = [keys.shard_key(JobName("a"), CheckpointNumber(1), AttemptNumber(1), rank) for rank in numbers]
    assert made == sorted(made)


def test_a_part_of_255_bytes_fits_a_folder_and_one_more_is_refused(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    store.put("é" * 127 + "x", b"fits")
    with pytest.raises(PermanentError, match="more than 255 bytes"):
        store.put("é" * 128, b"does not")


def test_a_stores_own_names_are_not_for_keys() -> None:
    with pytest.raises(InvalidKey, match="for themselves"):
        keys.validate_key("a/.dtrain-tmp-1")
