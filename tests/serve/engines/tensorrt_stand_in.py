"""What stands for a GPU and for TensorRT versions that need one: memory, a stream and plans that behave.

Device memory is memory that the engine must not read; what is queued on the stream runs when it is waited for; what is
queued while a graph is captured runs when the graph is launched, with the addresses of then. A plan computes with ONNX
Runtime on what lies in device memory, and refuses what real ones refuse: other shapes than its profile's, a profile
that a second context uses (8.6), memory or addresses that were not given.
"""

# ruff: noqa: N802, N815 - the names are CUDA's and TensorRT's

import ctypes
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.targets.tensorrt import versions
from serve.engines import Array


class Code(int):
    """A cudaError_t."""

    name = "cudaErrorStandIn"


OK, REFUSED = Code(0), Code(1)


class CudaRuntime(ModuleType):
    """cuda.bindings.runtime, as far as the engine uses it."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.devices, self.can_capture = 1, True
        self.memory: dict[int, Any] = {}
        self.stream: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.calls: list[str] = []
        self.graphs = 0
        self.streams = 0
        for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
            setattr(self, kind, int)

    def holds(self, address: int) -> bool:
        """Whether an aligned address lies in memory that was allocated and not freed."""
        return any(
            0 <= address - start < len(block) and not (address - start) % 256 for start, block in self.memory.items()
        )

    def queue(self, work: Callable[[], None]) -> None:
        (self.stream if self.captured is None else self.captured).append(work)

    def cudaGetDeviceCount(self) -> Any:
        return (OK, self.devices) if self.devices else (Code(35), None)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.streams += 1
        return OK, 7

    def cudaStreamDestroy(self, stream: int) -> Any:
        self.streams -= 1
        return (OK,)

    def cudaMalloc(self, size: int) -> Any:
        block = (ctypes.c_uint8 * size)(*([255] * min(size, 64)))
        address = ctypes.addressof(block)
        self.memory[address] = block
        return OK, address

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> Any:
        assert self.captured is None
        self.stream_is_empty()
        del self.memory[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def stream_is_empty(self) -> None:
        assert not self.stream, "memory is freed that work in the stream may use"

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:
        self.calls.append("copy")

        def work() -> None:
            ctypes.memmove(target, source, size)

        self.queue(work)
        return (OK,)

    def cudaMemcpy2DAsync(
        self, target: int, step: int, source: int, pitch: int, size: int, rows: int, kind: int, stream: int
    ) -> Any:
        for row in range(rows):
            self.cudaMemcpyAsync(target + row * step, source + row * pitch, size, kind, stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        while self.stream:
            self.stream.pop(0)()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        graph, self.captured = self.captured, None
        return (OK, graph) if self.can_capture else (REFUSED, None)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        self.graphs += 1
        return OK, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> Any:
        self.graphs -= 1
        return (OK,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> Any:
        self.calls.append("launch")
        self.stream += graph
        return (OK,)

    def cudaGetLastError(self) -> Any:
        return (OK,)

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


class Flag:
    """An enumeration's member."""

    def __init__(self, name: str, value: int = 0) -> None:
        self.name, self.value = name, value

    def __int__(self) -> int:
        return self.value


