"""Every kind of state that training has is stored without pickle, and goes back into a fresh object of its kind."""

import enum
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.testing._internal.two_tensor import TwoTensor
from torchdata.stateful_dataloader import StatefulDataLoader

import dtrain
from dtrain.common.errors import UserError
from dtrain.storage import codecs
from dtrain.storage.tree_values import decode
from dtrain.trainer.random_states import TrackedGenerator
from dtrain.trainer.state_tree import Encoder

STEPS = 3  # past every milestone below, in the middle of every cycle


def stored(value: object) -> tuple[str, dict[str, torch.Tensor]]:
    """Return what a checkpoint holds of the value: text and tensors, nothing else."""
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "it"))
    return text, {name: tensor.clone() for name, tensor in encoder.tensors.items()}


def read(text: str, tensors: dict[str, torch.Tensor]) -> Any:
    return decode(json.loads(text), lambda name: tensors[name].clone(), torch.device("cpu"))


def same(one: tuple[str, dict[str, torch.Tensor]], other: tuple[str, dict[str, torch.Tensor]]) -> bool:
    return (
        one[0] == other[0]
        and one[1].keys() == other[1].keys()
        and all(
            torch.equal(tensor.reshape(-1).view(torch.uint8), other[1][name].reshape(-1).view(torch.uint8))
            for name, tensor in one[1].items()
        )
    )


def optimizer(kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **settings: Any) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(3, 3))], **{"lr": 0.1, **settings})


def stepped(kind: Callable[..., torch.optim.Optimizer]) -> Callable[[], tuple[Any, Callable[[], object]]]:
    def make() -> tuple[Any, Callable[[], object]]:
        made = optimizer(kind)
        (parameter,) = made.param_groups[0]["params"]

        def loss() -> float:
            made.zero_grad()
            found = (parameter**2).sum()
            found.backward()
            return float(found.detach())

        return made, lambda: made.step(loss)

    return make


def scheduled(kind: Callable[..., Any], **settings: Any) -> Callable[[], tuple[Any, Callable[[], object]]]:
    def make() -> tuple[Any, Callable[[], object]]:
        made = kind(optimizer(momentum=0.9), **settings)
        made.optimizer.step()
        return made, made.step

    return make


