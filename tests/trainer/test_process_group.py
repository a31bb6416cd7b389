"""Leaving the process group: gloo's threads are at rest before the interpreter may end."""

import pytest

from dtrain.trainer import process_group


def test_leaving_waits_until_every_gloo_thread_slept_through_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        {"7": ("S", "1", "0"), "8": ("S", "4", "0")},
        {"7": ("S", "2", "0"), "8": ("S", "4", "0")},  # it worked meanwhile
        {"7": ("R", "2", "0"), "8": ("S", "4", "0")},  # it works
        {"7": ("R", "2", "0"), "8": ("S", "4", "0")},  # ready, and not let run
        {"7": ("S", "3", "0"), "8": ("S", "4", "0")},
        {"7": ("S", "3", "0"), "8": ("S", "4", "0")},
    ]
    looks = iter(seen)
    monkeypatch.setattr(process_group, "_gloo_threads", lambda: next(looks))
    process_group._wait_until_gloo_rests()
    assert next(looks, None) is None


def test_without_gloo_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([{}])
    monkeypatch.setattr(process_group, "_gloo_threads", lambda: next(looks))
    process_group._wait_until_gloo_rests()


def test_gloo_threads_are_found_by_the_name_that_torch_gives_them() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1))
        assert process_group._gloo_threads()
    finally:
        dist.destroy_process_group()
