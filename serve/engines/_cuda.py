"""NVIDIA's CUDA runtime through cuda-python, without torch: memory, one stream, and graphs of what was queued on it.

Importing this module touches no GPU; Cuda() does.
"""

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pst.errors import EngineError
from serve.engines import Array

MISSING = "cuda-bindings is not installed; install it with: pip install cuda-bindings (of your driver's CUDA version)."
NO_DEVICE = "No NVIDIA GPU can be used here ({reason}); check the driver with nvidia-smi, or choose another --engine."
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
    """The first GPU and one stream on it. Every method raises EngineError where CUDA refuses, but for capture."""

    def __init__(self) -> None:
        """Raise EngineError where cuda-bindings is missing, or there is no GPU that it can use."""
        self._runtime = runtime = load_bindings()
        error, count = runtime.cudaGetDeviceCount()
        if int(error) or not count:
            raise EngineError(NO_DEVICE.format(reason=_words(error) if int(error) else "CUDA finds none"))
        self._copy, self._kind = runtime.cudaMemcpyAsync, runtime.cudaMemcpyKind
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
        self._call("cudaFree", address)

    def free_host(self, address: int) -> None:
        """Of allocate_host."""
        self._call("cudaFreeHost", address)

    def to_device(self, device: int, host: int, size: int) -> None:
        """Queue a copy of *size* bytes."""
        self._check(self._copy(device, host, size, self._kind(_TO_DEVICE), self._stream), "cudaMemcpyAsync")

    def to_host(self, host: int, device: int, size: int) -> None:
        """Queue a copy of *size* bytes."""
        self._check(self._copy(host, device, size, self._kind(_TO_HOST), self._stream), "cudaMemcpyAsync")

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
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free the stream; the last call."""
        self._call("cudaStreamDestroy", self._stream)

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


class Buffer:
    """One tensor's place on the GPU, and its twin in pinned host memory; both grow and are kept.

    ``device`` is an address that changes when reserve says so.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.device = self.host = self.size = 0
        self._bytes: Array = np.empty(0, np.uint8)

    def reserve(self, size: int) -> bool:
        """Make room for *size* bytes; whether that moved it."""
        if size <= self.size:
            return False
        self.close()
        size = -(-size // 256) * 256
        self.device = self._cuda.allocate(size)
        self.host = self._cuda.allocate_host(size)
        self.size = size
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.host))
        return True

    def view(self, shape: tuple[int, ...], dtype: str) -> Array:
        """The host memory as an array; valid until the buffer moves."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self._bytes[:size].view(dtype).reshape(shape)

    def close(self) -> None:
        """Free both."""
        if self.host:
            self._cuda.free_host(self.host)
        if self.device:
            self._cuda.free(self.device)
        self.device = self.host = self.size = 0