class TensorRT(ModuleType):
    """The module tensorrt of *version* 8.6.1 or 10.13.0, on *cuda*."""

    def __init__(self, version: str, cuda: CudaRuntime) -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None)  # other packages ask whether it is installed
        self.__version__, self.cuda, self.old = version, cuda, version.startswith("8.")
        self.builds: list[dict[str, Any]] = []
        self.says: list[str] = []
        """Of the next build's log, at the level INFO."""
        self.layers: list[dict[str, Any]] = []
        """What a plan says of its layers; each takes a millisecond."""
        self.refuses: set[str] = set()
        """Names of plans that are not deserialized."""
        creation = {"EXPLICIT_BATCH": 0} if self.old else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**creation)
        self.BuilderFlag = SimpleNamespace(SPARSE_WEIGHTS="SPARSE_WEIGHTS", FP16="FP16")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.LayerInformationFormat = SimpleNamespace(JSON="JSON")
        if not self.old:
            self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")

        class ILogger:
            ERROR, INFO = 1, 3

        class IProfiler:
            pass

        self.ILogger, self.IProfiler = ILogger, IProfiler

    def Builder(self, log: Any) -> Any:
        build: dict[str, Any] = {"flags": [], "profiles": [], "old": self.old}
        cache = SimpleNamespace(serialize=lambda: b"timings")
        config = SimpleNamespace(
            set_flag=build["flags"].append,
            add_optimization_profile=lambda profile: build["profiles"].append(profile.shapes) or 0,
            create_timing_cache=lambda content: build.update(timings=content.decode()) or cache,
            set_timing_cache=lambda cache, ignore: True,
        )  # fmt: skip

        def profile() -> Any:
            shapes: dict[str, Any] = {}
            return SimpleNamespace(
                shapes=shapes, set_shape=lambda name, *three: shapes.update({name: [list(shape) for shape in three]})
            )

        def serialize(network: Any, config: Any) -> bytes:
            build["verbosity"] = config.profiling_verbosity
            self.builds.append(build)
            for line in self.says:
                log.log(self.ILogger.INFO, line)
            return json.dumps({**build, "model": network.model}).encode()

        return SimpleNamespace(
            create_builder_config=lambda: config, create_network=lambda flags: SimpleNamespace(model=""),
            create_optimization_profile=profile, build_serialized_network=serialize,
        )  # fmt: skip

    def OnnxParser(self, network: Any, log: Any) -> Any:
        def parse(path: str) -> bool:
            network.model = path
            return True

        return SimpleNamespace(parse_from_file=parse, num_errors=0)

    def Runtime(self, log: Any) -> Any:
        def deserialize(content: bytes) -> Any:
            if self.refuses:
                log.log(self.ILogger.ERROR, f"Serialization assertion failed: {self.refuses.pop()}")
                return None
            return Plan(self, json.loads(content))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Plan:
    """ICudaEngine."""

    def __init__(self, trt: TensorRT, build: dict[str, Any]) -> None:
        self.trt, self.build = trt, build
        self.session = onnxruntime.InferenceSession(build["model"], providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = {each.name: each for each in self.session.get_outputs()}
        self.used: set[int] = set()
        self.device_memory_size = 1000
        if trt.old:
            self.create_execution_context_without_device_memory = lambda: Context(self)
        else:
            self.create_execution_context = lambda strategy: Context(self)
            self.device_memory_size_v2 = 1000

    def dtype(self, name: str) -> str:
        kind = {**self.inputs, **self.outputs}[name].type
        found = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}[kind]
        return "int32" if self.trt.old and found == "int64" else found

    def get_tensor_dtype(self, name: str) -> Flag:
        return Flag({"int64": "INT64", "int32": "INT32", "float32": "FLOAT", "float16": "HALF"}[self.dtype(name)])

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": self.trt.layers}))


class Context:
    """IExecutionContext, which has a profile, shapes, addresses and memory, or refuses to run."""

    profiler: Any = None

    def __init__(self, plan: Plan) -> None:
        self.plan, self.profile = plan, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.device_memory = 0
        if not plan.trt.old:
            self.set_device_memory = lambda address, size: setattr(self, "device_memory", address)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.plan.trt.old and index in self.plan.used:
            raise RuntimeError("Error in set optimization profile async.")
        self.plan.used.add(index)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.plan.build["profiles"][self.profile][name]
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, length = self.shapes["input_ids"]
        past = next((shape[2] for each, shape in self.shapes.items() if each.startswith("past")), 0)
        known = {
            "batch_size": batch,
            "sequence_length": length,
            "past_sequence_length + sequence_length": past + length,
        }
        return tuple(each if isinstance(each, int) else known[each] for each in self.plan.outputs[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.plan.trt.cuda.holds(address)

    def execute_async_v3(self, stream: int) -> bool:
        cuda, plan = self.plan.trt.cuda, self.plan
        cuda.calls.append("execute")
        if not cuda.holds(self.device_memory) or set(self.addresses) != {*plan.inputs, *plan.outputs}:
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)

        def work() -> None:
            feeds = {name: cuda.read(addresses[name], shapes[name], plan.dtype(name)) for name in plan.inputs}
            wide = {name: array.astype("int64") if array.dtype == "int32" else array for name, array in feeds.items()}
            for name, value in zip(plan.outputs, plan.session.run(None, wide), strict=True):
                content = np.ascontiguousarray(value).tobytes()
                assert cuda.holds(addresses[name])
                ctypes.memmove(addresses[name], content, len(content))
            for layer in plan.trt.layers if self.profiler is not None else ():
                self.profiler.report_layer_time(f"{layer['Name']} [profile {self.profile}]", 1.0)

        cuda.queue(work)
        return True


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, *, version: str) -> TensorRT:
    """Have the engine find both, and keep the timing cache in *folder*."""
    cuda = CudaRuntime()
    trt = TensorRT(version, cuda)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(versions, "find_gpu", lambda: "NVIDIA Stand-In, 9.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return trt
