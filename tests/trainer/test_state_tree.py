"""What goes into a checkpoint comes out of it: the same types, the same order, the same bits."""

import json
import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.storage.tree_values import decode
from dtrain.trainer.state_tree import Encoder

CPU = torch.device("cpu")


def through(value: object) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "it"))
    return decode(json.loads(text), lambda name: encoder.tensors[name].clone(), CPU)


def same(one: Any, other: Any) -> bool:
    """Equality that looks at types, NaNs, signs of zero and the order of keys."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, other) and (one == other or (one != one and other != other))
    return bool(one == other)


_KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
_PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=3000)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(_KEYS, inner, max_size=4),
        st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=20,
)


@given(_PLAIN)
def test_any_nesting_of_plain_data_comes_back_as_it_was(value: object) -> None:
    assert same(through(value), value)


@pytest.mark.parametrize(
    "value",
    [
        2**4000,
        -(2**63) - 1,
        complex(-0.0, math.inf),
        {1, 2},
        frozenset({"a"}),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda:1"),
        Counter({30: 1, 80: 2}),
        np.float32(1.1),
        np.int64(-3),
        np.bool_(True),
        {(0, "a"): 1, None: 2, 1.5: 3},
        "\ud800",
    ],
    ids=repr,
)
def test_an_unusual_value_comes_back_with_its_type(value: object) -> None:
    assert same(through(value), value)


def test_a_defaultdict_keeps_its_factory() -> None:
    back = through(defaultdict(list, {"a": [1]}))
    assert back["new"] == [] and back["a"] == [1]


def test_a_modules_versions_survive() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    back: Any = through(state)
    versions: Any = state
    assert back._metadata == versions._metadata


def every_dtype() -> list[torch.dtype]:
    from dtrain.storage.tensor_codes import CODE_OF_DTYPE

    return [*CODE_OF_DTYPE, torch.complex128]


@pytest.mark.parametrize("dtype", every_dtype(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)], ids=str)
def test_a_tensor_of_any_dtype_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape) * dtype.itemsize
    raw = torch.arange(count, dtype=torch.uint8) % (2 if dtype is torch.bool else 251)
    tensor = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    back = through(tensor)
    assert back.dtype is dtype and back.shape == tensor.shape
    # complex128 is held as pairs, so its bytes are compared as they are
    assert back.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_a_transposed_and_a_conjugated_tensor_come_back() -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    conjugated = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128).conj()
    assert torch.equal(through(turned), turned)
    assert torch.equal(through(conjugated), conjugated)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint32", "bool", "complex128", ">i4", "<f4"])
def test_a_numpy_array_comes_back_with_its_dtype(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)[:, ::-1]
    back = through(array)
    assert back.dtype == array.dtype and np.array_equal(back, array)


def test_an_optimizers_state_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.5)
    other.load_state_dict(through(optimizer.state_dict()))
    assert str(other.state_dict()) == str(optimizer.state_dict())


def test_names_that_collide_are_kept_apart() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    back = through({"a": {"b": one}, "a.b": two})
    assert torch.equal(back["a"]["b"], one) and torch.equal(back["a.b"], two)


def a_cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda: None, "builtins.function"),
        (object(), "builtins.object"),
        (np.array(["a"]), "numpy array of <U1"),
        (np.array([object()]), "numpy array of object"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor: give its dense parts"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested tensor: give its dense parts"),
        (torch.empty(2, device="meta"), "meta device"),
        (torch.nn.parameter.UninitializedParameter(), "UninitializedParameter"),
        (defaultdict(lambda: 1), "defaultdict"),
        (a_cycle(), "contains itself"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path_and_type(value: object, says: str) -> None:
    with pytest.raises(TypeError) as caught:
        Encoder().encode({"state": [0, {3: {"foo": value}}]}, "optimizer")
    assert "optimizer.state.1.3.foo" in str(caught.value)
    assert says in str(caught.value)


def test_a_key_of_a_strange_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer has a key of type builtins\.frozenset"):
        Encoder().encode({frozenset(): 1}, "optimizer")


def test_a_sharded_tensor_of_the_old_kind_is_refused_with_the_mend() -> None:
    class ShardedTensor(torch.Tensor):
        pass

    tensor = torch.Tensor._make_subclass(ShardedTensor, torch.ones(2))
    with pytest.raises(TypeError, match=r"model is a ShardedTensor.* fully_shard"):
        Encoder().encode(tensor, "model")
