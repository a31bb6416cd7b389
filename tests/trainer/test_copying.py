"""Tensors copied to where they belong: every kind, every size, with any number of threads, bit for bit."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from dtrain.storage.tensor_codes import size_bytes
from dtrain.trainer import copying
from dtrain.trainer.copying import PIECE_BYTES, THREAD_MIN_BYTES, Copier, copy_tensors

GUARD = 0xA5


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
def copier(threads: int) -> Iterator[Copier]:
    it = Copier(threads)
    it.warm_up()
    yield it
    it.close()


def copied(copier: Copier, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Copy ``tensors`` side by side into guarded memory; return the bytes of each."""
    starts: dict[str, int] = {}
    position = 64
    for name, tensor in tensors.items():
        starts[name] = position
        position += size_bytes(tensor) + -size_bytes(tensor) % 8
    memory = bytearray([GUARD]) * (position + 64)
    copy_tensors(copier, tensors, starts, memoryview(memory), pinned=False)
    assert set(memory[:64]) == set(memory[position:]) == {GUARD}, "written beyond its place"
    return {name: bytes(memory[at : at + size_bytes(tensors[name])]) for name, at in starts.items()}


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return bytes(plain.flatten().view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def test_many_small_and_a_few_large_tensors_arrive_with_their_bits(threads: int, copier: Copier) -> None:
    generator = torch.Generator().manual_seed(threads)
    tensors = {f"small{n}": torch.rand(n % 97, generator=generator) for n in range(500)}
    tensors["large"] = torch.rand(3 * PIECE_BYTES // 4 + 7, generator=generator)
    tensors["larger"] = torch.rand(THREAD_MIN_BYTES * 3 + 1, generator=generator)
    for _ in range(2):  # the second time with the threads of the first
        assert copied(copier, tensors) == {name: raw(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.int64]
)
def test_every_type_arrives_with_its_bits(dtype: torch.dtype, copier: Copier) -> None:
    tensor = (torch.arange(1000) % 3).to(dtype)
    assert copied(copier, {"a": tensor, "scalar": tensor[5]}) == {"a": raw(tensor), "scalar": raw(tensor[5])}


def test_what_is_not_dense_arrives_dense(copier: Copier) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": whole.t(),
        "strided": whole[:, ::2],
        "broadcast": torch.ones(1).expand(5),
        "offset": whole[2:],
        "channels last": torch.arange(120.0).reshape(1, 2, 3, 20).to(memory_format=torch.channels_last),
        "conjugate": torch.complex(whole, whole + 1).conj(),
        "negative": torch.complex(whole, whole + 1).conj().imag,
        "empty": torch.empty(0, 3),
    }
    assert copied(copier, tensors) == {name: raw(tensor) for name, tensor in tensors.items()}


def test_a_parameter_that_needs_a_gradient_is_copied_without_one(copier: Copier) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert copied(copier, {"p": parameter, "t": parameter.t()}) == {
        "p": raw(parameter.detach()),
        "t": raw(parameter.detach().t()),
    }


class PlayedGpu:
    """The streams of a GPU: copies are begun in order, and their bytes arrive when an event is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.orders: list[tuple[str, ...]] = []  # what each stream was told
        self.current = "training"
        self.late: list[Callable[[], None]] = []
        gpu = self

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: "Stream") -> None:
                gpu.orders.append((self.name, "waits for", other.name))

            def wait_event(self, event: object) -> None:
                gpu.orders.append((self.name, "waits for the copies"))

        class Event:
            def __init__(self, blocking: bool) -> None: ...

            def record(self, stream: Stream) -> None: ...

            def synchronize(self) -> None:
                for arrive in gpu.late:
                    arrive()

        @contextlib.contextmanager
        def within(stream: Stream) -> Iterator[None]:
            gpu.current = stream.name
            yield
            gpu.current = "training"

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(gpu.current))
        monkeypatch.setattr(torch.cuda, "stream", within)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        view = copying._view
        monkeypatch.setattr(copying, "_view", lambda *where: PlayedTarget(gpu, view(*where)))


class PlayedTarget:
    """A tensor in pinned memory: a copy into it does what torch's copy from a GPU does."""

    def __init__(self, gpu: PlayedGpu, target: torch.Tensor) -> None:
        self._gpu, self._target = gpu, target

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self._gpu.orders.append((self._gpu.current, "copies"))
        stored = source
        if source.is_neg():
            stored = torch._neg_view(stored)  # the bits in memory
        if source.is_conj():
            stored = stored.conj()
            self._target.conj_physical_()  # torch: at once, on the CPU, whatever is there
        if source.is_neg():
            self._target.neg_()

        def arrive() -> None:
            self._target.copy_(stored)

        self._gpu.late.append(arrive)


def test_a_lazy_view_on_a_gpu_arrives_as_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": whole,
        "conjugate": torch.complex(whole, whole + 1).conj(),
        "negative": torch.complex(whole, whole + 1).conj().imag,
    }
    starts = {"plain": 0, "conjugate": 128, "negative": 512}
    memory = bytearray(1024)
    gpu = PlayedGpu(monkeypatch)
    copying._begin_from_gpus(tensors, starts, memoryview(memory), pinned=True).wait()
    for name, tensor in tensors.items():
        assert bytes(memory[starts[name] : starts[name] + size_bytes(tensor)]) == raw(tensor), name
    assert gpu.orders == [
        ("copying", "waits for", "training"),
        *[("copying", "copies")] * len(tensors),
        ("training", "waits for the copies"),
    ], "what is copied is this step's, and no later step writes it"
