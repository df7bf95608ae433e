"""One optimization profile of a plan, ready to run: a context, its buffers, and a CUDA graph once a shape repeats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.manifest import TensorInfo
from pst.errors import EngineError
from serve.engines import Array
from serve.engines._cuda import Buffer, Cuda

REPEATS = 3
"""Inferences of one shape, one after the other, before what they queue is captured as a graph. The first of a shape
also sets up what must not be captured; a decoder's shapes change with every token, so that none of them is captured."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of the plan."""

    name: str
    dtype: str
    """numpy's name of the plan's type, which may be narrower than the graph's: int32 for int64 in TensorRT 8.6."""
    outside: str
    """Of the arrays that callers give and get."""


class Lane:
    """Runs one profile. Its context serves no other: a captured graph lasts as long as its context is not changed.

    *context* is new and has no profile yet.
    """

    def __init__(
        self, cuda: Cuda, context: Any, *, profile: int, inputs: Sequence[Port], outputs: Sequence[Port],
        failure: Callable[[str], EngineError], graphs: bool = True,
    ) -> None:  # fmt: skip
        self._cuda, self._context, self._failure = cuda, context, failure
        self._inputs, self._outputs = inputs, outputs
        self._buffers = {port.name: Buffer(cuda) for port in (*inputs, *outputs)}
        self._views: dict[str, Array] = {}
        self._key: tuple[tuple[int, ...], ...] = ()
        self._graph: Any = None
        self._count, self._graphs = 0, graphs
        try:
            done = context.set_optimization_profile_async(profile, cuda.stream)
        except RuntimeError as error:
            raise failure("cannot switch to its profile") from error
        if not done:
            raise failure("cannot switch to its profile")
        cuda.synchronize()

    @property
    def context(self) -> Any:
        """TensorRT's."""
        return self._context

    @property
    def is_captured(self) -> bool:
        """Whether the next inference of this shape launches a graph."""
        return self._graph is not None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """New arrays by name. The feeds fit the profile."""
        key = tuple(feeds[port.name].shape for port in self._inputs)
        if key != self._key:
            self._reshape(key)
        for port in self._inputs:
            np.copyto(self._views[port.name], feeds[port.name], casting="same_kind")
        if self._graphs and self._graph is None and self._count >= REPEATS:
            self._graph = self._cuda.capture(self._queue)
            self._graphs = self._graph is not None  # it is not tried again
        if self._graph is not None:
            self._cuda.launch(self._graph)
        else:
            self._queue()
            self._count += 1
        self._cuda.synchronize()
        return {port.name: self._views[port.name].astype(port.outside) for port in self._outputs}

    def close(self) -> None:
        """Free everything but the engine's own memory."""
        self._forget_graph()
        self._context = None
        self._views = {}
        for buffer in self._buffers.values():
            buffer.close()

    def _reshape(self, key: tuple[tuple[int, ...], ...]) -> None:
        self._key, self._count = (), 0  # until all of this has succeeded
        self._forget_graph()
        for port, shape in zip(self._inputs, key, strict=True):
            if not self._context.set_input_shape(port.name, shape):
                raise self._failure(f"does not take the shape {shape} for {port.name}")
            self._place(port, shape)
        for port in self._outputs:
            shape = tuple(self._context.get_tensor_shape(port.name))
            if min(shape, default=1) < 0:
                raise self._failure(f"does not tell the shape of {port.name} before it has run")
            self._place(port, shape)
        self._key = key

    def _place(self, port: Port, shape: tuple[int, ...]) -> None:
        buffer = self._buffers[port.name]
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(port.dtype).itemsize
        buffer.reserve(max(size, 1))  # an empty cache has an address as well
        self._views[port.name] = buffer.view(shape, port.dtype)
        if not self._context.set_tensor_address(port.name, buffer.device):
            raise self._failure(f"does not take an address for {port.name}")

    def _queue(self) -> None:
        """Copies in, the model, copies out."""
        for port in self._inputs:
            buffer, view = self._buffers[port.name], self._views[port.name]
            if view.nbytes:
                self._cuda.to_device(buffer.device, buffer.host, view.nbytes)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure("fails to run the model")
        for port in self._outputs:
            buffer, view = self._buffers[port.name], self._views[port.name]
            if view.nbytes:
                self._cuda.to_host(buffer.host, buffer.device, view.nbytes)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._cuda.drop(self._graph)
            self._graph = None


def fits(bounds: Mapping[str, tuple[tuple[int, ...], ...]], feeds: Mapping[str, Array]) -> bool:
    """Whether all feeds lie within a profile's *bounds*: by input, the smallest, usual and largest shape."""
    return all(
        low <= length <= high
        for name, (smallest, _, largest) in bounds.items()
        for low, length, high in zip(smallest, feeds[name].shape, largest, strict=True)
    )


def width(bounds: Mapping[str, tuple[tuple[int, ...], ...]]) -> int:
    """How many different shapes a profile takes, roughly: the narrowest that fits is chosen."""
    return sum(
        high - low for smallest, _, largest in bounds.values() for low, high in zip(smallest, largest, strict=True)
    )


def bounds_of(inputs: Sequence[TensorInfo], profile: Any) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By input, the three shapes of a profile."""
    return {tensor.name: profile.shapes(tensor) for tensor in inputs}
