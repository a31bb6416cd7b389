"""How large a state is taken to be before its first checkpoint."""

from typing import Any

import pytest
import torch

from dtrain.common.names import Step
from dtrain.trainer.data_position import DataPosition
from dtrain.trainer.tracking import TrackedState


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(400, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 400)).sum().backward()
    optimizer.step()
    return model, optimizer


class App:
    """Model and optimizer in one, as torch's own tutorial on checkpoints has it."""

    def __init__(self) -> None:
        self.model, self.optimizer = trained()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Average:
    """An average of a model's weights, which shows nothing of itself but its state."""

    def __init__(self) -> None:
        model, _ = trained()
        self._shadows = [{name: value.detach().clone() for name, value in model.named_parameters()}]

    def __getattribute__(self, name: str) -> Any:
        if name not in ("state_dict", "_shadows", "__class__", "load_state_dict"):
            raise AssertionError(f"{name} was asked for: this may be code of the script")
        return object.__getattribute__(self, name)

    def state_dict(self) -> dict[str, Any]:
        return {"shadows": self._shadows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Optimizers:
    """Several optimizers in a list."""

    def __init__(self) -> None:
        self.optimizers = [trained()[1], trained()[1]]

    def state_dict(self) -> dict[str, Any]:
        return {"all": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Whole:
    """Wrappers in a wrapper, beside data that it does not store."""

    def __init__(self) -> None:
        self.app, self.averages, self.optimizers = App(), [Average()], Optimizers()
        self.model = self.app.model  # by a second name
        self.loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(10_000_000)))

    def state_dict(self) -> dict[str, Any]:
        parts = {"app": self.app, "average": self.averages[0], "optimizers": self.optimizers}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [App, Average, Optimizers, Whole])
def test_what_a_wrapper_holds_is_counted_before_its_first_checkpoint(kind: type) -> None:
    tracked = TrackedState()
    tracked.add("all", kind())
    captured = tracked.capture(Step(1), DataPosition([1]))
    real_bytes = sum(tensor.nbytes for tensor in captured.tensors.values())
    assert tracked.estimate_bytes() == pytest.approx(real_bytes, rel=0.1)


class Talking(torch.nn.Sequential):
    """A model with code in every way to its parts."""

    def _refuse(self, *_: object, **__: object) -> Any:
        raise AssertionError("code of the script")

    modules = named_modules = children = named_children = parameters = named_parameters = buffers = _refuse
    state_dict = _refuse


def test_no_code_of_a_model_is_called() -> None:
    linear = torch.nn.Linear(400, 1000)
    tracked = TrackedState()
    tracked.add("model", Talking(linear, torch.nn.Sequential(torch.nn.BatchNorm1d(1000), linear)))
    assert tracked.estimate_bytes() == 4 * (400 * 1000 + 1000 + 4 * 1000) + 8


class Warmup:
    """A schedule of the script's own: it holds the optimizer, and stores a number."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"done": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_what_is_tracked_by_itself_is_not_counted_again_with_whoever_holds_it() -> None:
    model, optimizer = trained()
    tracked = TrackedState()
    tracked.add("model", model)
    tracked.add("optimizer", optimizer)
    before = tracked.estimate_bytes()
    tracked.add("schedule", torch.optim.lr_scheduler.StepLR(optimizer, 1))
    tracked.add("warmup", Warmup(optimizer))
    assert tracked.estimate_bytes() == before
