"""Training steps as CUDA graphs: recorded once for each shape of batch, then started as one thing.

A step of a small model is a thousand kernels of some microseconds, and a GPU waits for the processor to start them. A
graph holds them all, with the addresses that they had: parameters, masks and the optimizer's state have to stay where
they are, and learning rates have to be tensors. What a step reads from the outside goes into fixed tensors first.

Shapes are few because batches are padded to multiples of MULTIPLE tokens. A shape is recorded when it comes for the
third time, since the first times compile and allocate what a recording must find ready. A step that cannot be recorded,
because it waits for the GPU somewhere, runs as before.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from pst.progress import note

MULTIPLE = 16
"""Tokens that a batch is padded to a multiple of."""
SEEN = 2
"""How often a shape runs as it is before it is recorded."""
MOST = 32
"""Graphs that are kept; other shapes run as they are."""

Step = Callable[[dict[str, Tensor]], Tensor]
_Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


def padded_length(longest: int, most: int) -> int:
    """Tokens of a batch whose longest row has *longest*, for a model that takes *most*."""
    return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, most))


class RecordedSteps:
    """Calls *step* on a batch, by its graph where it has one. For steps that do not depend on Python values."""

    def __init__(self, step: Step) -> None:
        """*step* takes a batch on the GPU, trains, and returns a tensor that says how it went."""
        self.step = step
        self.seen: Counter[_Shape] = Counter()
        self.graphs: dict[_Shape, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.refused = False
        """Whether a recording has failed, so that none is tried again."""

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """What *step* returns; it may be overwritten by the next call."""
        shape = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        if shape not in self.graphs:
            self.seen[shape] += 1
            if self.refused or self.seen[shape] <= SEEN or len(self.graphs) >= MOST or not self._record(shape, batch):
                return self.step(batch)
        graph, inputs, result = self.graphs[shape]
        for name, value in batch.items():
            inputs[name].copy_(value, non_blocking=True)
        graph.replay()
        return result

    def _record(self, shape: _Shape, batch: dict[str, Tensor]) -> bool:
        """Record the step on a batch of this shape, without running it. Whether that was possible."""
        inputs = {name: torch.empty_like(value) for name, value in batch.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                result = self.step(inputs)
        except RuntimeError as error:
            self.refused = True
            torch.cuda.synchronize()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # a recording that fails leaves the random generator in it
                torch.zeros(1, device="cuda")
            note(f"Steps run without CUDA graphs, which this model does not allow ({str(error).splitlines()[0]}).")
            return False
        self.graphs[shape] = (graph, inputs, result)
        return True
