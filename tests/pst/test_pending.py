"""What is read later: its values are those of then, its order is kept, and an error comes once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pst.pending import Delayed, Pending, moved

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU is behind the processor")


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_values_are_those_of_the_time_when_they_were_asked_for(device: torch.device) -> None:
    values = torch.tensor([1.5, float("inf")], device=device, requires_grad=True)
    pending = Pending(values)
    with torch.no_grad():
        values.zero_()
    assert pending.get() == pending.get() == [1.5, float("inf")]
    assert Pending(torch.tensor(3, device=device)).get() == 3
    assert Pending(torch.zeros(0, dtype=torch.int32, device=device)).get() == []


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_tensor_may_change_once_it_is_moved(device: torch.device) -> None:
    values = torch.arange(6).view(2, 3).T
    found = moved(values, device)
    assert found.device.type == device.type
    if device.type == "cuda":
        values.zero_()
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


def _sent(value: int) -> Pending:
    return Pending(moved(torch.full((1000,), value), torch.device("cuda")).add_(1))


@on_gpu
def test_many_values_under_way_are_kept_apart() -> None:
    """Pinned memory is dropped and taken again while the GPU has yet to read or write it."""
    gpu: Any = torch.cuda
    gpu._sleep(200_000_000)
    pending = [_sent(value) for value in range(200)]
    assert [one.get() for one in pending] == [[value + 1] * 1000 for value in range(200)]


@on_gpu
def test_asking_does_not_wait() -> None:
    gpu: Any = torch.cuda
    slept = gpu.Event()
    for _ in range(3):  # what is loaded and allocated at first may wait
        _sent(1).get()
    gpu._sleep(2_000_000_000)
    slept.record()
    pending = _sent(2)
    assert not slept.query()
    assert pending.get()[0] == 3
    assert slept.query()


def _noted(calls: list[int], number: int) -> Callable[[], None]:
    return lambda: calls.append(number)


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_calls_are_made_in_order_so_many_behind(behind: int) -> None:
    delayed, calls = Delayed(CPU), list[int]()
    delayed.behind = behind
    for number in range(5):
        delayed.add(_noted(calls, number))
        assert calls == list(range(number + 1 - behind))
    delayed.finish()
    delayed.finish()
    assert calls == list(range(5))


def test_an_error_ends_the_calls_and_comes_once() -> None:
    delayed, calls = Delayed(CPU), list[int]()
    delayed.behind = 1

    def fail() -> None:
        raise ValueError("not finite")

    delayed.add(fail)
    with pytest.raises(ValueError, match="not finite"):
        delayed.add(_noted(calls, 1))
    assert calls == []
    delayed.finish()
    assert calls == [1]


def test_only_a_gpu_is_behind() -> None:
    assert Delayed(CPU).behind == 0
    assert Delayed(torch.device("cuda", 0)).behind == 1