class Decay:
    """A schedule with a state of its own: LambdaLR stores it."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, epoch: int) -> float:
        self.seen += 1
        return float(0.9**self.seen)


def sequential(wrapped: torch.optim.Optimizer) -> Any:
    first, second = lr_scheduler.ConstantLR(wrapped, total_iters=2), lr_scheduler.ExponentialLR(wrapped, gamma=0.9)
    return lr_scheduler.SequentialLR(wrapped, [first, second], milestones=[2])


def chained(wrapped: torch.optim.Optimizer) -> Any:
    made = lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(wrapped), lr_scheduler.ExponentialLR(wrapped, 0.9)])
    made.optimizer = wrapped
    return made


def plateau() -> tuple[Any, Callable[[], object]]:
    made = lr_scheduler.ReduceLROnPlateau(optimizer(), patience=1)
    return made, lambda: made.step(1.0)


def scaler() -> tuple[Any, Callable[[], object]]:
    made = torch.amp.GradScaler("cpu")
    made.scale(torch.ones(()))  # it makes its state at the first use

    def step() -> None:
        made.update(made.get_scale() * 2)

    return made, step


def averaged() -> tuple[Any, Callable[[], object]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    made = AveragedModel(model)
    return made, lambda: made.update_parameters(model)


def loader() -> tuple[Any, Callable[[], object]]:
    made = StatefulDataLoader(list(range(40)), batch_size=2, shuffle=True)  # type: ignore[var-annotated, arg-type]
    batches: Iterator[object] = iter(made)
    return made, lambda: next(batches)


def drawing(make: Callable[[], Any], draw: str) -> Callable[[], tuple[Any, Callable[[], object]]]:
    def made() -> tuple[Any, Callable[[], object]]:
        generator = make()
        return TrackedGenerator(generator), getattr(generator, draw)

    return made


def torch_drawing() -> tuple[Any, Callable[[], object]]:
    generator = torch.Generator()
    return TrackedGenerator(generator), lambda: torch.rand(3, generator=generator)


OPTIMIZERS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "LBFGS",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]
KINDS: dict[str, Callable[[], tuple[Any, Callable[[], object]]]] = {
    **{name: stepped(getattr(torch.optim, name)) for name in OPTIMIZERS if hasattr(torch.optim, name)},
    "SGD": stepped(partial(torch.optim.SGD, momentum=0.9)),
    "LambdaLR of a function": scheduled(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "LambdaLR of an object": scheduled(lambda of: lr_scheduler.LambdaLR(of, Decay())),
    "MultiplicativeLR": scheduled(lr_scheduler.MultiplicativeLR, lr_lambda=lambda epoch: 0.9),
    "StepLR": scheduled(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": scheduled(lr_scheduler.MultiStepLR, milestones=[1, 2, 2]),  # a Counter of whole numbers
    "CosineAnnealingLR": scheduled(lr_scheduler.CosineAnnealingLR, T_max=10),
    "CosineAnnealingWarmRestarts": scheduled(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
    "PolynomialLR": scheduled(lr_scheduler.PolynomialLR),
    "OneCycleLR": scheduled(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=10),
    "CyclicLR": scheduled(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0),
    "SequentialLR": scheduled(sequential),
    "ChainedScheduler": scheduled(chained),
    "SWALR": scheduled(SWALR, swa_lr=0.05),
    "ReduceLROnPlateau": plateau,
    "GradScaler": scaler,
    "AveragedModel": averaged,
    "StatefulDataLoader": loader,
    "python's Random": drawing(random.Random, "gauss"),
    "numpy's RandomState": drawing(np.random.RandomState, "standard_normal"),
    "numpy's Generator": drawing(np.random.default_rng, "standard_normal"),
    "numpy's Generator of MT19937": drawing(lambda: np.random.Generator(np.random.MT19937()), "standard_normal"),
    "torch's Generator": torch_drawing,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_object_takes_the_state_that_was_stored(kind: str) -> None:
    used, use = KINDS[kind]()
    for _ in range(STEPS):
        use()
    kept = stored(used.state_dict())
    fresh, use_fresh = KINDS[kind]()
    assert not same(stored(fresh.state_dict()), kept), "a state that never changes would prove nothing"
    fresh.load_state_dict(read(*kept))
    if kind == "StatefulDataLoader":  # it takes its state when it is iterated
        assert str(list(fresh)) == str([use() for _ in range(20 - STEPS)])
        return
    assert same(stored(fresh.state_dict()), kept)
    if isinstance(fresh, TrackedGenerator):
        assert str(use_fresh()) == str(use()), "it draws on as the other does"


@pytest.mark.parametrize(
    "state",
    [random.getstate, np.random.get_state, torch.get_rng_state],
    ids=["python", "numpy", "torch"],
)
def test_the_global_random_states_come_back_as_they_were(state: Callable[[], Any]) -> None:
    kept = state()
    back = read(*stored(kept))
    assert type(back) is type(kept) and same(stored(back), stored(kept))


class Phase(enum.Enum):
    WARM = enum.auto()
    COLD = enum.auto()


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    ONE = "one"


class Parts(enum.Flag):
    A = 1
    B = 2


@pytest.mark.parametrize("member", [Phase.COLD, Level.LOW, Word.ONE, Parts.A, Parts.A | Parts.B, Parts(0)], ids=repr)
def test_an_enum_comes_back_as_the_very_member(member: enum.Enum) -> None:
    back = read(*stored({"deep": [{member: member}], 3: (member,)}))
    assert back == {"deep": [{member: member}], 3: (member,)}
    assert type(back[3][0]) is type(member) and back[3][0] is member


def test_nothing_is_imported_to_find_an_enum() -> None:
    text, tensors = stored(Phase.WARM)
    with pytest.raises(UserError, match="import not_imported before"):
        read(text.replace(Phase.__module__, "not_imported"), tensors)
    with pytest.raises(UserError, match=r"has no LUKEWARM.*add it"):
        read(text.replace("WARM", "LUKEWARM"), tensors)
    with pytest.raises(UserError, match="which this run does not have"):
        read(text.replace("Phase", "stored"), tensors)  # a function of that module: never called


def test_an_enum_that_cannot_be_found_again_is_refused_by_its_path() -> None:
    class Hidden(enum.Enum):
        ONE = 1

    with pytest.raises(TypeError, match=r"it\.a\.1 is of the enum .*Hidden.*top of a module"):
        stored({"a": [0, Hidden.ONE]})


@dataclass(frozen=True)
class Window:
    """What a script might keep: no plain data, and with a tensor in it."""

    size: int
    values: torch.Tensor


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_BY_KIND", {})
    monkeypatch.setattr(codecs, "_BY_NAME", {})


def window_is_storable(name: str = "") -> None:
    dtrain.storable(
        Window,
        to_plain=lambda window: (window.size, window.values),
        from_plain=lambda plain: Window(*plain),
        name=name,
    )


@pytest.mark.usefixtures("forgetful")
def test_a_type_of_the_scripts_own_is_refused_with_the_way_in_and_stored_once_it_is_taken() -> None:
    state = {"deep": [Window(size=2, values=torch.arange(3.0))]}
    with pytest.raises(TypeError, match=r"it\.deep\.0 is a .*Window, .* dtrain\.storable\(\)"):
        stored(state)
    window_is_storable("window")
    text, tensors = stored(state)
    (back,) = read(text, tensors)["deep"]
    assert isinstance(back, Window) and back.size == 2 and torch.equal(back.values, torch.arange(3.0))
    assert list(tensors) == ["it.deep.0.1"], "its tensors lie among the others"


@pytest.mark.usefixtures("forgetful")
def test_a_tensor_that_wraps_others_is_refused_with_a_way_in_that_works() -> None:
    wrapped = TwoTensor(torch.arange(2.0), torch.ones(2))
    assert type(wrapped.as_subclass(torch.Tensor)) is TwoTensor, "no way to a plain tensor"
    with pytest.raises(TypeError, match=r"TwoTensor.* the plain tensors that it is made of, or .*dtrain\.storable\(\)"):
        stored({"weight": wrapped})
    dtrain.storable(TwoTensor, to_plain=lambda two: [two.a, two.b], from_plain=lambda plain: TwoTensor(*plain))
    back = read(*stored({"weight": wrapped}))["weight"]
    assert type(back) is TwoTensor and torch.equal(back.a, torch.arange(2.0)) and torch.equal(back.b, torch.ones(2))


@pytest.mark.usefixtures("forgetful")
def test_a_run_that_does_not_know_a_type_says_which() -> None:
    window_is_storable("window")
    kept = stored(Window(size=1, values=torch.ones(1)))
    codecs._BY_NAME.clear()
    with pytest.raises(UserError, match=r"of type window, .*dtrain\.storable\(\.\.\., name='window'\)"):
        read(*kept)


@pytest.mark.usefixtures("forgetful")
def test_one_name_is_one_type() -> None:
    window_is_storable()
    window_is_storable()  # a module that is loaded again
    with pytest.raises(UserError, match="names two types"):
        dtrain.storable(Phase, to_plain=str, from_plain=Phase, name=f"{Window.__module__}.Window")
