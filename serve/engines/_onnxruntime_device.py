"""An inference session whose inputs and outputs stay on its device, and that replays CUDA graphs.

    session = DeviceSession(open_session, device="cuda", outputs=specs, graphs=True)
    outputs = session.run(feeds)

Each shape has its own buffers on the device, which are written to and read from again (I/O binding): nothing is
allocated once a shape is known. A shape that comes a second time, or that was announced, is recorded as a CUDA graph,
which takes the launch of a few hundred kernels out of every later inference. ONNX Runtime wants fixed addresses for
that, and every node on the device but those that compute shapes; where it refuses, inference goes on without.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pst.progress import note
from serve.engines import Array, TensorSpec
from serve.engines._sizes import shape_of, sizes_of

KEPT = 32
"""Shapes whose buffers are kept, and shapes that may become a CUDA graph: ONNX Runtime never gives one up again."""
_GRAPH_ID, _NO_GRAPH = "gpu_graph_id", "-1"

Key = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """Buffers of one shape."""

    inputs: Mapping[str, Any]
    binding: Any
    options: Any
    """onnxruntime.RunOptions, which name the CUDA graph."""


class DeviceSession:
    """A session with buffers on a device. Several threads may call it, one after the other gets its turn."""

    def __init__(
        self,
        runtime: Any,
        open_session: Callable[[bool], Any],
        *,
        device: str,
        outputs: Mapping[str, TensorSpec],
        inputs: Mapping[str, TensorSpec],
        graphs: bool,
        shapes: Sequence[tuple[int, int]] = (),
        constant: Collection[str] = (),
    ) -> None:
        """*open_session* gets whether the session shall record CUDA graphs, *device* is cuda or cpu.

        *shapes*: (batch, tokens) that are recorded when they come for the first time.
        *constant*: inputs of which one shape has always the same numbers, so that they are copied once.
        """
        self._runtime, self._open, self._device = runtime, open_session, device
        self._inputs, self._outputs, self._shapes = inputs, outputs, set(shapes)
        self._constant = frozenset(constant)
        self._lock = threading.Lock()
        self._bound: OrderedDict[Key, _Bound] = OrderedDict()
        self._seen: set[Key] = set()
        self._recorded: dict[Key, _Bound] = {}
        self.graphs = graphs
        self.session = self._opened()

    def _opened(self) -> Any:
        if self.graphs:
            try:
                return self._open(True)
            except Exception as error:  # the runtime's exceptions have no common base but this
                self._refused(error)
        return self._open(False)

    def _refused(self, error: Exception) -> None:
        self.graphs = False
        said = str(error).strip().splitlines()[0].rpartition(" : ")[2]
        note(f"ONNX Runtime records no CUDA graph of this model, which costs time at small batches: {said}")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, as arrays of the caller's. *feeds* fit (serve.engines.check_feeds)."""
        key: Key = tuple((name, feeds[name].shape) for name in self._inputs)
        with self._lock:
            bound = self._recorded.get(key) or self._buffers(key, feeds)
            try:
                return self._run(bound, feeds)
            except Exception as error:  # the runtime's exceptions have no common base but this
                if key not in self._recorded:
                    raise
                self._refused(error)
            self._forget()
            self.session = self._opened()
            return self._run(self._buffers(key, feeds), feeds)

    def _run(self, bound: _Bound, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for name, buffer in bound.inputs.items():
            if name not in self._constant:
                buffer.update_inplace(np.ascontiguousarray(feeds[name]))
        bound.binding.synchronize_inputs()
        self.session.run_with_iobinding(bound.binding, bound.options)
        values = bound.binding.get_outputs()
        arrays = (value.numpy() for value in values)  # on the CPU these are the buffers themselves
        return {name: np.array(array) for name, array in zip(self._outputs, arrays, strict=True)}

    def _buffers(self, key: Key, feeds: Mapping[str, Array]) -> _Bound:
        """Those of *key*: kept ones, new ones, or new ones that a CUDA graph is going to hold on to."""
        announced = next(iter(dict(key).values()), ()) in self._shapes
        sizes = sizes_of(self._inputs, dict(key))
        known = all(shape_of(spec, sizes) is not None for spec in self._outputs.values())
        if self.graphs and known and (key in self._seen or announced) and len(self._recorded) < KEPT:
            self._bound.pop(key, None)
            self._recorded[key] = self._bind(feeds, graph=str(len(self._recorded)))
            return self._recorded[key]
        self._seen.add(key)
        if key not in self._bound:
            self._bound[key] = self._bind(feeds, graph=_NO_GRAPH)
            if len(self._bound) > KEPT:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _bind(self, feeds: Mapping[str, Array], *, graph: str) -> _Bound:
        values = self._runtime.OrtValue
        binding, inputs = self.session.io_binding(), {}
        sizes = sizes_of(self._inputs, {name: feeds[name].shape for name in self._inputs})
        for name in self._inputs:
            # A copy: on the CPU the value would share the caller's memory, and be written to later.
            inputs[name] = values.ortvalue_from_numpy(np.array(feeds[name], order="C"), self._device, 0)
            binding.bind_ortvalue_input(name, inputs[name])
        for name, spec in self._outputs.items():
            shape = shape_of(spec, sizes)
            if shape is None:
                binding.bind_output(name, self._device)
            else:
                buffer = values.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype).type, self._device, 0)
                binding.bind_ortvalue_output(name, buffer)
        options = self._runtime.RunOptions()
        options.log_severity_level = 4
        if self.graphs:
            options.add_run_config_entry(_GRAPH_ID, graph)
        return _Bound(inputs=inputs, binding=binding, options=options)

    def _forget(self) -> None:
        self._bound.clear()
        self._recorded.clear()
        self._seen.clear()

    def close(self) -> None:
        """Give up buffers and session."""
        with self._lock:
            self._forget()
            self.session = None
