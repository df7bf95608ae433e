"""NVIDIA's CUDA runtime through cuda-python, without torch: memory, one stream, and graphs of what was queued on it.

Importing this module touches no GPU; Cuda() does.
"""

import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pst.errors import EngineError
from serve.engines import Array

MISSING = "cuda-bindings is not installed; install it with: pip install cuda-bindings (of your driver's CUDA version)."
NO_DEVICE = "No NVIDIA GPU can be used here ({reason}); check the driver with nvidia-smi, or choose another --engine."
TOO_OLD = (
    "The NVIDIA driver is missing, or older than cuda-bindings wants; check it with nvidia-smi, and install the "
    "cuda-bindings of the CUDA version that this shows: pip install 'cuda-bindings==12.*', or 13."
)
ALIGNMENT = 256
"""Bytes: what TensorRT wants of an address."""
_TO_DEVICE, _TO_HOST, _NON_BLOCKING, _THREAD_LOCAL = 1, 2, 1, 1


def load_bindings() -> Any:
    """cuda.bindings.runtime, or cuda.cudart of cuda-python before 12.6. Raises EngineError."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EngineError(MISSING)


class Cuda:
    """The first GPU and one stream on it.

    What queues, copies or allocates raises EngineError where CUDA refuses. What frees does not: after a fault CUDA
    refuses everything, and the first error is the one to tell.
    """

    def __init__(self) -> None:
        """Raise EngineError where cuda-bindings is missing, or there is no GPU that it can use."""
        self._runtime = runtime = load_bindings()
        error, count = runtime.cudaGetDeviceCount()
        if _words(error) == "cudaErrorInsufficientDriver":
            raise EngineError(TOO_OLD)
        if int(error) or not count:
            raise EngineError(NO_DEVICE.format(reason=_words(error) if int(error) else "CUDA finds none"))
        self._copy = runtime.cudaMemcpyAsync
        self._in, self._out = runtime.cudaMemcpyKind(_TO_DEVICE), runtime.cudaMemcpyKind(_TO_HOST)
        self._stream = self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        self.stream = int(self._stream)
        """Its handle, as TensorRT takes it."""

    def allocate(self, size: int) -> int:
        """The address of *size* bytes on the GPU."""
        return int(self._call("cudaMalloc", size))

    def allocate_host(self, size: int) -> int:
        """The address of *size* bytes of pinned host memory, from which copies need no detour."""
        return int(self._call("cudaHostAlloc", size, 0))

    def free(self, address: int) -> None:
        """Of allocate."""
        self._runtime.cudaFree(address)

    def free_host(self, address: int) -> None:
        """Of allocate_host."""
        self._runtime.cudaFreeHost(address)

    def to_device(self, device: int, host: int, size: int) -> None:
        """Queue a copy of *size* bytes."""
        self._check(self._copy(device, host, size, self._in, self._stream), "cudaMemcpyAsync")

    def to_host(self, host: int, device: int, size: int) -> None:
        """Queue a copy of *size* bytes."""
        self._check(self._copy(host, device, size, self._out, self._stream), "cudaMemcpyAsync")

    def rows_to_host(self, host: int, device: int, *, size: int, pitch: int, rows: int) -> None:
        """Queue a copy of *rows* pieces of *size* bytes, which lie *pitch* bytes apart on the GPU and together here."""
        self._check(
            self._runtime.cudaMemcpy2DAsync(host, size, device, pitch, size, rows, self._out, self._stream),
            "cudaMemcpy2DAsync",
        )

    def write(self, device: int, array: Array) -> None:
        """Copy a contiguous array to the GPU, now."""
        if array.nbytes:
            self.to_device(device, array.ctypes.data, array.nbytes)
            self.synchronize()

    def read(self, device: int, shape: tuple[int, ...], dtype: str) -> Array:
        """A new array of what lies on the GPU."""
        array: Array = np.empty(shape, dtype)
        if array.nbytes:
            self.to_host(array.ctypes.data, device, array.nbytes)
            self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for everything that was queued."""
        self._check(self._runtime.cudaStreamSynchronize(self._stream), "cudaStreamSynchronize")

    def capture(self, queue: Callable[[], None]) -> Any:
        """What *queue* queues, as a graph that can be launched; None where it cannot be captured. Nothing runs."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode(_THREAD_LOCAL)
        if int(runtime.cudaStreamBeginCapture(self._stream, mode)[0]):
            return None
        try:
            queue()
            failed = False
        except EngineError:
            failed = True
        error, graph = runtime.cudaStreamEndCapture(self._stream)
        if failed or int(error):
            runtime.cudaGetLastError()  # otherwise the next call reports it
            return None
        try:
            error, ready = runtime.cudaGraphInstantiate(graph, 0)
        except (TypeError, ValueError):  # CUDA 11 takes other arguments
            error, ready = 1, None
        runtime.cudaGraphDestroy(graph)
        if int(error):
            runtime.cudaGetLastError()
            return None
        return ready

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self._check(self._runtime.cudaGraphLaunch(graph, self._stream), "cudaGraphLaunch")

    def drop(self, graph: Any) -> None:
        """Free a captured graph."""
        self._runtime.cudaGraphExecDestroy(graph)

    def close(self) -> None:
        """Free the stream; the last call."""
        self._runtime.cudaStreamDestroy(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        result = getattr(self._runtime, name)(*arguments)
        self._check(result, name)
        return result[1] if len(result) > 1 else None

    def _check(self, result: Any, name: str) -> None:
        if int(result[0]):
            raise EngineError(
                f"CUDA fails in {name} ({_words(result[0])}); if it is short of memory, give smaller batches or close "
                "what else uses the GPU."
            )


def _words(error: Any) -> str:
    """cudaErrorMemoryAllocation as it is."""
    return str(getattr(error, "name", error))


Sizes = Sequence[tuple[tuple[int, ...], str]]
"""Shapes and types of arrays."""


def layout(arrays: Sizes) -> tuple[list[int], int]:
    """Offsets of arrays side by side, and the bytes of all; an empty one has an address of its own as well."""
    offsets, end = [], 0
    for shape, dtype in arrays:
        offsets.append(end)
        end += max(1, -(-_bytes(shape, dtype) // ALIGNMENT)) * ALIGNMENT
    return offsets, end


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


class Buffer:
    """Memory on the GPU and its twin in pinned host memory, for several arrays side by side; both grow and are kept.

    One copy then serves all of them.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device = self._host = self._size = self._used = 0
        self._bytes: Array = np.empty(0, np.uint8)

    def place(self, arrays: Sizes) -> tuple[list[int], list[Array]]:
        """Make room for arrays of these shapes and types: their addresses on the GPU, and their views on the host.

        Both are valid until the next call.
        """
        offsets, end = layout(arrays)
        if end > self._size:
            self.close()
            self._device, self._host, self._size = self._cuda.allocate(end), self._cuda.allocate_host(end), end
            self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * end).from_address(self._host))
        self._used = end
        views = [
            self._bytes[offset : offset + _bytes(shape, dtype)].view(dtype).reshape(shape)
            for offset, (shape, dtype) in zip(offsets, arrays, strict=True)
        ]
        return [self._device + offset for offset in offsets], views

    def to_device(self) -> None:
        """Queue a copy of all arrays."""
        self._cuda.to_device(self._device, self._host, self._used)

    @property
    def host(self) -> int:
        """The host's address of the first array."""
        return self._host

    def to_host(self) -> None:
        """Queue a copy of all arrays."""
        self._cuda.to_host(self._host, self._device, self._used)

    def close(self) -> None:
        """Free both."""
        if self._host:
            self._cuda.free_host(self._host)
        if self._device:
            self._cuda.free(self._device)
        self._device = self._host = self._size = self._used = 0
