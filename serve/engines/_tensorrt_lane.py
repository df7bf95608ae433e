"""One optimization profile of a plan, ready to run: a context, its buffers, and a CUDA graph once a shape repeats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.manifest import TensorInfo
from export.targets.tensorrt import Profile
from pst.errors import EngineError
from serve.engines import Array
from serve.engines._cuda import Buffer, Cuda

REPEATS = 3
"""Inferences of one shape, one after the other, before what they queue is captured as a graph. The first of a shape
also sets up what must not be captured; a decoder's shapes change with every token, so that none of them is captured."""


Bounds = Mapping[str, tuple[tuple[int, ...], ...]]
"""Of a profile: by input, the smallest, usual and largest shape."""


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
        self._before, self._after = Buffer(cuda), Buffer(cuda)
        self._given: list[Array] = []
        self._made: list[Array] = []
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

    def run(self, key: tuple[tuple[int, ...], ...], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """New arrays by name. The feeds fit the profile; *key* is their shapes, in the order of the inputs."""
        if key != self._key:
            self._reshape(key)
        for port, view in zip(self._inputs, self._given, strict=True):
            np.copyto(view, feeds[port.name], casting="same_kind")
        if self._graphs and self._graph is None and self._count >= REPEATS:
            self._graph = self._cuda.capture(self._queue)
            self._graphs = self._graph is not None  # it is not tried again
        if self._graph is not None:
            self._cuda.launch(self._graph)
        else:
            self._queue()
            self._count += 1
        self._cuda.synchronize()
        return {port.name: view.astype(port.outside) for port, view in zip(self._outputs, self._made, strict=True)}

    def shape(self, feeds: Mapping[str, Array], past: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Prepare for feeds that come with a past of these shapes: the outputs' shapes, by name."""
        shapes = self._set_shapes([past.get(port.name) or feeds[port.name].shape for port in self._inputs])
        return dict(zip((port.name for port in self._outputs), shapes, strict=True))

    def extend(
        self, feeds: Mapping[str, Array], addresses: Mapping[str, int], scores: tuple[int, ...], *, name: str = "logits"
    ) -> Array:
        """After shape: run *feeds*, with what stays on the GPU at *addresses*, by input or output.

        Of the output *name*, (rows, tokens, vocabulary) as *scores* says, the last token's, (rows, vocabulary).
        """
        for each, address in addresses.items():
            self._set_address(each, address)
        ports = [port for port in self._inputs if port.name in feeds]
        views = self._place(self._before, ports, [feeds[port.name].shape for port in ports])
        for port, view in zip(ports, views, strict=True):
            np.copyto(view, feeds[port.name], casting="same_kind")
        port = next(port for port in self._outputs if port.name == name)
        rows, tokens, vocabulary = scores
        size = vocabulary * np.dtype(port.dtype).itemsize
        _, (last,) = self._after.place([((rows, vocabulary), port.dtype)])
        self._before.to_device()
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure("fails to run the model")
        start = addresses[name] + (tokens - 1) * size
        self._cuda.rows_to_host(self._after.host, start, size=size, pitch=tokens * size, rows=rows)
        self._cuda.synchronize()
        return last.astype(port.outside)

    def close(self) -> None:
        """Free everything but the engine's own memory."""
        self._forget_graph()
        self._context = None
        self._given, self._made = [], []
        self._before.close()
        self._after.close()

    def _reshape(self, key: tuple[tuple[int, ...], ...]) -> None:
        shapes = self._set_shapes(key)
        self._given = self._place(self._before, self._inputs, key)
        self._made = self._place(self._after, self._outputs, shapes)
        self._key = key

    def _set_shapes(self, key: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those of the outputs, from those of the inputs; whatever was placed and captured is void."""
        self._key, self._count = (), 0
        self._forget_graph()
        for port, shape in zip(self._inputs, key, strict=True):
            if not self._context.set_input_shape(port.name, shape):
                raise self._failure(f"does not take the shape {shape} for {port.name}")
        shapes = [tuple(self._context.get_tensor_shape(port.name)) for port in self._outputs]
        if any(length < 0 for shape in shapes for length in shape):
            raise self._failure("does not tell the shapes of its outputs before it has run")
        return shapes

    def _place(self, buffer: Buffer, ports: Sequence[Port], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        addresses, views = buffer.place([(shape, port.dtype) for port, shape in zip(ports, shapes, strict=True)])
        for port, address in zip(ports, addresses, strict=True):
            self._set_address(port.name, address)
        return views

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._failure(f"does not take an address for {name}")

    def _queue(self) -> None:
        """Copy all inputs in, run the model, copy all outputs out."""
        self._before.to_device()
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure("fails to run the model")
        self._after.to_host()

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._cuda.drop(self._graph)
            self._graph = None


def fits(bounds: Bounds, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes of all inputs lie within a profile's."""
    return all(
        low <= length <= high
        for name, (smallest, _, largest) in bounds.items()
        for low, length, high in zip(smallest, shapes[name], largest, strict=True)
    )


def width(bounds: Bounds) -> int:
    """How many different shapes a profile takes, roughly: the narrowest that fits is chosen."""
    return sum(
        high - low for smallest, _, largest in bounds.values() for low, high in zip(smallest, largest, strict=True)
    )


def bounds_of(inputs: Sequence[TensorInfo], profile: Profile) -> Bounds:
    """Those of *profile*."""
    return {tensor.name: profile.shapes(tensor) for tensor in inputs}
