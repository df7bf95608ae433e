"""What the versions of TensorRT differ in, for building and for running; no other module asks which one is there.

    8.6            weakly typed: explicit batch is a flag, and half types in the graph have to be allowed by a flag; has
                   no int64, so that such inputs and outputs are int32; two contexts cannot share a profile
    10             strongly typed on request, so that types are the graph's; explicit batch is the only kind
    11             strongly typed always; the flags that allowed half types are gone
    TensorRT-RTX   strongly typed always; builds without a GPU, for a compute capability that it is told, and measures
                   nothing, so that there is no timing cache; runs on RTX GPUs alone

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html
and the Python API's NetworkDefinitionCreationFlag, ExecutionContextAllocationStrategy and IExecutionContext.
"""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.manifest import Manifest
from pst.errors import ConfigError, EngineError
from pst.nvidia_smi import query

RUNTIMES = ("tensorrt", "tensorrt_rtx")
"""Packages that build plans, the first that is installed being the default."""
NO_GPU = "none"
SPARSE_PATTERNS = ("2:4", "1:4")
"""What SPARSE_WEIGHTS has kernels for."""
_INSTALL = (
    "pip install tensorrt (a GPU is needed to build), or pip install tensorrt-rtx (for RTX GPUs; builds without one)"
)
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found \d+ layer\(s\) eligible [^:]*):?(.*)", re.S
)
_CHOSEN = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers|Chose \d+ layer\(s\) [^:]*):?(.*)",
    re.S,
)


def find_runtime(name: str | None = None) -> Any:
    """The module of TensorRT or TensorRT-RTX. Raises EngineError where neither (or not *name*) can be loaded."""
    for candidate in (name,) if name else RUNTIMES:
        try:
            return importlib.import_module(str(candidate))
        except ImportError:
            continue
        except Exception as error:  # a wheel whose libraries do not fit the driver
            raise EngineError(f"{candidate} is installed, but cannot be loaded ({error}); install it again.") from error
    raise EngineError(f"{name or 'TensorRT'} is not installed, so that no plan can be built; install it: {_INSTALL}.")


def find_gpu() -> str:
    """The first GPU's name and compute capability, as its driver says; NO_GPU where there is none."""
    found = query("name,compute_cap", "--format=csv,noheader")
    return found[0] if found else NO_GPU


def is_rtx(trt: Any) -> bool:
    """Whether *trt* is TensorRT-RTX."""
    return bool(trt.__name__ == "tensorrt_rtx")


def logger(trt: Any, errors: list[str], *, sparsity: list[str] | None = None) -> Any:
    """TensorRT's log, of which errors go to *errors*, and what it says of sparsity, if asked for, to *sparsity*.

    Whatever else it says is dropped: the standard error stream stays ours.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)
            elif sparsity is not None and message.startswith("(Sparsity)"):
                sparsity.append(message)

    return Log()


def timer(trt: Any, report: Callable[[str, float], None]) -> Any:
    """TensorRT's profiler: *report* gets each layer's name and milliseconds, at every inference."""

    class Timer(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return Timer()


def sparse_layers(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The layers that a builder's log calls eligible for sparse kernels, and those for which it chose one.

    *lines* begin with (Sparsity); there are two for each optimization profile: "Layers eligible for sparse math: a, b"
    and "TRT inference plan picked sparse implementation for layers: b" in 8.6, "Found 2 layer(s) eligible to use sparse
    tactics: a, b" and "Chose 1 layer(s) using sparse tactics: b" later. A version that only counts them gives none.
    Names are TensorRT's: those of ONNX nodes, joined with " + " where they were fused.
    """
    found: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        for pattern, names in zip((_ELIGIBLE, _CHOSEN), found, strict=True):
            match = pattern.match(line)
            if match:
                names += [name for name in (part.strip() for part in match[1].split(",")) if name and name not in names]
    return found


def network_flags(trt: Any) -> int:
    """For create_network: types are the graph's where the version can do that."""
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if hasattr(flags, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, name))


def set_flags(trt: Any, config: Any, manifest: Manifest, *, sparse: bool) -> None:
    """Allow sparse kernels, and the artifact's precision where types are not the graph's. Raises EngineError."""
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or manifest.precision == "fp32":
        return
    flag = getattr(trt.BuilderFlag, manifest.precision.upper(), None)
    if flag is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} has no {manifest.precision}; export with --precision fp16, or update it."
        )
    config.set_flag(flag)


def set_details(trt: Any, config: Any) -> None:
    """Have the plan keep what its layers are, for the receipt: operators, kernels, the ONNX nodes they came from."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def set_target(trt: Any, config: Any, target: str) -> None:
    """Build for the compute capability *target*, such as SM80. Raises ConfigError for one that is not known."""
    known: Mapping[str, Any] = trt.ComputeCapability.__members__
    if target not in known:
        raise ConfigError(f"{trt.__name__} knows no compute capability {target!r}; use one of {', '.join(known)}.")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[target], 0)


def timing_cache(config: Any, timings: Path | None) -> Any:
    """The timing cache that a build adds to, filled from the file *timings* where it is there and fits."""
    if timings is None:
        return None
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def new_context(trt: Any, engine: Any, memory: Callable[[int], int]) -> Any:
    """An execution context without device memory of its own.

    *memory* gives the address of as many bytes as it is asked for. Contexts that never run at the same time share them.
    """
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    if context is None:
        return None
    size = int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
    address = memory(max(size, 256))
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size)
    else:
        context.device_memory = address
    return context


def numpy_type(dtype: Any) -> str | None:
    """numpy's name of a TensorRT type; None where numpy has none. trt.nptype fails for bool with numpy 1.24 to 1.26."""
    return {
        "FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8",
        "BOOL": "bool",
    }.get(str(dtype.name))  # fmt: skip
