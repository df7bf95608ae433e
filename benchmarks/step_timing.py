"""How a step is timed, what memory it takes, and which kernels it spends its time in.

A step's time is from its start to the start of the next: on a GPU between two CUDA events that lie in the stream, on a
processor by the clock. The wall clock over all steps, from one synchronization to the next, stands beside it.
"""

import gc
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Round:
    """One row, built, warmed up, timed and freed again."""

    times_ms: list[float]
    """Of each timed step."""
    wall_ms: float
    """Wall clock of all timed steps over their number."""
    peak_memory_bytes: int | None
    """Tensors on the GPU at their most, from the first warm-up step on; None on a processor."""
    peak_reserved_bytes: int | None
    """What torch held of the GPU's memory at its most, its cache and the memory of recorded steps included."""
    resident_bytes: int | None
    """Tensors on the GPU before this row's model was there: the batches, and what libraries hold."""
    loss: float
    trainable_parameters: int


def distribution(times: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile, in the unit of *times*."""
    p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
    return {"median": median, "p10": p10, "p90": p90}


def time_steps(
    step: Callable[[], Tensor], *, steps: int, warmup: int, device: torch.device
) -> tuple[list[float], float, tuple[int, int] | None, float]:
    """Milliseconds of each of *steps*, wall-clock milliseconds a step, peak bytes in tensors and in all, the last loss.

    *warmup* steps come before: the optimizer's state, compiled kernels, recorded steps and the allocator's blocks are
    there then. They count for the memory, because a recorded step allocates when it is recorded alone.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warmup):
        step()
    if on_gpu:
        torch.cuda.synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        events[0].record()
        for event in events[1:]:
            loss = step()
            event.record()
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - began
        times = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
        peaks = int(torch.cuda.max_memory_allocated(device)), int(torch.cuda.max_memory_reserved(device))
        return times, 1e3 * wall / steps, peaks, loss.item()
    marks = [time.perf_counter()]
    for _ in range(steps):
        loss = step()
        marks.append(time.perf_counter())
    times = [1e3 * (second - first) for first, second in itertools.pairwise(marks)]
    return times, 1e3 * (marks[-1] - marks[0]) / steps, None, loss.item()


def free(device: torch.device) -> int | None:
    """Give back what is not in use any more; bytes of tensors that stay on the GPU, None on a processor."""
    gc.collect()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated(device))


def require_finite(loss: float, name: str) -> None:
    """A step that computes NaN is not the step that was to be timed."""
    if not math.isfinite(loss):
        raise RuntimeError(f"The loss of {name} is {loss} after its timed steps, so their time says nothing.")


def profile(step: Callable[[], Tensor], *, steps: int, warmup: int, device: torch.device) -> str:
    """The 25 kernels that take longest on the GPU and the 15 operators that take longest on the processor."""
    for _ in range(warmup):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages = found.key_averages()
    parts = []
    if device.type == "cuda":
        on_gpu = (event for event in averages if event.device_type.name == "CUDA")
        kernels = [event for event in on_gpu if not event.is_user_annotation]
        kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
        total = sum(event.self_device_time_total for event in kernels)
        parts.append(f"GPU: {total / 1e3 / steps:.3f} ms a step in kernels; the longest, ms a step, calls a step:")
        parts += [
            f"{event.self_device_time_total / 1e3 / steps:10.3f} {event.count / steps:8.1f}  {event.key[:110]}"
            for event in kernels[:25]
        ]
    operators = [event for event in averages if event.device_type.name == "CPU"]
    operators.sort(key=lambda event: event.self_cpu_time_total, reverse=True)
    parts.append("CPU: the longest, ms a step by themselves, calls a step:")
    parts += [
        f"{event.self_cpu_time_total / 1e3 / steps:10.3f} {event.count / steps:8.1f}  {event.key[:110]}"
        for event in operators[:15]
    ]
    return "\n".join(parts)
