"""Between the processor and a GPU that works behind it: tensors there and a few numbers back, without waiting.

What the processor starts on a GPU is queued, and the GPU never rests while the queue is not empty. So nothing may wait
for the end of it: tensors leave from pinned memory, and what a step says of itself (its loss, whether scores were
finite) is copied to pinned memory right behind it, and read when the next step has been started.

Pinned memory may be dropped at once: torch gives it to nobody else before the copies that use it are done. Elsewhere
than on a GPU all of this is done on the spot.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """*tensor*, which lies on the processor, on *device*."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Pending:
    """The values of a tensor as they are once the work before has been done, whatever comes to lie there later."""

    def __init__(self, values: Tensor) -> None:
        """Queue the copy of *values*, of any shape and device."""
        self._done: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.detach().clone()

    def get(self) -> Any:
        """As ``Tensor.tolist``; waits for the GPU where it has not come so far."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


class Delayed:
    """Calls that read what the GPU has yet to write, in order, each when the next one is added."""

    def __init__(self, device: torch.device) -> None:
        """For work on *device*; where that is no GPU, nothing is delayed."""
        self.behind = 1 if device.type == "cuda" else 0
        """How many of the calls that were added are still to be made."""
        self._calls: deque[Callable[[], object]] = deque()

    def add(self, call: Callable[[], object]) -> None:
        """Make the call before this one, and keep this one. Raises what a call raises, which is not made again."""
        self._calls.append(call)
        self._make_all_but(self.behind)

    def finish(self) -> None:
        """Make all calls that are left, for whoever has to know now. Raises as ``add``."""
        self._make_all_but(0)

    def _make_all_but(self, left: int) -> None:
        while len(self._calls) > left:
            self._calls.popleft()()
