"""Random states: what a resumed run needs to draw the very numbers that the uninterrupted one would have drawn.

Captured: Python's ``random``, NumPy's global generator, torch's CPU generator, and the generators of all CUDA
devices once CUDA is in use. Not captured: generators that the script made itself (give them to ``run.track_local()``,
or derive their seed from the step) and those inside DataLoader workers (they are replayed; see data_position.py).

A rank that starts from another rank's shard must not repeat that rank's numbers: it is reseeded from facts that
every run repeats (the shard's torch state, the step, the rank, the world size), so even a reshaped run is
deterministic.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import numpy as np
import torch

_NUMPY_SEED_MAX = 2**32  # numpy's global generator takes 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomStates:
    """The global generators of one process at one moment."""

    python_version: int  # of the format of random.getstate()
    python_words: tuple[int, ...]  # Mersenne Twister words and position
    python_gauss: float | None  # second half of a pair drawn by random.gauss(), if one is waiting
    numpy: dict[str, Any]  # numpy's own record; plain numbers, text and one array
    torch_cpu: torch.Tensor  # uint8
    torch_cuda: tuple[torch.Tensor, ...]  # uint8, one a device; empty while CUDA is not in use

    def to_state(self) -> dict[str, Any]:
        """Return plain data, as state_tree.py stores it."""
        return {
            "python_version": self.python_version,
            "python_words": torch.tensor(self.python_words, dtype=torch.int64),
            "python_gauss": self.python_gauss,
            "numpy": self.numpy,
            "torch_cpu": self.torch_cpu,
            "torch_cuda": list(self.torch_cuda),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RandomStates":
        """Return the states that :meth:`to_state` gave."""
        return cls(
            python_version=state["python_version"],
            python_words=tuple(state["python_words"].tolist()),
            python_gauss=state["python_gauss"],
            numpy=state["numpy"],
            torch_cpu=state["torch_cpu"],
            torch_cuda=tuple(state["torch_cuda"]),
        )


Generator: TypeAlias = random.Random | np.random.Generator | np.random.RandomState | torch.Generator
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class TrackedGenerator:
    """A generator that the script made, as an object that can tell its state and take it back."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        match self._generator:
            case random.Random() as generator:
                return {"random": generator.getstate()}
            case np.random.Generator() as generator:
                return {"numpy": generator.bit_generator.state}
            case np.random.RandomState() as generator:
                return {"numpy": generator.get_state(legacy=False)}
            case torch.Generator() as generator:
                return {"torch": generator.get_state()}
        assert_never(self._generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generator. Raises KeyError, TypeError or ValueError for the state of another kind."""
        match self._generator:
            case random.Random() as generator:
                generator.setstate(state["random"])
            case np.random.Generator() as generator:
                generator.bit_generator.state = state["numpy"]
            case np.random.RandomState() as generator:
                generator.set_state(state["numpy"])
            case torch.Generator() as generator:
                generator.set_state(state["torch"].cpu())
            case _:
                assert_never(self._generator)


def capture() -> RandomStates:
    """Return the present states. CUDA is never woken by this: unused generators still hold the script's seed."""
    version, words, gauss = random.getstate()
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return RandomStates(
        python_version=version,
        python_words=words,
        python_gauss=gauss,
        numpy=np.random.get_state(legacy=False),
        torch_cpu=torch.get_rng_state(),
        torch_cuda=tuple(torch.cuda.get_rng_state_all()) if in_use else (),
    )


def restore(states: RandomStates) -> None:
    """Set every generator. Devices that are no longer there are left out."""
    random.setstate((states.python_version, states.python_words, states.python_gauss))
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch_cpu.cpu())
    if states.torch_cuda and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states.torch_cuda, strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)


def reseed(saved: RandomStates, *, step: int, rank: int, world_size: int) -> None:
    """Seed every generator from what was saved and who this is: repeatable, and different on every rank."""
    digest = hashlib.sha256(saved.torch_cpu.cpu().numpy().tobytes())
    digest.update(f"{step} {rank} {world_size}".encode())
    seed = int.from_bytes(digest.digest()[:8], "big") >> 1  # torch takes a signed 64-bit number
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEED_MAX)
    torch.manual_seed(seed)
